"""How heavy are the tails of gradient noise, and how sure is that?"""

from .estimators import compare_tails, tail_index
from .sketch import TailSketch

__all__ = ["TailSketch", "compare_tails", "tail_index"]
