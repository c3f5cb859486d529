"""Thresholds, metrics and update maps against dense matrices on small networks, for every rule."""
import itertools
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from math import ceil

import numpy as np
import pytest
import torch

from gradnb import Descent, Problem, Rule, Stream
from gradnb.data import Dataset, load_dataset
from gradnb.measure.curvature import sharpness
from gradnb.models import build_model
from gradnb.move.estimators.minibatch import MiniBatch
from gradnb.move.estimators.sam import ASAM, SAM
from gradnb.measure.probes.view import PROBES, View
from gradnb.problem import Quadratic
from gradnb.ground.roles import RULES as REGISTRY, Batch, State, draw
from gradnb.move.rules.adam import Adam, AdamState
from gradnb.move.rules.ademamix import AdEMAMix
from gradnb.move.rules.agd import AutomaticGradientDescent
from gradnb.move.rules.fromtorch import FromTorch, TorchState
from gradnb.move.rules.gd import GD
from gradnb.move.rules.groups import Groups
from gradnb.move.rules.kfac import KFAC
from gradnb.move.rules.lamb import LAMB
from gradnb.move.rules.lars import LARS
from gradnb.move.rules.momentum import Momentum
from gradnb.move.rules.muon import Muon
from gradnb.move.rules.prodigy import Prodigy
from gradnb.move.rules.rmsprop import RMSProp
from gradnb.move.rules.schedule import Piecewise, Scheduled
from gradnb.move.rules.schedulefree import ScheduleFreeAdamW, ScheduleFreeSGD
from gradnb.move.rules.shampoo import Shampoo
from gradnb.move.rules.sign import Lion, Signum
from gradnb.move.rules.soap import SOAP
from gradnb.move.rules.sophia import Sophia
from gradnb.move.rules.steepest import SteepestDescent
from gradnb.move.steppers import trajectory
from gradnb.measure.thresholds.directions import batch_sharpness, critical_sharpness, directional_sharpness, interaction_sharpness, ratio_of_means
from gradnb.measure.thresholds.metrics import METRICS, Preconditioned, metric_of, preconditioned_sharpness, threshold
from gradnb.measure.thresholds.norms import NORMS, ball, dual_norm, generalized_sharpness
from gradnb.measure.thresholds.updates import UpdateMap, arnoldi, update_radius
from gradnb.runs.laws import check_probe
from gradnb.runs.training import train

DOUBLE = torch.float64
REGISTERED = {name for name, make in REGISTRY.items() if getattr(make, "__module__", "").startswith("gradnb.")}


def small(bias=True):
    "A tanh network of 50 (42 without biases) parameters on 30 random examples, in double precision."
    gen = Stream(3).generator()
    x, y = torch.randn(30, 5, generator=gen), torch.randn(30, 2, generator=gen)
    net = torch.nn.Sequential(torch.nn.Linear(5, 6, bias=bias), torch.nn.Tanh(), torch.nn.Linear(6, 2, bias=bias)).double()
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=gen, dtype=DOUBLE) / 2
    return Problem(net, "mse", Dataset(x.double(), y.double(), x.double(), y.double(), None, "random"))


def prepared(problem, rule, k=4, estimator=None):
    stepper = Descent(rule, estimator) if estimator else Descent(rule)
    return stepper, next(islice(trajectory(problem, stepper), k, None))


def dense_hessian(problem, theta):
    return problem.hvp(theta, torch.eye(problem.p, dtype=DOUBLE))


def close(a, b, rtol): return torch.testing.assert_close(torch.as_tensor(a, dtype=DOUBLE), torch.as_tensor(b, dtype=DOUBLE), rtol=rtol, atol=rtol)


