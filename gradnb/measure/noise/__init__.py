"""How noisy is a gradient estimate, and how sure is that?"""
from .spread import Spread, grad_norm_sq, grad_variance, noise_scale, normalized_variance, signal_to_noise

__all__ = ["Spread", "grad_norm_sq", "grad_variance", "noise_scale", "normalized_variance", "signal_to_noise"]
