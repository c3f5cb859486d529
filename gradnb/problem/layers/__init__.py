"""What does every example contribute to a gradient, without a gradient for each example?"""
from .capture import LayerIO, capture, verify
from .convolution import Convolution
from .layer import Layer
from .linear import Linear

__all__ = ["Convolution", "Layer", "LayerIO", "Linear", "capture", "verify"]