RULES = {
    "gd": GD(.1), "polyak": Momentum(.1), "nesterov": Momentum(.1, nesterov=True), "rmsprop": RMSProp(.01), "adam": Adam(.01),
    "scheduled": Scheduled(Adam(.01), Piecewise(((2, .5),))), "lamb": LAMB(.05, weight_decay=.1),
    "lamb-l2": LAMB(.05, weight_decay=.1, decay="l2", max_grad_norm=.1), "lamb-outside": LAMB.pytorch_optimizer(.05, weight_decay=.1),
    "lamb-first": LAMB(.05, weight_decay=.1, bias_correction="first"), "lamb-plain": LAMB.cybertronai(.05, grad_averaging=False),
    "lamb-matrices": LAMB.timm(.05, adapt="matrices"), "lars": LARS(.5, weight_decay=.1, trust=.1),
    "lars-nesterov": LARS(.5, nesterov=True, rate="outside", trust=.1, adapt="matrices", weight_decay=.1),
    "agd": AutomaticGradientDescent(), "kfac": KFAC(.1, every=1, invert=1, damping=.1), "ekfac": KFAC(.1, ekfac=True, damping=.1, clip=None),
    "shampoo": Shampoo(.1, .5, eps=.1), "shampoo-grafted": Shampoo(.1, .5, .9, eps=.1, graft="rmsprop", nesterov=True), "soap": SOAP(.01, weight_decay=0., every=8, eps=1e-3),
    "prodigy": Prodigy(.01, d0=1., coef=0., bias_correction=True), "sophia": Sophia(.01, gamma=1e4, every=1, curvature="gnb"), "ademamix": AdEMAMix(.01, beta3=.99, warmup=9, weight_decay=.1), "free-sgd": ScheduleFreeSGD(.1, weight_decay=.1), "free-adamw": ScheduleFreeAdamW(.01, weight_decay=.1),
    "torch-sgd": FromTorch(torch.optim.SGD, lr=.1, momentum=.9, dampening=.2, weight_decay=.1),
    "torch-adam": FromTorch(torch.optim.Adam, lr=.01, weight_decay=.1, amsgrad=True),
    "torch-adamw": FromTorch(torch.optim.AdamW, lr=.01, weight_decay=.1),
    "torch-rmsprop": FromTorch(torch.optim.RMSprop, lr=.01, centered=True, momentum=.5),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def problem_for(rule): return small(bias=not isinstance(rule, AutomaticGradientDescent))


# --- the update map -----------------------------------------------------------------------------------------------

def dense_map(problem, stepper, state):
    "The Jacobian of a step of the rule, by fourth-order differences of whole steps through the problem's own gradient."
    step = UpdateMap(problem, stepper, state)
    sizes = [t.numel() for t in step.x[2:]]

    def whole(z):
        theta, *rest = z.split([problem.p, *sizes])
        grad = problem.grad_and_loss(theta)[0]
        if isinstance(stepper.estimator, SAM): grad = stepper.estimator.estimate((), problem, theta, None)[0]
        out = step.step([theta, grad, *(r.view_as(t) for r, t in zip(rest, step.x[2:]))])
        return torch.cat([t.reshape(-1) for t in out])

    z0, columns = torch.cat([step.x[0], *(t.reshape(-1) for t in step.x[2:])]), []
    for i in range(len(z0)):
        h = 1e-4 * max(z0[i].abs().item(), 1e-6)
        e = torch.zeros_like(z0)
        e[i] = h
        columns.append((8 * (whole(z0 + e) - whole(z0 - e)) - (whole(z0 + 2 * e) - whole(z0 - 2 * e))) / (12 * h))
    return torch.stack(columns, 1)


@cache
def dense(name):
    "Where the rule of that name is after a few steps, and its Jacobian there."
    problem = problem_for(RULES[name])
    stepper, state = prepared(problem, RULES[name])
    return problem, stepper, state, dense_map(problem, stepper, state)


@pytest.mark.parametrize("name", RULES)
def test_products_with_the_update_map_are_those_of_its_dense_jacobian(name):
    if isinstance(rule := RULES[name], Shampoo): pytest.skip("its factors are singular here, where their eigenvalues have a kink at zero")
    problem, stepper, state, J = dense(name)
    step = UpdateMap(problem, stepper, state)
    v = torch.randn(problem.p, generator=Stream(5).generator(), dtype=DOUBLE)
    once = step(v, [torch.zeros_like(t) for t in step.x[2:]])
    twice = step(once[0], [t.view_as(x) for t, x in zip(once[1:], step.x[2:])])
    flat = lambda ts: torch.cat([t.reshape(-1) for t in ts])
    z = torch.cat([v, v.new_zeros(J.shape[0] - problem.p)])
    close(flat(once), J @ z, 2e-5)
    close(flat(twice), J @ J @ z, 2e-5)
    assert step.doubt < 1e-4 and step.exact == (not isinstance(rule, FromTorch))


@pytest.mark.parametrize("name", ["gd", "nesterov", "rmsprop", "adam", "lamb", "lars", "agd", "kfac", "torch-adamw"])
def test_the_outermost_eigenvalues_are_those_of_the_dense_jacobian(name):
    problem, stepper, state, J = dense(name)
    reached = torch.zeros(J.shape[0], dtype=torch.bool)          # what a disturbance of θ can move
    reached[:problem.p] = True
    for _ in range(4): reached |= (J[:, reached].abs() > 0).any(1)
    z = torch.linalg.eigvals(J[reached][:, reached])
    found = update_radius(problem, stepper, state, tol=1e-8, max_products=400)
    assert found.converged
    close([found.radius, found.flip], [z.abs().max(), z.real.min()], 1e-4)


def test_the_error_of_an_eigenvalue_covers_it_before_convergence():
    problem = small()
    stepper, state = prepared(problem, Adam(.1))
    truth, hits = update_radius(problem, stepper, state, tol=1e-10, max_products=400), []
    for seed in range(20):
        found = update_radius(problem, stepper, state, tol=1e-2, stream=Stream(seed))
        hits.append(abs(found.flip - truth.flip) <= max(found.flip_error, 1e-9))
    assert sum(hits) >= 18


def test_arnoldi_on_a_matrix_that_is_not_normal():
    A = torch.randn(40, 40, generator=Stream(1).generator(), dtype=DOUBLE)
    z = torch.linalg.eigvals(A)
    found = arnoldi(A.mv, torch.ones(40, dtype=DOUBLE), tol=1e-10)
    close([found.radius, found.flip], [z.abs().max(), z.real.min()], 1e-8)
    assert not arnoldi(A.mv, torch.ones(40, dtype=DOUBLE), tol=1e-10, max_products=5).converged


@pytest.mark.parametrize("kwargs", [dict(), dict(beta=.9), dict(beta=.9, nesterov=True), dict(beta=.3, nesterov=True)])
def test_the_radius_on_a_quadratic_is_one_at_the_threshold(kwargs):
    H = torch.diag(torch.linspace(.1, 3, 20, dtype=DOUBLE))
    for scale, above in ((.99, False), (1.01, True)):
        rule = Momentum(scale * threshold(1., **kwargs) / 3, **dict(beta=0.) | kwargs)
        bowl = Quadratic(H)
        assert (update_radius(bowl, *prepared(bowl, rule), tol=1e-9).radius > 1) is above


@pytest.mark.parametrize("beta1", [0., .9])
def test_adam_at_a_minimum_flips_at_the_threshold_of_its_metric(beta1):
    gen = Stream(2).generator()
    A = torch.randn(12, 12, generator=gen, dtype=DOUBLE)
    bowl, zero = Quadratic(A @ A.T), torch.zeros(12, dtype=DOUBLE)
    moments = AdamState(7, {"theta": zero}, {"theta": torch.rand(12, generator=gen, dtype=DOUBLE) + .1})
    state = State(0, zero, moments, grad=zero, loss=zero[0])
    metric = metric_of(bowl, Descent(Adam(1., beta1)), state)
    sharp = preconditioned_sharpness(bowl.at(zero), metric, tol=1e-10).values[0].item()
    lr = metric.threshold / sharp                    # the threshold is in units of 1/η
    close(update_radius(bowl, Descent(Adam(lr, beta1)), state, tol=1e-9).flip, -1., 1e-6)


def test_sam_moves_the_map_and_asam_is_refused():
    problem = small()
    stepper, state = prepared(problem, GD(.1), estimator=SAM(.2))
    z = torch.linalg.eigvals(dense_map(problem, stepper, state))
    close(update_radius(problem, stepper, state, tol=1e-8, max_products=200).flip, z.real.min(), 1e-5)
    stepper, state = prepared(problem, GD(.1), estimator=ASAM(.2))
    with pytest.raises(TypeError, match="ASAM"): update_radius(problem, stepper, state)


@dataclass(frozen=True)
class Detached(Rule):
    "A rule that keeps nothing and hides its derivative."
    lr: float
    def step(self, state, blocks, grads): return {n: b - self.lr * grads[n].detach().clone() * b.detach() for n, b in blocks.items()}, state


def test_a_rule_that_hides_its_derivative_is_differenced():
    "Half of the derivative of θ' is lost here: the comparison with differences sees it."
    problem = small()
    stepper, state = prepared(problem, Detached(.1))
    J = dense_map(problem, stepper, state)
    v = torch.ones(problem.p, dtype=DOUBLE)
    close(UpdateMap(problem, stepper, state)(v, [])[0], J @ v, 1e-5)


# --- metrics ------------------------------------------------------------------------------------------------------

@every_rule
def test_preconditioned_sharpness_is_the_top_eigenvalue_of_the_dense_product(rule):
    problem = problem_for(rule)
    stepper, state = prepared(problem, rule)
    metric = metric_of(problem, stepper, state)
    eye = torch.eye(problem.p, dtype=DOUBLE)
    S = torch.stack([metric.root(e) for e in eye])
    close(S, S.T, 1e-10)
    M = S @ (dense_hessian(problem, state.theta) + torch.diag(metric.shift)) @ S
    found = preconditioned_sharpness(problem.at(state.theta), metric, k=2, tol=1e-9)
    close(found.values, torch.linalg.eigvalsh(M).flip(0)[:2], 1e-6)
    close(Preconditioned(problem.at(state.theta), metric).quadratic(eye[:, :3]), M.diag()[:3], 1e-8)
    assert metric.threshold > 0


MOMENTUM = {"adam": (.9, False, .1), "scheduled": (.9, False, .1), "lamb": (.9, False, .1), "lamb-l2": (.9, False, .1),
            "lamb-outside": (.9, False, .1), "lamb-first": (.9, False, .1), "lamb-matrices": (.9, False, .1), "lamb-plain": (.9, False, 1.),
            "polyak": (.9, False, 1.), "nesterov": (.9, True, 1.), "lars": (.9, False, 1.), "lars-nesterov": (.9, True, 1.),
            "shampoo": (.5, False, 1.), "shampoo-grafted": (.5, True, 1.), "soap": (.95, False, .05), "prodigy": (.9, False, .1), "sophia": (.96, False, .04), "kfac": (.9, False, 1.), "ekfac": (.9, False, 1.), "torch-sgd": (.9, False, .8), "torch-adam": (.9, False, .1),
            "torch-adamw": (.9, False, .1), "torch-rmsprop": (.5, False, 1.)}


@pytest.mark.parametrize("name", RULES)
def test_a_metric_is_what_the_step_does_to_the_newest_gradient(name):
    """θ' depends on the newest gradient, given the statistics that it enters, as −η w P⁻¹ g (with Nesterov (1 + β) P⁻¹).

    Two rules step from one state: the rule itself and, with its velocity or first moment emptied, the same. What is left of
    the second step is the newest gradient's part alone, statistics unchanged."""
    rule = RULES[name]
    problem = problem_for(rule)
    stepper, state = prepared(problem, rule)
    metric, layout = metric_of(problem, stepper, state), problem.layout
    beta, nesterov, weight = MOMENTUM.get(name, (0., False, 1.))
    inner, at = state.rule, rule
    if name == "scheduled": inner, at = inner.inner, rule.at(inner.step)
    if name.startswith("free"): pytest.skip("its step pulls towards z too; compared below")
    if name == "ademamix": pytest.skip("two means at once; compared below")
    if name.startswith("lamb") or name.startswith("lars"): pytest.skip("its trust ratio sees the velocity; compared below")
    if hasattr(inner, "optimizer"):
        for s in inner.optimizer["state"].values():
            for field in ("momentum_buffer", "exp_avg"): s[field] = torch.zeros_like(s[field]) if s.get(field) is not None else s.get(field)
    else:
        for field in ("velocity", "exp_avg"):
            if hasattr(inner, field): inner = inner._replace(**{field: {n: torch.zeros_like(v) for n, v in getattr(inner, field).items()}})
    blocks, _ = at.step(inner, layout.named(state.theta), layout.named(state.grad))
    moved = layout.join(blocks[n] for n in layout.names) - state.theta
    if name == "torch-adamw": moved += .01 * .1 * state.theta                       # what decay takes, apart from the gradient
    lr = (1 + beta) * 2 / (metric.threshold * weight * (1 + 2 * beta * nesterov))   # η, by the definition of the threshold
    g = state.grad + metric.shift * state.theta
    expected = -lr * weight * (1 + beta * nesterov) * metric.root(metric.root(g))
    if name == "torch-adamw": expected *= (2 - .01 * .1) / 2
    close(moved, expected, 1e-6)


@pytest.mark.parametrize("name", [n for n in RULES if n.startswith(("lamb", "lars"))])
def test_a_metric_with_trust_ratios_is_what_the_step_does_with_them(name):
    "θ' written out from the metric, the velocity before the step, and the decay."
    rule = RULES[name]
    problem = small()
    stepper, state = prepared(problem, rule)
    metric, layout = metric_of(problem, stepper, state), problem.layout
    beta, nesterov, weight = MOMENTUM[name]
    after = stepper.step(problem, state)
    theta, grad = state.theta, state.grad
    decays = lambda n, b: rule.adapt != "matrices" or b.ndim > 1
    if name.startswith("lars"):
        inverse, velocity = metric.root(metric.root(torch.ones_like(theta))), layout.join(state.rule.velocity[n] for n in layout.names)
        per = 1 if rule.rate == "outside" else rule.lr
        new = beta * velocity / per + inverse * (grad + metric.shift * theta)
        move = inverse * (grad + metric.shift * theta) + beta * new if nesterov else new
        close(after.theta, theta - rule.lr * move, 1e-10)
        return
    inverse, taken = metric.root(metric.root(torch.ones_like(theta))), torch.zeros_like(theta)
    for n, b, out in zip(layout.names, layout.split(theta), layout.split(taken)):
        if rule.weight_decay and decays(n, b) and rule.decay != "l2":
            first = 1 - rule.beta1 ** after.rule.step if rule.bias_correction == "first" else 1.
            out += rule.lr * rule.weight_decay * (after.rule.trust_ratio[n] / first if rule.decay == "inside" else 1.)
    clip = 1. if rule.max_grad_norm is None else min(1., rule.max_grad_norm / grad.norm().item())
    moment = layout.join(state.rule.exp_avg[n] for n in layout.names) * beta / clip + weight * (grad + metric.shift * theta)
    close(after.theta, (1 - taken) * theta - rule.lr * inverse * (2 - taken) / 2 * moment, 1e-9)


@pytest.mark.parametrize("rule", [ScheduleFreeSGD(.1), ScheduleFreeSGD(.3, .6, warmup=9, r=2.), ScheduleFreeSGD(.1, .95, power=0.)], ids=repr)
@pytest.mark.parametrize("k", [0, 1, 5, 200])
def test_schedule_free_descent_flips_at_its_threshold(rule, k):
    "The two multipliers of y and z along one eigenvector, by the three sequences of the paper."
    bowl = Quadratic(torch.eye(1, dtype=DOUBLE))
    stepper, state = prepared(bowl, rule, k)
    edge = metric_of(bowl, stepper, state).threshold
    lr = rule.lr * min(1, (k + 1) / rule.warmup if rule.warmup else 1)
    weights = [(j + 1) ** rule.r * (rule.lr * min(1, (j + 1) / rule.warmup if rule.warmup else 1)) ** rule.power for j in range(k + 1)]
    c = weights[-1] / sum(weights)
    def multipliers(h):
        def step(y, z):
            x = (y - (1 - rule.beta) * z) / rule.beta
            z = z - lr * h * y
            return (1 - rule.beta) * z + rule.beta * ((1 - c) * x + c * z), z
        return torch.linalg.eigvals(torch.tensor([step(1., 0.), step(0., 1.)], dtype=DOUBLE).T)
    if edge == float("inf"): return
    assert multipliers(.999 * edge).abs().max() < 1 + 1e-9 and multipliers(1.001 * edge).abs().max() > 1
    close(multipliers(edge).real.min(), -1, 1e-9)


@pytest.mark.parametrize("words", [{}, dict(weight_decay=2.), dict(beta3=.95, alpha=40.), dict(beta1=0., beta3=.5, alpha=3., weight_decay=1.), dict(beta1=.99, beta3=.6, alpha=.5)], ids=str)
def test_ademamix_diverges_above_its_threshold_and_not_below(words):
    "Its own steps down a parabola, with an ε beside which its second moment is nothing; 10⁴ steps after its start, and the rate bisected."
    eps = 1e6
    def grows(share):
        rule = AdEMAMix(.01, eps=eps, **words)
        lam = share * metric_of(*at(rule, 1.)).threshold * eps
        bowl, stepper, state = at(rule, lam)
        blocks, inner = {"theta": state.theta}, state.rule
        return any((blocks := (after := rule.step(inner, blocks, {"theta": lam * blocks["theta"]}))[0])["theta"].abs() > 1e-9 or not (inner := after[1]) for _ in range(1500))
    def at(rule, lam):
        zeros, theta = {"theta": torch.zeros(1, dtype=DOUBLE)}, torch.full((1,), 1e-12, dtype=DOUBLE)
        moments = rule.init({"theta": theta}, {})._replace(step=10 ** 4, exp_avg=zeros, exp_avg_slow=zeros, exp_avg_sq=zeros)
        bowl = Quadratic(torch.eye(1, dtype=DOUBLE) * lam)
        return bowl, Descent(rule), State(10 ** 4, theta, moments, grad=lam * theta, loss=theta[0])
    low, high = .5, 2.
    for _ in range(6):
        mid = (low * high) ** .5
        low, high = (low, mid) if grows(mid) else (mid, high)
    assert low <= 1.01 and high >= .99, (low, high)


def test_no_pair_of_ademamixs_multipliers_leaves_first():
    "Its three numbers a coordinate written out as a matrix, at random β₁, β₃, α and decay."
    gen = np.random.default_rng(0)
    for _ in range(300):
        beta1, beta3, (w1, w3), rho = gen.uniform(0, 1), gen.uniform(0, 1), 10 ** gen.uniform(-3, 2, 2), gen.uniform(.2, 1)
        edge = (1 + rho) / (w1 / (1 + beta1) + w3 / (1 + beta3))
        def radius(x):
            means = np.array([[0, beta1, 0], [0, 0, beta3]])
            means[:, 0] = x
            return abs(np.linalg.eigvals(np.stack([[rho, 0, 0] - w1 * means[0] - w3 * means[1], *means]))).max()
        assert all(radius(edge * share) < 1 for share in (.01, .1, .5, .9, .999)) and radius(1.001 * edge) > 1


@pytest.mark.parametrize("rule", [Shampoo(.05, eps=.1), Shampoo(.05), SOAP(.01, every=1), Prodigy(d0=.01), ScheduleFreeAdamW(.01), AdEMAMix(.01), Muon(.01)], ids=repr)
def test_the_radius_of_newer_rules_is_a_number(rule):
    problem = small(bias=not isinstance(rule, Muon))
    stepper, state = prepared(problem, rule)
    found = update_radius(problem, stepper, state, tol=1e-2, max_products=20)
    assert found.radius > .5 and found.flip <= found.radius


# Every registered rule, at a rate s and with an ε beside which its second moments are nothing, so that its metric stands still; decay takes a share .3 of θ.
LARGE = 1e3
ADAM, DECAY = dict(eps=LARGE), lambda s: dict(eps=LARGE, weight_decay=.3 / s)
AT_RATE = {
    "adam": lambda s: Adam(s, **ADAM), "ademamix": lambda s: AdEMAMix(s, beta3=.9, **DECAY(s)), "torch": lambda s: FromTorch(torch.optim.AdamW, lr=s, **DECAY(s)),
    "gd": GD, "momentum": lambda s: Momentum(s, nesterov=True), "rmsprop": lambda s: RMSProp(s, **ADAM), "kfac": lambda s: KFAC(s, .5, damping=1., clip=None),
    "groups": lambda s: Groups((("matrix", Scheduled(Momentum(s, .5), Piecewise(((1, .5),)))), ("*", Adam(3 * LARGE * s, **ADAM)))),
    "prodigy": lambda s: Prodigy(s, d0=1., coef=0., **DECAY(s)), "schedulefreesgd": lambda s: ScheduleFreeSGD(s, weight_decay=.1),
    "schedulefreeadamw": lambda s: ScheduleFreeAdamW(s, weight_decay=.01, **ADAM), "shampoo": lambda s: Shampoo(s, .5, nesterov=True, **DECAY(s)), "soap": lambda s: SOAP(s, **DECAY(s)),
    **{name: lambda s: AutomaticGradientDescent(s) for name in ("agd", "automaticgradientdescent")},
    **{name: lambda s, name=name: REGISTRY[name](lr=s, adapt="none", **DECAY(s)) for name in REGISTERED if name.startswith("lamb")},
    **{name: lambda s, name=name: REGISTRY[name](lr=s, adapt="decayed", weight_decay=0., beta=.7) for name in REGISTERED if name.startswith("lars")},
    **{name: lambda s, name=name: REGISTRY[name](lr=s, **DECAY(s)) for name in REGISTERED if name.startswith("sophia")},
}
NO_METRIC = {"signum": Signum(.01), "lion": Lion(.01), "muon": Muon(.01), "muon-torch": Muon.torch(.01), "steepestdescent": SteepestDescent(.01)}


def test_every_rule_diverges_above_its_threshold_and_not_below_or_says_what_stands_in():
    "Its own steps down a quadratic, a linear regression's, from near the minimum: they shrink at 0.97 of the rate that the threshold gives, and grow at 1.03."
    gen = Stream(8).generator()
    x, y, steps = torch.randn(20, 3, generator=gen, dtype=DOUBLE), torch.zeros(20, 2, dtype=DOUBLE), 120
    assert AT_RATE.keys() | NO_METRIC.keys() == REGISTERED
    for name, build in AT_RATE.items():
        agd = name in ("agd", "automaticgradientdescent")            # moves matrices, and loses numbers much below 1
        problem = Problem(torch.nn.Sequential(torch.nn.Linear(3, 2, bias=not agd)).double(), "mse", Dataset(x, y, x, y, None, "zero"))
        theta, H = (1e-6 if agd else 1e-25) * torch.randn(problem.p, generator=gen, dtype=DOUBLE), dense_hessian(problem, problem.theta0)
        def run(s):
            "Sharpness over threshold at the end, and how much the largest distance has grown within 40 steps."
            stepper = Descent(build(s))
            first = next(trajectory(problem, stepper, theta))
            blocks, inner, far = problem.layout.named(first.theta), first.rule, []
            for _ in range(steps):
                blocks, inner = stepper.rule.step(inner, blocks, problem.layout.named(H @ problem.layout.join(blocks.values())))
                far.append(problem.layout.join(blocks.values()).abs().max().item())
            here = problem.layout.join(blocks.values())
            state = State(steps, here, inner, grad=H @ here, loss=here[0])
            metric = metric_of(problem, stepper, state)
            sharp = preconditioned_sharpness(problem.at(here), metric, tol=1e-8).values[0].item()
            return sharp / metric.threshold, max(far[-20:]) / max(far[-60:-40])
        s = 1e-3 / run(1e-3)[0]
        (below, shrinks), (_, grows) = run(.97 * s), run(1.03 * s)
        assert abs(below - .97) < 1e-4 and shrinks < 1 < grows, (name, s, below, shrinks, grows)
    for name, rule in NO_METRIC.items():
        problem = small(bias=False)
        stepper, state = prepared(problem, rule)
        with pytest.raises(TypeError, match=f"{type(rule).__name__} has no metric .*(update_radius|generalized_sharpness)"): metric_of(problem, stepper, state)
    for rule in (Signum(.01, weight_decay=.1), Lion(.01)):
        flips = [update_radius(problem, *prepared(problem, replace(rule, lr=lr)), max_products=20).radius for lr in (.01, 1e3 if not rule.weight_decay else .02)]
        close(flips, [1 - lr * rule.weight_decay for lr in (.01, .02)], 1e-9)


def test_half_precision_inside_a_step_has_no_part_in_its_derivative():
    "torch's Muon, which rounds to bfloat16 and loses derivatives on the way, and ours that rounds likewise, against ours in double precision."
    problem, exact, torchs = small(bias=False), Muon.torch(.02, precision="own"), FromTorch(torch.optim.Muon, lr=.02)
    state = next(islice(trajectory(problem, Descent(exact)), 3, None))
    held = torchs.init(problem.layout.named(state.theta), {}).optimizer | {"state": {i: {"momentum_buffer": v} for i, v in enumerate(state.rule.momentum.values())}}
    radius = lambda moves, **more: update_radius(problem, Descent(moves), state._replace(**more), tol=1e-4)[:4:2]
    for other in (radius(Muon.torch(.02)), radius(torchs, rule=TorchState(held))): close(other, radius(exact), 2e-4)


def test_a_rule_of_ones_own_has_a_metric_once_filed():
    @dataclass(frozen=True)
    class Halved(Rule):
        lr: float
        def step(self, state, blocks, grads): return {n: b - self.lr / 2 * grads[n] for n, b in blocks.items()}, state

    problem = small()
    stepper, state = prepared(problem, Halved(.1))
    with pytest.raises(TypeError, match="Halved has no metric"): metric_of(problem, stepper, state)
    METRICS["Halved"] = lambda rule, state, blocks, grads: (threshold(rule.lr), {n: torch.tensor(.5) for n in blocks}, {})
    try: found = preconditioned_sharpness(problem.at(state.theta), metric_of(problem, stepper, state), tol=1e-9)
    finally: del METRICS["Halved"]
    close(found.values[0], torch.linalg.eigvalsh(dense_hessian(problem, state.theta))[-1] / 2, 1e-6)


# --- in other norms ---

def boxed(H):
    "max dᵀHd over |d| ≤ 1 by all choices of what is at 1, at −1 and inside, where the derivative is zero."
    best = 0.
    for at in itertools.product((-1., 0., 1.), repeat=len(H)):
        d = torch.tensor(at, dtype=DOUBLE)
        inside = d == 0
        if inside.any(): d[inside] = torch.linalg.lstsq(H[inside][:, inside], -H[inside][:, ~inside] @ d[~inside], driver="gelsd").solution if (~inside).any() else 0.
        if d.abs().max() <= 1 + 1e-12: best = max(best, float(d @ H @ d))
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["positive", "indefinite", "negative", "one", "half"])
def test_generalized_sharpness_against_all_vertices(kind, seed):
    "In ℓ∞ with five coordinates, where nothing is missed; positive ones with twelve against all vectors of signs."
    gen = torch.Generator().manual_seed(seed)
    p = 12 if kind in ("positive", "one") else 5
    A = torch.randn(p, 1 if kind == "one" else p, generator=gen, dtype=DOUBLE)
    H = A @ A.T if kind in ("positive", "one") else -A @ A.T if kind == "negative" else (A + A.T) / 2
    if kind == "half": H[0], H[:, 0] = 0., 0.
    if p == 12: exact = (torch.tensor(list(itertools.product((-1., 1.), repeat=p)), dtype=DOUBLE) @ A).square().sum(1).max().item()
    else: exact = boxed(H)
    bowl = Quadratic(H)
    found = generalized_sharpness(bowl.at(bowl.theta0), "linf")
    assert found.low <= exact * (1 + 1e-9) + 1e-12 and exact <= found.high * (1 + 1e-9) + 1e-12
    assert found.low >= .9 * exact - 1e-12 and found.high <= 1.8 * exact + 1e-3 * H.abs().max() and found.direction.abs().max() <= 1 + 1e-12
    close(found.direction @ H @ found.direction if exact else 0., found.low, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (6,), (3, 2, 2, 2)])
