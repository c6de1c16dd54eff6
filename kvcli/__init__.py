"""kvcli: gzip for KV caches. Importing it loads nothing heavy."""

__version__ = "0.1.0"
