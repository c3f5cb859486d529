"What one types."
from gradnb.cli.command import main

__all__ = ["main"]