def test_ball_of_the_spectral_norm_against_a_decomposition(shape, dtype):
    "Of full rank, of rank 1, of singular values over eleven decades, of any size, and none."
    gen = torch.Generator().manual_seed(0)
    full = torch.randn(shape, generator=gen, dtype=DOUBLE)
    U, S, V = torch.linalg.svd(full.reshape(len(full), -1), full_matrices=False)
    steep = U * torch.logspace(0, -11, len(S), dtype=DOUBLE) @ V
    for g, exact in ((full, U @ V), (U[:, :1] @ V[:1], U[:, :1] @ V[:1]), (steep, None), (full * 1e-30, U @ V), (full * 1e30, U @ V)):
        g = g.reshape(shape).to(dtype)
        (far,), (size,) = (x.values() for x in ball("spectral", {"W": g}))
        M, F = g.double().reshape(len(full), -1), far.double().reshape(len(full), -1)
        close(size.double() / M.abs().max(), torch.linalg.svdvals(M / M.abs().max()).sum(), 1e-6)
        close((F * (M / M.abs().max())).sum(), size.double() / M.abs().max(), 1e-4)
        assert torch.linalg.matrix_norm(F, 2) <= 1 + 4e-6 and far.dtype == dtype
        if exact is not None: assert (F - exact).abs().max() < 2e-3
    assert not any(x.any() for found in ball("spectral", {"W": torch.zeros(shape, dtype=dtype)}) for x in found.values())


