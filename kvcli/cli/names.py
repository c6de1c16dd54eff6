"""Names of methods for help and completion, so that these need no torch. Written by `make docs`."""

METHODS = (
    "adakv",
    "evict",
    "global",
    "h2o",
    "int8",
    "keydiff",
    "kivi",
    "knorm",
    "kvmerger",
    "random",
    "raw",
    "snapkv",
    "streamingllm",
    "uniform",
)
