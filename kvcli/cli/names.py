"""Names of methods for help and completion, so that these need no torch. Written by `make docs`."""

METHODS = (
    "adakv",
    "cake",
    "critical",
    "evict",
    "global",
    "h2o",
    "keydiff",
    "knorm",
    "kvmerger",
    "lagkv",
    "pyramidkv",
    "random",
    "raw",
    "snapkv",
    "streamingllm",
    "tova",
    "uniform",
    "zipvl",
)
