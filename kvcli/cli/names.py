"""Names for help and completion, so that these need no torch. Written by `make docs`."""

METHODS = (
    "adakv",
    "cake",
    "cam",
    "compresskv",
    "critical",
    "d2o",
    "defensivekv",
    "evict",
    "global",
    "guikv",
    "h2o",
    "hack",
    "int8",
    "keydiff",
    "kivi",
    "knorm",
    "kvmerger",
    "lagkv",
    "layer-defensivekv",
    "lookm",
    "pyramidkv",
    "random",
    "raw",
    "snapkv",
    "streamingllm",
    "taskkv",
    "tova",
    "uniform",
    "weightedkv",
    "zipvl",
    "zipvl-mixed",
)
CALIBRATED = (
    "compresskv",
    "hack",
)
STATISTICS = (
    "norms",
    "moments",
    "kvzip",
)
