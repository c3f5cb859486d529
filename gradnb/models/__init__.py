"What learns: architectures of the source studies, first weights, losses."
from gradnb.models.build import ACTIVATIONS, MODELS, build_model

__all__ = ["ACTIVATIONS", "MODELS", "build_model"]
