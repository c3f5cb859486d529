"gradnb watches deep-learning optimisation from the inside. Names below load their modules when first used."
__version__ = "0.1.0"

_NAMES = {
    "streams": ["Stream"],
    "layout": ["Layout"],
    "estimate": ["Estimate"],
    "linalg": ["Eigs", "lanczos", "lobpcg", "power_iteration", "hutchinson"],
    "spectra": ["Spectrum", "diagonal_block", "spectrum", "xtrace"],
    "data": ["Dataset", "SOURCES", "load_dataset"],
    "models": ["MODELS", "build_model"],
    "losses": ["LOSSES", "accuracy", "ce", "mse", "linear_hinge"],
    "network": ["Network"],
    "problem": ["Problem", "Point", "Quadratic"],
    "roles": ["Batch", "State", "Estimator", "Rule", "Stepper", "draw", "kind"],
    "estimators.minibatch": ["MiniBatch", "FullBatch"],
    "estimators.svrg": ["SVRG"],
    "estimators.strata": ["Stratified"],
    "estimators.clustering": ["GradientClustering"],
    "estimators.online": ["OnlineClustering"],
    "estimators.importance": ["ImportanceSampling"],
    "estimators.dropping": ["DropExamples"],
    "estimators.sam": ["SAM", "ASAM"],
    "rules.gd": ["GD"],
    "rules.momentum": ["Momentum"],
    "rules.adam": ["Adam"],
    "rules.rmsprop": ["RMSProp"],
    "rules.lamb": ["LAMB"],
    "rules.lars": ["LARS"],
    "rules.agd": ["AutomaticGradientDescent"],
    "rules.kfac": ["KFAC"],
    "rules.fromtorch": ["FromTorch"],
    "rules.schedule": ["Scheduled", "Piecewise", "Cosine"],
    "rules.groups": ["Groups"],
    "inits": ["agd_init"],
    "estimated": ["Estimated"],
    "designs": ["exact_variance"],
    "steppers": ["Descent", "trajectory"],
    "flows.integrators": ["RK4", "Chebyshev", "DormandPrince"],
    "flows.gradient": ["GradientFlow"],
    "flows.central": ["CentralFlow"],
    "noise.spread": ["grad_norm_sq", "grad_variance", "noise_scale", "normalized_variance", "signal_to_noise"],
    "curvature": ["sharpness"],
    "thresholds.metrics": ["METRICS", "preconditioned_sharpness", "threshold"],
    "thresholds.updates": ["update_radius"],
    "thresholds.directions": ["batch_sharpness", "critical_sharpness", "directional_sharpness", "interaction_sharpness", "sam_edge"],
    "flatness.centre": ["MEASURES", "measure_flatness"],
    "flatness.reparametrise": ["TRANSFORMS"],
    "flatness.audit": ["invariance_audit"],
    "flatness.landscape": ["filter_plane", "interpolate", "iterates_plane", "surface"],
    "tail.estimators": ["compare_tails", "tail_index"],
    "tail.sketch": ["TailSketch"],
    "traces": ["Trace"],
    "probes": ["View", "Probe", "PROBES", "probe", "every", "at", "log_spaced"],
    "training": ["train", "Outcome"],
    "laws": ["check_estimator", "check_rule", "check_stepper", "check_probe"],
    "clusters": ["cluster_table", "inspect_clusters"],
    "runs": ["Spec", "Run", "Store"],
    "sweeps.grid": ["grid"],
    "sweeps.sweep": ["results", "sweep"],
    "exports": ["export_runs"],
    "originals": ["import_runs"],
    "claims": ["Claim", "claim", "save_claims", "load_claims"],
    "figures": ["run_figures"],
    "explore.runs": ["RunExplorer"],
    "explore.liveexplorer": ["LiveExplorer"],
    "explore.tailexplorer": ["TailExplorer"],
    "explore.clusterexplorer": ["ClusterExplorer"],
    "explore.landscapeexplorer": ["LandscapeExplorer"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    from importlib import import_module
    if name not in _HOME: raise AttributeError(f"module 'gradnb' has no attribute {name!r}")
    return getattr(import_module(f"gradnb.{_HOME[name]}"), name)


def __dir__(): return sorted([*globals(), *__all__])
