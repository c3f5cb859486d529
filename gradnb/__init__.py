"gradnb watches deep-learning optimisation from the inside. Names below load their modules when first used."
__version__ = "0.1.0"

_NAMES = {
    "streams": ["Stream"],
    "layout": ["Layout"],
    "estimate": ["Estimate"],
    "linalg": ["Eigs", "lanczos", "lobpcg", "power_iteration", "hutchinson"],
    "data": ["Dataset", "load_dataset"],
    "models": ["MODELS", "build_model"],
    "losses": ["LOSSES", "accuracy", "ce", "mse", "linear_hinge"],
    "network": ["Network"],
    "problem": ["Problem", "Point", "Quadratic"],
    "roles": ["Batch", "State", "Estimator", "Rule", "Stepper", "draw", "kind"],
    "estimators.minibatch": ["MiniBatch", "FullBatch"],
    "rules.gd": ["GD"],
    "rules.momentum": ["Momentum"],
    "rules.adam": ["Adam"],
    "rules.rmsprop": ["RMSProp"],
    "rules.fromtorch": ["FromTorch"],
    "rules.schedule": ["Scheduled", "Piecewise", "Cosine"],
    "steppers": ["Descent", "trajectory"],
    "curvature": ["sharpness"],
    "traces": ["Trace"],
    "probes": ["View", "Probe", "PROBES", "probe", "every", "at", "log_spaced"],
    "training": ["train", "Outcome"],
    "laws": ["check_estimator", "check_rule", "check_stepper", "check_probe"],
    "runs": ["Spec", "Run", "Store"],
    "claims": ["Claim", "claim", "save_claims", "load_claims"],
    "figures": ["run_figures"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    from importlib import import_module
    if name not in _HOME: raise AttributeError(f"module 'gradnb' has no attribute {name!r}")
    return getattr(import_module(f"gradnb.{_HOME[name]}"), name)


def __dir__(): return sorted([*globals(), *__all__])
