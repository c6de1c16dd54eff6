"""python -m kvcli."""

from .cli import main

main()
