"What is measured, without disturbing: noise, curvature, tails, thresholds, flatness, and probes of them."
from importlib import import_module
from sys import modules
from types import ModuleType


class _Room(ModuleType):
    "This room; called, it is `gradnb.measure_weights`."
    def __call__(self, *args, **options): return import_module("gradnb.runs.foreign.checkpoints").measure_weights(*args, **options)


modules[__name__].__class__ = _Room