def one_example():
    "A network that fits its one example: its Hessian is ∇f∇fᵀ, and ∇f."
    gen = Stream(4).generator()
    x = torch.randn(1, 5, generator=gen).double()
    net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=gen, dtype=DOUBLE) / 2
    f = net(x)
    grads = torch.autograd.grad(f.sum(), net.parameters())
    return Problem(net, "mse", Dataset(x, f.detach(), x, f.detach(), None, "random")), grads


@pytest.mark.parametrize("units", [None, {"0.weight": 2., "2.bias": .5}], ids=["one", "units"])
@pytest.mark.parametrize("norm", NORMS)
def test_generalized_sharpness_of_one_direction_is_its_dual_norm(norm, units):
    problem, grads = one_example()
    one = {"linf": lambda g: g.abs().sum(), "l2": torch.Tensor.norm, "spectral": lambda g: torch.linalg.svdvals(g.reshape(len(g), -1)).sum()}[norm]
    size = sum(one(g) * (units or {}).get(n, 1.) for n, g in zip(problem.layout.names, grads))
    found = generalized_sharpness(problem.at(problem.theta0), norm, units)
    close(found.low, size ** 2, 1e-6)
    assert found.low * (1 - 1e-9) <= found.high <= 1.05 * found.low


@pytest.mark.parametrize("norm, shape", [("spectral", (4, 7)), ("spectral", (7, 4)), ("l2", (4, 7)), ("linf", (4, 3))])
def test_generalized_sharpness_of_linear_regression(norm, shape):
    "H = I ⊗ C for the outputs: the sum of its leading eigenvalues, its largest, C times the largest form of signs."
    gen = Stream(4).generator()
    out, wide = shape
    x, y = torch.randn(40, wide, generator=gen).double() * torch.arange(1., wide + 1).double(), torch.randn(40, out, generator=gen).double()
    problem = Problem(torch.nn.Linear(wide, out, bias=False).double(), "mse", Dataset(x, y, x, y, None, "random"))
    C = dense_hessian(problem, problem.theta0)[:wide, :wide]
    values = torch.linalg.eigvalsh(C).flip(0)
    signs = torch.tensor(list(itertools.product((-1., 1.), repeat=wide)), dtype=DOUBLE)
    exact = {"spectral": values[:out].sum(), "l2": values[0], "linf": out * ((signs @ C) * signs).sum(1).max()}[norm].item()
    found = generalized_sharpness(problem.at(problem.theta0), norm, tol=1e-5, max_steps=200)
    assert .98 * exact <= found.low <= exact * (1 + 1e-9) and exact <= found.high * (1 + 1e-9) <= 1.8 * exact


