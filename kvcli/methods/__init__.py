"""One method a file; a file put here is found by itself."""
