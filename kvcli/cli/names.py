"""Names of methods for help and completion, so that these need no torch. Written by `make docs`."""

METHODS = (
    "adakv",
    "compresskv",
    "evict",
    "global",
    "h2o",
    "hack",
    "keydiff",
    "knorm",
    "kvmerger",
    "random",
    "raw",
    "snapkv",
    "streamingllm",
    "uniform",
)