@pytest.mark.parametrize("norm", NORMS)
def test_no_direction_of_the_ball_is_sharper_than_the_bound(norm):
    "A network with its negative curvature, at random points of the ball and at the best of an earlier look."
    problem = small()
    point, layout = problem.at(problem.theta0), problem.layout
    found = generalized_sharpness(point, norm)
    again = generalized_sharpness(point, norm, warm=found.direction, stream=Stream(7))
    H, gen = dense_hessian(problem, problem.theta0), torch.Generator().manual_seed(0)
    for _ in range(300):
        d = layout.join(ball(norm, layout.named(torch.randn(problem.p, generator=gen, dtype=DOUBLE)))[0].values())
        assert d @ H @ d <= found.low * (1 + 1e-9)
    assert found.low * (1 - 1e-9) <= again.low <= found.high and again.products < found.products
    close(generalized_sharpness(problem.at(problem.theta0), norm).low, found.low, 1e-12)
    later = generalized_sharpness(problem.at(problem.theta0 * 1.01), norm, warm=found)
    H, dense = dense_hessian(problem, problem.theta0 * 1.01), generalized_sharpness(problem.at(problem.theta0 * 1.01), norm, starts=8, tol=1e-5)
    close(later.direction @ H @ later.direction, later.low, 1e-9)
    assert dense.low <= later.high * (1 + 1e-9) and later.low >= .95 * dense.low and later.products <= found.products


