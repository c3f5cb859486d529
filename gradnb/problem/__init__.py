"What is minimised, and what are its derivatives?"
from gradnb.problem.point import Point
from gradnb.problem.problem import Evaluation, Problem
from gradnb.problem.quadratic import Bowl, Quadratic

__all__ = ["Bowl", "Evaluation", "Point", "Problem", "Quadratic"]
