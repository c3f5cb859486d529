"Rules as torch optimizers."
from gradnb.move.faces import optim

__all__ = ["optim"]