@pytest.mark.parametrize("norm", NORMS)
def test_a_look_at_a_norm_costs_three_of_sharpness(norm):
    "In products, the first and those along a run; the bounds of every look hold each other."
    digits = load_dataset("digits-200").to(dtype=DOUBLE)
    problem = Problem(build_model("fc-tanh:width=20,depth=2", digits), "mse", digits)
    warm, sketch, spent = None, None, []
    for state in islice(trajectory(problem, Descent(Signum(1e-3, 0.))), 0, 61, 20):
        point = problem.at(state.theta)
        eigs = sharpness(point, warm=sketch)
        found = generalized_sharpness(point, norm, warm=warm)
        assert found.low <= found.high * (1 + 1e-12) and found.low >= eigs.values[0].item() * .99
        spent.append((found.products, eigs.matvecs))
        warm, sketch = found, eigs.sketch
    assert all(a <= ceil(2.6 * b) <= 3 * b for a, b in spent), spent


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_warm_looks_enclose_what_a_matrix_becomes(norm, seed):
    "All vectors of signs, and the largest eigenvalue: along a drift, after a direction from nowhere, where nothing is curved upwards any more, and back."
    gen, p = torch.Generator().manual_seed(seed), 9
    A, B = torch.randn(2, p, 4, generator=gen, dtype=DOUBLE)
    new = 3 * torch.linalg.qr(torch.cat([A, torch.randn(p, 1, generator=gen, dtype=DOUBLE)], 1)).Q[:, -1:]
    signs, found = torch.tensor(list(itertools.product((-1., 1.), repeat=p)), dtype=DOUBLE), None
    for factor in (A, A + .03 * B, A + .06 * B, torch.cat([A, new], 1), None, A):
        H = -A @ A.T if factor is None else factor @ factor.T
        exact = 0. if factor is None else ((signs @ factor).square().sum(1).max() if norm == "linf" else torch.linalg.eigvalsh(H)[-1]).item()
        bowl = Quadratic(H)
        found = generalized_sharpness(bowl.at(bowl.theta0 + torch.randn(p, generator=gen, dtype=DOUBLE)), norm, warm=found)
        assert found.low <= exact * (1 + 1e-9) + 1e-12 and exact <= found.high * (1 + 1e-9) and found.high <= 1.6 * exact + 1e-2 * torch.linalg.matrix_norm(H, 2)


