"Which networks can a run train, and from which weights does it start?"
from gradnb.models.build import ACTIVATIONS, MODELS, build_model

__all__ = ["ACTIVATIONS", "MODELS", "build_model"]
