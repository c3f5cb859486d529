"gradnb watches deep-learning optimisation from the inside. Names below load their modules when first used."
__version__ = "0.1.0"

_NAMES = {
    "ground.streams": ["Stream"],
    "ground.layout": ["Layout"],
    "ground.estimate": ["Estimate"],
    "linalg": ["Eigs", "lanczos", "lobpcg", "power_iteration", "hutchinson"],
    "linalg.spectra": ["Spectrum", "diagonal_block", "spectrum", "xtrace"],
    "data": ["Dataset", "SOURCES", "load_dataset"],
    "models": ["MODELS", "build_model"],
    "models.losses": ["LOSSES", "accuracy", "ce", "mse", "linear_hinge"],
    "problem.network": ["Network"],
    "problem.audit": ["audit_operator"],
    "problem": ["Problem", "Point", "Quadratic"],
    "ground.roles": ["Batch", "State", "Estimator", "Rule", "Stepper", "draw", "kind"],
    "move.estimators.minibatch": ["MiniBatch", "FullBatch"],
    "move.estimators.svrg": ["SVRG"],
    "move.estimators.strata": ["Stratified"],
    "move.estimators.clustering": ["GradientClustering"],
    "move.estimators.online": ["OnlineClustering"],
    "move.estimators.importance": ["ImportanceSampling"],
    "move.estimators.dropping": ["DropExamples"],
    "move.estimators.sam": ["SAM", "ASAM"],
    "move.rules.gd": ["GD"],
    "move.rules.momentum": ["Momentum"],
    "move.rules.adam": ["Adam"],
    "move.rules.rmsprop": ["RMSProp"],
    "move.rules.lamb": ["LAMB"],
    "move.rules.lars": ["LARS"],
    "move.rules.agd": ["AutomaticGradientDescent"],
    "move.rules.kfac": ["KFAC"],
    "move.rules.fromtorch": ["FromTorch"],
    "move.rules.schedule": ["Scheduled", "Piecewise", "Cosine"],
    "move.rules.groups": ["Groups"],
    "move.rules.sign": ["Signum", "Lion"],
    "move.rules.muon": ["Muon"],
    "models.inits": ["agd_init"],
    "move.faces": ["optim"],
    "move.faces.estimated": ["Estimated"],
    "problem.designs": ["exact_variance"],
    "move.steppers": ["Descent", "trajectory"],
    "move.flows.integrators": ["RK4", "Chebyshev", "DormandPrince"],
    "move.flows.gradient": ["GradientFlow"],
    "move.flows.central": ["CentralFlow"],
    "measure.noise.spread": ["grad_norm_sq", "grad_variance", "noise_scale", "normalized_variance", "signal_to_noise"],
    "measure.curvature": ["sharpness"],
    "measure.thresholds.metrics": ["METRICS", "preconditioned_sharpness", "threshold"],
    "measure.thresholds.updates": ["update_radius"],
    "measure.thresholds.directions": ["batch_sharpness", "critical_sharpness", "directional_sharpness", "interaction_sharpness", "sam_edge"],
    "measure.flatness.centre": ["MEASURES", "measure_flatness"],
    "measure.flatness.reparametrise": ["TRANSFORMS"],
    "measure.flatness.audit": ["invariance_audit"],
    "measure.flatness.landscape": ["filter_plane", "interpolate", "iterates_plane", "surface"],
    "measure.tail.estimators": ["compare_tails", "tail_index"],
    "measure.tail.sketch": ["TailSketch"],
    "ground.traces": ["Trace"],
    "measure.probes": ["View", "Probe", "PROBES", "probe", "every", "at", "log_spaced"],
    "runs.training": ["train", "Outcome"],
    "runs.laws": ["check_estimator", "check_problem", "check_rule", "check_stepper", "check_probe", "check_statistic"],
    "measure.clusters": ["cluster_table", "inspect_clusters"],
    "runs.foreign.watch": ["Watch", "watch"],
    "runs.foreign.checkpoints": ["measure_weights"],
    "runs": ["Spec", "Run", "Store"],
    "runs.sweeps.grid": ["grid"],
    "runs.sweeps.many": ["results", "sweep"],
    "runs.exports": ["export_runs"],
    "runs.originals": ["import_runs"],
    "show.claims": ["Claim", "claim", "save_claims", "load_claims"],
    "show.build": ["run_figures"],
    "show.explorers.runs": ["RunExplorer"],
    "show.explorers.live": ["LiveExplorer"],
    "show.explorers.tail": ["TailExplorer"],
    "show.explorers.clusters": ["ClusterExplorer"],
    "show.explorers.landscape": ["LandscapeExplorer"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    from importlib import import_module
    if name == "measure": return import_module("gradnb.measure")       # a room that can be called
    if name not in _HOME: raise AttributeError(f"module 'gradnb' has no attribute {name!r}")
    return getattr(import_module(f"gradnb.{_HOME[name]}"), name)


def __dir__(): return sorted([*globals(), *__all__])