@pytest.mark.parametrize("most", [2, 2.5, 8])
@pytest.mark.parametrize("norm", NORMS)
def test_a_look_at_a_norm_spends_no_more_than_it_may(norm, most):
    problem = small()
    point = problem.at(problem.theta0)
    found, eigs = generalized_sharpness(point, norm, most=most), sharpness(point)
    assert eigs.matvecs < found.products <= ceil(most * eigs.matvecs) and 0 < found.low <= found.high <= (eigs.values + eigs.errors).item() * problem.p
    with pytest.raises(ValueError, match="most=1"): generalized_sharpness(point, norm, most=1)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_descent_below_the_threshold_lowers_a_quadratic_and_above_does_not(norm):
    "A matrix and a vector, along 30 steps; above it the steepest direction itself goes up."
    gen, A = torch.Generator().manual_seed(0), None
    net = torch.nn.Linear(4, 3).double()
    x, y = torch.randn(30, 4, generator=gen).double(), torch.randn(30, 3, generator=gen).double()
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=gen, dtype=DOUBLE)
    problem = Problem(net, "mse", Dataset(x, y, x, y, None, "random"))
    found = generalized_sharpness(problem.at(problem.theta0), norm, tol=1e-6, max_steps=200)
    losses = [problem.loss(s.theta).item() for s in islice(trajectory(problem, Descent(SteepestDescent(2 / found.high, norm))), 30)]
    assert all(b < a for a, b in zip(losses, losses[1:]))
    least = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1, dtype=DOUBLE)], 1), y).solution
    best = torch.cat([least[:-1].T.reshape(-1), least[-1]])
    up = best + .1 * found.direction
    after = next(islice(trajectory(problem, Descent(SteepestDescent(2.2 / found.low, norm)), up), 1, None)).theta
    assert problem.loss(after) > problem.loss(up)


@pytest.mark.parametrize("seed", range(5))
def test_a_sign_step_below_the_threshold_lowers_a_quadratic(seed):
    gen = torch.Generator().manual_seed(seed)
    A = torch.randn(8, 8, generator=gen, dtype=DOUBLE)
    bowl = Quadratic((A + A.T) / 2 + torch.eye(8, dtype=DOUBLE))
    theta = torch.randn(8, generator=gen, dtype=DOUBLE)
    point = bowl.at(theta)
    lr = 2 * dual_norm(point, "linf") / generalized_sharpness(point, "linf").high
    assert dual_norm(point, "linf") == pytest.approx((bowl.H @ theta).abs().sum().item())
    for share in (.999, .5, .01):
        after = next(islice(trajectory(bowl, Descent(Signum(share * lr, 0.)), theta), 1, None)).theta
        assert bowl.loss(after) < bowl.loss(theta)


