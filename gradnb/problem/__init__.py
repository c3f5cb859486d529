"What is minimised, what goes through its layers, and its derivatives."
from gradnb.problem.point import Point
from gradnb.problem.risk import Evaluation, Risk
from gradnb.problem.derivatives import Problem
from gradnb.problem.quadratic import Bowl, Quadratic

__all__ = ["Bowl", "Evaluation", "Point", "Problem", "Quadratic", "Risk"]
