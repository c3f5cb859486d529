"gradnb from a terminal."
from gradnb.cli.command import main

__all__ = ["main"]