def test_the_probe_of_a_norm():
    problem = small(bias=False)
    words = [f"generalized_sharpness:norm={n},every=2" for n in NORMS]
    _, traces = train(problem, Descent(Muon(.02, 0., nesterov=False, scale="spectral")), 4, words, progress=False)
    rows = {n: traces[f"{n}_sharpness"].columns for n in NORMS}
    assert all((rows[n]["low"] <= rows[n]["high"]).all() for n in NORMS) and (rows["linf"]["threshold"] != rows["linf"]["threshold"]).all()
    g = problem.layout.named(problem.grad_and_loss(problem.theta0)[0])
    size = sum((b.shape[0] / b.shape[1]) ** .5 * torch.linalg.svdvals(b).sum().item() for b in g.values())
    assert rows["spectral"]["dual"][0] == pytest.approx(size) and rows["spectral"]["threshold"][0] == pytest.approx(2 * size / .02)
    @dataclass(frozen=True)
    class Own(Rule):
        lr: float
        norm = "linf"
        def step(self, state, blocks, grads): return {n: b - self.lr * grads[n].sign() for n, b in blocks.items()}, state
    for rule in (Own(.02), Signum(.02, 0.)):
        found = train(problem, Descent(rule), 2, "generalized_sharpness:every=2", progress=False)[1]["linf_sharpness"].columns
        assert found["threshold"][0] == pytest.approx(2 * sum(b.abs().sum().item() for b in g.values()) / .02)
    for name in NORMS:
        found = train(problem, Descent(SteepestDescent(.001, name)), 2, f"generalized_sharpness:every=2,norm={name}", progress=False)[1][f"{name}_sharpness"].columns
        assert found["threshold"][0] == pytest.approx(2000)
    with pytest.raises(ValueError, match="Did you mean 'linf'"): PROBES.build("generalized_sharpness:norm=lnf")
    with pytest.raises(ValueError, match="probe 'generalized_sharpness'.*most=1"): PROBES.build("generalized_sharpness:most=1")
    for most in (2., 6.):
        point, found = problem.at(problem.theta0), train(problem, Descent(Signum(.02, 0.)), 1, f"generalized_sharpness:most={most}", progress=False)[1]["linf_sharpness"].columns
        assert sharpness(point).matvecs < found["products"][0] <= ceil(most * sharpness(point).matvecs)
    with pytest.raises(TypeError, match="takes a point, problem.at"): generalized_sharpness(problem, "linf")


@pytest.mark.slow
def test_the_probe_of_a_norm_keeps_the_laws(): check_probe(PROBES.build("generalized_sharpness:every=5"), small(), Descent(Signum(.01)))


# --- along directions -----------------------------------------------------------------------------------------------

def test_directional_and_batch_measures_against_dense_hessians():
    problem = small()
    theta, batches = problem.theta0, [draw(MiniBatch(4), (), problem, Stream(7) / i) for i in range(60)]
    point, H = problem.at(theta), dense_hessian(problem, theta)
    g = point.grad
    close(directional_sharpness(point), g @ H @ g / (g @ g), 1e-9)
    gs = torch.stack([problem.grad_and_loss(theta, b)[0] for b in batches])
    own = [gb @ problem.hvp(theta, torch.eye(problem.p, dtype=DOUBLE), b) @ gb / (gb @ gb) for gb, b in zip(gs, batches)]
    found = batch_sharpness(problem, theta, batches)
    close(found.value, torch.stack(own).mean(), 1e-9)
    S = gs.T @ gs / len(gs)
    both = interaction_sharpness(point, batches)
    close(both.sharpness.value, (H @ S).trace() / S.trace(), 1e-9)
    close(both.edge.value * both.ratio.value, both.sharpness.value, 1e-9)


def test_intervals_of_batch_sharpness_cover():
    problem = small()
    truth = batch_sharpness(problem, problem.theta0, (draw(MiniBatch(3), (), problem, Stream(0) / i) for i in range(1000))).value
    hits = sum(truth in batch_sharpness(problem, problem.theta0, (draw(MiniBatch(3), (), problem, Stream(1) / s / i) for i in range(30)))
               for s in range(40))
    assert hits >= 33                                      # 38 expected, 33 is 3.6 standard deviations below
    a, b = torch.tensor([1., 2., 4.], dtype=DOUBLE), torch.tensor([2., 3., 7.], dtype=DOUBLE)
    close(ratio_of_means(a, b).value, 7 / 12, 1e-12)


@pytest.mark.parametrize("lr", [1e-4, .05, 30.])
def test_the_critical_rate_is_where_the_loss_is_as_before(lr):
    problem = small()
    point = problem.at(problem.theta0)
    found = critical_sharpness(point, -lr * point.grad, lr)
    assert found.low <= found.value <= found.high <= found.low * 1.021 and found.evaluations <= 14
    for eta, rises in ((2 / found.low, True), (2 / found.high, False)):
        assert (problem.loss(problem.theta0 - eta * point.grad) > point.loss).item() is rises
    warm = critical_sharpness(point, -lr * point.grad, lr, guess=found.multiple)
    assert warm.evaluations <= 5 and warm.low <= found.high and found.low <= warm.high


def test_a_critical_sharpness_along_a_run_costs_about_three_gradients():
    "Forward passes, of 0.54 gradients each, counted from outside."
    problem = small()
    loss, calls = problem.loss, 0

    def counted(*args):
        nonlocal calls
        calls += 1
        return loss(*args)
    problem.loss = counted
    _, traces = train(problem, Descent(Momentum(.1)), 60, [PROBES.build("critical_sharpness:every=2")], progress=False)
    told = traces["critical_sharpness"].columns["evaluations"]
    assert told.sum() == calls and .54 * told[1:].mean() < 3.3


@pytest.mark.parametrize("words, why", [
    ("sharpness:k=0", "1 ≤ k < inf, got k=0"), ("sharpness:tol=0", "1e-15 ≤ tol < 1, got tol=0"), ("sharpness:which=top", "'magnitude'; got 'top'"),
    ("stabilization:tol=-1", "got tol=-1"), ("preconditioned_sharpness:tol=nan", "got tol=nan"), ("update_radius:products=1", "2 ≤ products"),
    ("critical_sharpness:tol=0", "got tol=0"), ("batch_sharpness:draws=1", "2 ≤ draws"), ("interaction_sharpness:draws=1", "2 ≤ draws"),
    ("spectrum:draws=1", "2 ≤ draws"), ("spectrum:steps=0", "1 ≤ steps"), ("iterates:size=0", "1 ≤ size")])
def test_bad_arguments_are_refused_before_a_run(words, why):
    with pytest.raises(ValueError, match=why): PROBES.build(words)


def test_sharpness_of_the_first_examples_only():
    problem, first = small(), 7
    stepper, state = prepared(problem, GD(.1))
    row = PROBES.build(f"sharpness:examples={first},tol=1e-9").measure(View(problem, stepper, state))
    H = problem.hvp(state.theta, torch.eye(problem.p, dtype=DOUBLE), Batch(torch.arange(first)))
    close(row["value"], torch.linalg.eigvalsh(H)[-1], 1e-8)
    row = PROBES.build(f"sharpness:examples={first},tol=1e-9,which=smallest,k=2").measure(View(problem, stepper, state))
    close(row["value"], torch.linalg.eigvalsh(H)[:2], 1e-8)
