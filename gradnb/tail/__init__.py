"""How heavy are the tails of gradient noise, and how sure is that?"""

from .estimators import compare_tails, tail_index

__all__ = ["compare_tails", "tail_index"]
