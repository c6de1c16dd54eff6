"""Names of methods for help and completion, so that these need no torch. Written by `make docs`."""

METHODS = (
    "adakv",
    "cam",
    "d2o",
    "evict",
    "global",
    "h2o",
    "keydiff",
    "knorm",
    "kvmerger",
    "lookm",
    "random",
    "raw",
    "snapkv",
    "streamingllm",
    "uniform",
    "weightedkv",
)
