"""Names of methods for help and completion, so that these need no torch. Written by `make docs`."""

METHODS = (
    "adakv",
    "defensivekv",
    "evict",
    "global",
    "guikv",
    "h2o",
    "keydiff",
    "knorm",
    "kvmerger",
    "layer-defensivekv",
    "random",
    "raw",
    "snapkv",
    "streamingllm",
    "taskkv",
    "uniform",
)
