"What can be said of a matrix that one can only multiply by, and how sure it is."
from gradnb.linalg.basis import Eigs, Sketch
from gradnb.linalg.iterations import lobpcg, power_iteration
from gradnb.linalg.krylov import lanczos
from gradnb.linalg.trace import hutchinson

__all__ = ["Eigs", "Sketch", "hutchinson", "lanczos", "lobpcg", "power_iteration"]
