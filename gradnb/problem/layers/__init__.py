"""What does every example contribute to a gradient, without a gradient for each example?"""
from .capture import LayerIO, capture, verify
from .convolution import Convolution
from .layer import Layer, Rows
from .linear import Linear

__all__ = ["Convolution", "Layer", "LayerIO", "Linear", "Rows", "capture", "verify"]
