"""Flatness: dense Hessians, closed forms and other libraries; invariance; costs; nothing is written; bad input."""
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from gradnb.data import load_dataset
from gradnb.data.dataset import Dataset
from gradnb.move.estimators.minibatch import MiniBatch
from gradnb.measure.flatness.audit import AUDITED, invariance_audit
from gradnb.measure.flatness.ball import Ball, worst
from gradnb.measure.flatness.centre import MEASURES, Centre, logit_normalised, measure_flatness
from gradnb.measure.flatness.directions import filter_normalised
from gradnb.measure.flatness.keskar import keskar_sharpness
from gradnb.measure.flatness.landscape import Plane, filter_plane, interpolate, iterates_plane, surface
from gradnb.measure.flatness.reparametrise import TRANSFORMS, alpha_rescale, hidden_layers, layer_rescale, rescale_units
from gradnb.models import build_model
from gradnb.measure.probes.view import PROBES
from gradnb.problem import Problem, Quadratic
from gradnb.ground.roles import Batch
from gradnb.move.rules.gd import GD
from gradnb.runs import Spec, Store
from gradnb.move.steppers import Descent
from gradnb.ground.streams import Stream
from gradnb.runs.training import train

F64 = torch.float64


def gaussian(n=60, d=10, classes=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=g, dtype=F64)
    y = (x @ torch.randn(d, classes, generator=g, dtype=F64)).argmax(1)
    return Dataset(x, y, x, y, classes, "gaussian")


def trained(model="fc:width=20,depth=2", steps=200, loss="ce"):
    "A network near a minimum, in float64."
    data = gaussian()
    problem = Problem(build_model(model, data), loss, data)
    theta = problem.theta0
    for _ in range(steps):
        theta = theta - .5 * problem.grad_and_loss(theta)[0]
    return problem, theta


@pytest.fixture(scope="module")
def near():
    return trained()


@pytest.fixture(scope="module")
def dense(near):
    problem, theta = near
    return problem.hvp(theta, torch.eye(problem.p, dtype=F64))


def take(problem, theta, word, seed=0, batch=None):
    return MEASURES.build(word, Centre(problem, theta, batch, Stream(seed) / "flatness"))


# --- oracles ------------------------------------------------------------------------------------------------

def exact_values(problem, theta, H):
    "Values of a dense Hessian, by measure."
    W = problem.layout.named(theta)
    last = W["out.weight"]
    Hs = H[-last.numel():, -last.numel():].reshape(*last.shape, *last.shape)
    return {"lambda_max:tol=1e-6": torch.linalg.eigvalsh(H)[-1], "trace:samples=400": H.trace(), "frobenius:samples=400": H.norm(),
            "trace:kind=adaptive,samples=400": (H.diagonal() * theta.square()).sum(),
            "relative_flatness:samples=400": torch.einsum("ij,kj,iaka->", last, last, Hs)}


def test_curvature_measures_are_those_of_the_dense_hessian(near, dense):
    for word, exact in exact_values(*near, dense).items():
        found = take(*near, word)
        wide = 1.5 * (found.high - found.low) / 2 + 1e-9       # 1.5 half-widths of 95 %: 3 in 1,000 fail, and the seed is fixed
        assert abs(found.value - exact.item()) <= wide, (word, exact, found)
        assert found.high - found.low < .8 * abs(exact), (word, found)


def test_coverage_of_the_intervals(near, dense):
    hits = [low <= dense.trace() <= high for low, high in
            ((r.low, r.high) for r in (take(*near, "trace:samples=12", seed) for seed in range(100)))]
    assert 88 <= sum(hits) <= 100


@pytest.mark.parametrize("norm", [2, math.inf])
def test_small_radius_agrees_with_second_order(near, dense, norm):
    "max gᵀd + ½dᵀHd over a tiny ball is ρ‖g‖ of the dual norm, to first order."
    problem, theta = near
    g = problem.grad_and_loss(theta)[0]
    for adaptive in (False, True):
        T, rho = theta.abs() if adaptive else torch.ones_like(theta), 1e-6
        first = rho * ((T * g).norm() if norm == 2 else (T * g).abs().sum())
        word = f"{'asam' if adaptive else 'sam'}:rho={rho},norm={'inf' if norm == math.inf else 2}"
        assert take(problem, theta, word).value == pytest.approx(first.item(), rel=1e-2)


def test_ascent_against_brute_force_on_quadratics():
    g = torch.Generator().manual_seed(3)
    A = torch.randn(8, 8, generator=g, dtype=F64)
    H = A @ A.T
    corners = torch.tensor(list(product((-1., 1.), repeat=8)), dtype=F64)
    c = Centre(Quadratic(H), torch.zeros(8, dtype=F64))
    box = worst(c, Ball(torch.ones(8, dtype=F64), math.inf), starts=32)
    assert box.loss == pytest.approx(.5 * ((corners @ H) * corners).sum(1).max().item()) and box.converged
    sphere = worst(c, Ball(torch.full((8,), .5, dtype=F64)), steps=400, tol=1e-8)
    assert sphere.loss == pytest.approx(.125 * torch.linalg.eigvalsh(H)[-1].item(), rel=1e-6)
    basis = torch.linalg.qr(torch.randn(8, 2, generator=g, dtype=F64)).Q          # a subspace
    inside = worst(c, Ball(torch.full((2,), .5, dtype=F64), 2, basis), steps=400, tol=1e-8)
    assert inside.loss == pytest.approx(.125 * torch.linalg.eigvalsh(basis.T @ H @ basis)[-1].item(), rel=1e-6)


def test_keskar_on_a_diagonal_bowl():
    h, w, eps = torch.tensor([5., 1., .01], dtype=F64), torch.tensor([0., -2., 1.], dtype=F64), .01
    L = .5 * (h * w**2).sum()
    top = .5 * (h * (w.abs() + eps * (w.abs() + 1))**2).sum()
    found = keskar_sharpness(Centre(Quadratic(torch.diag(h)), w), eps)
    assert found.value == pytest.approx((100 * (top - L) / (1 + L)).item(), rel=1e-9) and found.converged


@pytest.mark.parametrize("word", ["sam", "sam:norm=inf", "asam:eta=1"])
def test_an_ascent_without_a_slope_leaves_the_centre(word):
    "At a stationary point the first-order worst point is the centre itself; a search goes on from a random one."
    bowl, zero = Quadratic(torch.eye(4, dtype=F64)), torch.zeros(4, dtype=F64)
    rho, mark = .3, "," if ":" in word else ":"
    assert take(bowl, zero, f"{word}{mark}rho={rho}").value == 0
    found = take(bowl, zero, f"{word}{mark}rho={rho},steps=50")
    assert found.value == pytest.approx(.5 * rho**2 * (4 if "inf" in word else 1)) and found.converged


def test_ten_iterations_from_a_stationary_point_have_not_converged():
    c = Centre(Quadratic(torch.eye(3, dtype=F64)), torch.zeros(3, dtype=F64))
    found = keskar_sharpness(c, .01, protocol="keskar2017")
    assert found.value == 0 and not found.converged
    assert keskar_sharpness(c, .01).value == pytest.approx(100 * 1.5e-4)


def test_average_and_sigma_on_a_bowl():
    h, zero = torch.tensor([4., 2., .5], dtype=F64), torch.zeros(3, dtype=F64)
    bowl = Quadratic(torch.diag(h))
    found = take(bowl, zero, "average:rho=0.2,pairs=400")
    assert found.low < .02 * h.sum() < found.high
    sigma = take(bowl, zero, "pac_bayes:risk=loss,draws=300")
    assert sigma.low < math.sqrt(.2 / h.sum()) < sigma.high


def test_volume_of_a_round_bowl():
    n, h, eps = 5, 3., .2
    found = take(Quadratic(h * torch.eye(n, dtype=F64)), torch.zeros(n, dtype=F64), f"eps_volume:eps={eps}")
    r = math.sqrt(2 * eps / h)
    radius = take(Quadratic(h * torch.eye(n, dtype=F64)), torch.zeros(n, dtype=F64), f"eps_radius:eps={eps}")
    assert radius.low < r < radius.high < 1.005 * r                       # all rays alike: what is left is the bracket
    assert found.value == pytest.approx((math.pi**(n / 2) / math.gamma(n / 2 + 1) * r**n)**(1 / n), rel=1e-3)


@pytest.mark.parametrize("depth", [2, 3])
def test_fisher_rao_of_a_homogeneous_network(depth):
    problem, theta = trained(f"fc:width=8,depth={depth}", 20, "mse")
    out = problem.outputs(theta, problem.dataset.x)
    assert take(problem, theta, "fisher_rao").value == pytest.approx(depth**2 * out.square().sum(1).mean().item(), rel=1e-12)
    G = problem.example_grads(theta)
    assert take(problem, theta, "fisher_rao:labels=data").value == pytest.approx((G @ theta).square().mean().item(), rel=1e-10)


def test_logit_normalised_loss_forgets_the_scale_of_the_last_layer(near):
    problem, theta = near
    other = problem.layout.named(theta.clone())
    other["out.weight"] *= 7
    assert logit_normalised(problem).loss(problem.layout.join(other.values())) == pytest.approx(logit_normalised(problem).loss(theta).item(), rel=1e-12)


def test_pyhessian_agrees(near, dense):
    pyhessian = pytest.importorskip("pyhessian", reason="pip install 'gradnb[bench]'")
    data = gaussian()
    net = build_model("fc:width=20,depth=2", data)
    problem, theta = near
    with torch.no_grad():
        for p, v in zip(net.parameters(), problem.layout.split(theta)): p.copy_(v)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        theirs = pyhessian.hessian(net, nn.CrossEntropyLoss(), data=(data.x, data.y), cuda=False)
        top, forms = theirs.eigenvalues(tol=1e-6, maxIter=500)[0][0], torch.tensor(theirs.trace(maxIter=200, tol=0.))
    finally: torch.set_rng_state(state)
    assert take(problem, theta, "lambda_max:tol=1e-6").value == pytest.approx(top, rel=1e-3)
    ours = take(problem, theta, "trace:samples=200")
    apart = math.hypot(forms.std().item() / len(forms)**.5, (ours.high - ours.low) / 3.9)
    assert abs(ours.value - forms.mean().item()) < 3 * apart < .5 * ours.value


def test_loss_landscapes_agrees(near):
    landscapes = pytest.importorskip("loss_landscapes", reason="pip install loss-landscapes")
    from loss_landscapes.metrics import Loss
    problem, theta = near
    nets = []
    for w in (problem.theta0, theta):
        net = build_model("fc:width=20,depth=2", gaussian())
        with torch.no_grad():
            for p, v in zip(net.parameters(), problem.layout.split(w)): p.copy_(v)
        nets.append(net)
    data = gaussian()
    theirs = landscapes.linear_interpolation(*nets, Loss(nn.CrossEntropyLoss(), data.x, data.y), steps=5)     # from 1/5 to 1
    ours = interpolate(problem, problem.theta0, theta, [(i + 1) / 5 for i in range(5)], progress=False)
    assert ours.loss.tolist() == pytest.approx(theirs.tolist(), rel=1e-6)
    from loss_landscapes.model_interface.model_parameters import ModelParameters
    like = lambda v: ModelParameters([b.clone() for b in problem.layout.split(v)])
    z = torch.randn(problem.p, generator=torch.Generator().manual_seed(0), dtype=F64)
    other = like(z)
    other.filter_normalize_(like(theta))
    assert torch.allclose(torch.cat([b.flatten() for b in other.parameters]), filter_normalised(problem.layout, theta, z), rtol=1e-12)


# --- reparametrisations -------------------------------------------------------------------------------------

def conv():
    data = load_dataset("digits-60")
    return Problem(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                 nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 10)).double(), "ce", data)


@pytest.mark.parametrize("word", ["alpha", "alpha:alpha=0.05", "filter", "filter:seed=3", "layers", "permute"])
@pytest.mark.parametrize("make", [conv, lambda: trained("fc-relu:width=9,depth=3", 5)[0]], ids=["conv", "biases"])
def test_the_function_is_unchanged(word, make):
    problem = make()
    moved = TRANSFORMS.build(word, problem, problem.theta0)
    change = problem.outputs(moved, problem.dataset.x) - problem.outputs(problem.theta0, problem.dataset.x)
    assert change.abs().max() <= 1e-12 and (moved - problem.theta0).norm() > .1


def test_dinh_hessian(near, dense):
    problem, theta = near
    moved = alpha_rescale(problem, theta, 20.)
    first = problem.layout.sizes[0]
    d = torch.cat([torch.full((first,), 20., dtype=F64), torch.full((problem.p - first,), 1 / 20, dtype=F64)])
    H = problem.hvp(moved, torch.eye(problem.p, dtype=F64))
    assert (H - dense / d[:, None] / d).norm() < 1e-11 * H.norm()


INVARIANT = {"asam", "asam:norm=inf,rho=0.05", "asam:steps=20", "average:kind=adaptive,rho=0.2", "eps_radius:kind=adaptive",
             "pac_bayes:kind=adaptive", "trace:kind=adaptive", "fisher_rao"}
LAYERWISE = {"average:kind=filter,rho=0.2", "eps_radius:kind=filter", "trace:kind=filter", "relative_flatness"}


def test_the_audit_tells_invariants_from_the_rest(near):
    frame = invariance_audit(*near).set_index(["measure", "transform"])
    for word in AUDITED:
        at = frame.loc[word]
        if word in INVARIANT: assert (at.verdict[["alpha", "filter", "layers"]] == "same").all(), word
        elif word in LAYERWISE: assert (at.verdict[["alpha", "layers"]] == "same").all() and at.verdict["filter"] == "moves", word
        else: assert abs(math.log2(at.ratio["alpha"])) > 1 and at.verdict["alpha"] == "moves", word
        assert at.verdict["permute"] in ("same", "agrees"), word
    same = frame[frame.verdict == "same"]
    assert ((same.ratio - 1).abs() < 1e-9).all()


def test_invariance_with_biases_and_three_layers():
    problem, theta = trained("fc-relu:width=8,depth=2", 60)
    frame = invariance_audit(problem, theta, sorted(INVARIANT), ("alpha:alpha=20", "alpha:alpha=0.05", "filter", "layers"))
    assert set(frame.verdict) == {"same"}


# --- nothing is written, everything is counted ----------------------------------------------------------------

@pytest.mark.parametrize("word", list(MEASURES))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_weights_buffers_and_torchs_generator_stay(word, dtype):
    data = load_dataset("digits-80")
    net = build_model("fc-bn-relu:width=6", data).to(dtype)
    problem = Problem(net, "ce", data)
    theta, before = problem.theta0.clone(), {k: v.clone() for k, v in net.state_dict().items()}
    rng = torch.get_rng_state()
    for at in (problem, problem.frozen()):
        found = take(at, theta, word, batch=Batch(torch.arange(50)))
        assert math.isfinite(found.value) and found.low <= found.value <= found.high and found.cost > 0
        assert found == take(at, theta, word, batch=Batch(torch.arange(50)))           # a function of its arguments
    assert torch.equal(theta, problem.theta0) and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_they_stay_after_an_exception():
    data = load_dataset("digits-80")
    net = build_model("fc-bn-relu:width=6", data)
    calls = None                       # counted once the problem is made
    def loss(outputs, targets):
        if calls is not None: calls.append(1)
        if calls and len(calls) > 1: raise RuntimeError("stop")
        return nn.functional.cross_entropy(outputs, targets, reduction="none")
    problem, calls = Problem(net, loss, data), []
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"): take(problem, problem.theta0, "keskar")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Counting:
    "A problem that counts passes by itself."
    def __init__(self, problem): self.problem, self.passes = problem, 0.
    def __getattr__(self, name): return getattr(self.problem, name)
    def share(self, batch): return 1 if batch is None else len(batch.idx) / self.problem.n
    def loss(self, theta, batch=None): self.passes += self.share(batch) / 3; return self.problem.loss(theta, batch)
    def grad_and_loss(self, theta, batch=None): self.passes += self.share(batch); return self.problem.grad_and_loss(theta, batch)


@pytest.mark.parametrize("word, most", [
    ("sam", 1.34), ("asam", 1.34), ("sam:m=20", 1.34), ("sam:steps=20", 21), ("keskar:protocol=keskar2017", 25), ("keskar", 60 + 3 * 30 + 25), ("average:pairs=8", 6),
    ("eps_radius:rays=4", 4 * 20 / 3 + 4)])
def test_costs_are_what_was_computed(near, word, most):
    problem, theta = near
    counting = Counting(problem)
    found = take(counting, theta, word)
    assert found.cost == pytest.approx(counting.passes) and found.cost <= most


def test_m_sharpness_is_a_mean_over_batches(near):
    problem, theta = near
    found = take(problem, theta, "sam:m=20")
    order = torch.randperm(60, generator=(Stream() / "flatness" / "parts").generator())
    rises = []
    for part in order.split(20):
        g, base = problem.grad_and_loss(theta, Batch(part))
        rises.append((problem.loss(theta + .05 * g / g.norm(), Batch(part)) - base).item())
    assert found.value == pytest.approx(sum(rises) / 3, rel=1e-10)


def test_augmentation_is_measured_only_where_the_batch_asks_for_it():
    data = replace(load_dataset("digits-80"), augment=lambda x, g: x + .3 * torch.randn(x.shape, generator=g, dtype=x.dtype))
    problem, noise = Problem(build_model("fc-relu:width=6", data).double(), "ce", data), Stream(3) / "pictures"
    some = torch.arange(40)
    plain, seen = Batch(some), Batch(some, noise=noise)
    for word in ("sam", "keskar:protocol=keskar2017", "trace:samples=4", "fisher_rao", "pac_bayes:draws=4"):
        first, second = take(problem, problem.theta0, word, batch=plain), take(problem, problem.theta0, word, batch=seen)
        assert first != second == take(problem, problem.theta0, word, batch=seen), word
        assert take(problem.frozen(), problem.theta0, word, batch=seen) == take(problem.frozen(), problem.theta0, word, batch=plain), word


def test_weights_of_examples_count(near):
    "A weight of 2 is the example twice."
    problem, theta = near
    twice, weighted = Batch(torch.tensor([0, 0, 1, 2])), Batch(torch.tensor([0, 1, 2]), torch.tensor([1.5, .75, .75], dtype=F64))
    for word in ("sam", "asam:steps=5", "trace:samples=4", "fisher_rao", "pac_bayes:draws=8,alpha=0.3", "pac_bayes:risk=loss,draws=8"):
        assert take(problem, theta, word, batch=weighted).value == pytest.approx(take(problem, theta, word, batch=twice).value, rel=1e-9), word


def test_chunks_change_nothing(near):
    problem, theta = near
    small = Problem(build_model("fc:width=20,depth=2", gaussian()), "ce", gaussian(), chunk_size=17)
    for word in ("sam", "keskar:iterations=10", "trace:samples=4", "fisher_rao", "pac_bayes:draws=3"):
        assert take(small, theta, word).value == pytest.approx(take(problem, theta, word).value, rel=1e-7), word


def test_float32_keeps_the_small_box():
    problem, theta = trained()
    single = Problem(build_model("fc:width=20,depth=2", gaussian()).float(), "ce", gaussian())
    for word in ("keskar:eps=1e-4", "sam", "lambda_max", "fisher_rao"):
        assert take(single, theta.float(), word).value == pytest.approx(take(problem, theta, word).value, rel=2e-2), word


# --- landscape and probes -------------------------------------------------------------------------------------

def test_surface_and_line(near):
    problem, theta = near
    plane = filter_plane(Centre(problem, theta))
    s = surface(problem, plane, (-1, 1), (-.5, .5), points=5, progress=False)
    for i, j in ((0, 0), (2, 2), (4, 1)):
        assert s.loss[i, j] == pytest.approx(problem.loss(plane.at(s.x[j].item(), s.y[i].item())).item(), rel=1e-12)
    line = interpolate(problem, problem.theta0, theta, [0, .5, 1, 2], progress=False)
    assert line.loss.iloc[3] == pytest.approx(problem.loss(2 * theta - problem.theta0).item(), rel=1e-10)
    assert line.accuracy.iloc[2] == pytest.approx(problem.evaluate(theta).accuracy)


def test_iterates_plane_holds_a_run_that_lies_in_it():
    g = torch.Generator().manual_seed(0)
    D, coords = torch.randn(2, 30, generator=g, dtype=F64), torch.randn(12, 2, generator=g, dtype=F64)
    thetas = torch.randn(30, generator=g, dtype=F64) + coords @ D
    plane = iterates_plane(thetas)
    back = torch.stack([plane.at(x, y) for x, y in plane.coordinates(thetas).tolist()])
    assert torch.allclose(back, thetas, atol=1e-10) and sum(plane.explained) == pytest.approx(1)


def test_probes_leave_the_run_alone_and_know_every_measure():
    data = load_dataset("digits-60")
    problem = Problem(build_model("fc-bn-relu:width=6", data), "ce", data)
    probes = [PROBES.build(f"flatness:measure={m},every=3") for m in MEASURES]
    state, traces = train(problem, Descent(GD(.1), MiniBatch(20)), 3, probes, progress=False)
    alone, _ = train(problem, Descent(GD(.1), MiniBatch(20)), 3, progress=False)
    assert torch.equal(state.theta, alone.theta)
    for m in MEASURES: assert set(traces[f"flatness_{m}"].columns) >= {"value", "low", "high", "converged", "cost"}


def test_a_stored_run_keeps_open_intervals(tmp_path):
    spec = Spec("digits-60", "fc-relu:width=6", "ce", GD(.1), 2, probes=("flatness:measure=keskar,protocol=keskar2017,every=2", "flatness:measure=sam,rho=0.1,every=1"))
    run = Store(tmp_path).run(spec, progress=False)
    columns = run.trace("flatness_keskar_protocol=keskar2017").columns
    assert columns["high"].tolist() == [math.inf] * 2 and (columns["low"] <= columns["value"]).all()
    assert len(run.trace("flatness_sam_rho=0.1")) == 3


# --- bad input --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("word, what", [
    ("keskar:eps=0", "eps must be a finite number above 0, got 0"), ("keskar:eps=-1", "got -1"), ("sam:rho=0", "rho must be"), ("asam:rho=-0.1", "rho must be"),
    ("average:rho=nan", "rho must be"), ("eps_radius:eps=0", "eps must be"), ("pac_bayes:alpha=0", "alpha must be"), ("sam:m=0", "m must be a whole number of at least 1, got 0"), ("sam:m=31", "m must be from 1 to half of the 60"),
    ("trace:kind=layer", "plain, adaptive, filter"), ("sam:norm=1", "norm must be 2 or inf"), ("keskar:protocol=2017", "converged, keskar2017"),
    ("average:pairs=1", "pairs must be a whole number of at least 2, got 1"), ("sam:steps=2.5", "steps must be a whole number"), ("keskar:subspace=2.5", "subspace must be"),
    ("eps_radius:rays=1", "rays must be"), ("trace:samples=1", "samples must be"), ("frobenius:samples=0", "samples must be"), ("asam:eta=-1", "eta must be"),
    ("relative_flatness:layer=fc9", "no weight block 'fc9'"), ("shrapness", "no flatness measure 'shrapness'"), ("sam:roh=1", "'roh'")])
def test_bad_measures_are_refused(near, word, what):
    with pytest.raises(ValueError, match=what.replace("(", r"\(")): take(*near, word)


def test_bad_centres_are_refused(near):
    problem, theta = near
    nan = theta.clone()
    nan[-1] = math.nan
    with pytest.raises(ValueError, match="theta is not finite in out.weight"): measure_flatness(problem, nan, "sam")
    for word in MEASURES:
        with pytest.raises(ValueError, match="the loss at the centre is"): measure_flatness(problem, theta * 1e200, word)
    with pytest.raises(ValueError, match="theta must have shape"): measure_flatness(problem, theta[:-1], "sam")
    with pytest.raises(ValueError, match="examples must be"): measure_flatness(problem, theta, "sam", Batch(torch.arange(0)))


@pytest.mark.parametrize("model", ["fc-tanh:width=6", "fc-bn-relu:width=6"])
def test_blocks_that_cannot_be_rescaled_are_named(model):
    data = load_dataset("digits-60")
    problem = Problem(build_model(model, data).double(), "ce", data)
    with pytest.raises(ValueError, match="'fc1.weight' and 'fc2.weight'"): alpha_rescale(problem, problem.theta0)
    with pytest.raises(ValueError, match="'fc1.weight' and 'fc2.weight'"): invariance_audit(problem, problem.theta0, "sam", "filter")


def test_bad_transformations_and_directions_are_refused(near):
    problem, theta = near
    with pytest.raises(ValueError, match="no hidden layer 'out.weight'; there are fc1.weight"): rescale_units(problem, theta, "out.weight")
    with pytest.raises(ValueError, match="scales of 'fc1.weight' must be 20"): alpha_rescale(problem, theta, 0.)
    with pytest.raises(ValueError, match="permutation of its 20 units"): rescale_units(problem, theta, order=torch.zeros(20, dtype=torch.int64))
    with pytest.raises(ValueError, match="product 1"): layer_rescale(problem, theta, (2., 2.))
    with pytest.raises(ValueError, match="needs a hidden layer"): hidden_layers(Quadratic(torch.eye(2)))
    with pytest.raises(ValueError, match=r"directions of shape \(2, 260\), got \(2, 5\)"):
        surface(problem, Plane(theta, torch.zeros(2, 5, dtype=F64)), progress=False)
    with pytest.raises(ValueError, match="do not span a plane"): iterates_plane(theta.expand(4, -1))
    with pytest.raises(ValueError, match="an iterate is not finite"): iterates_plane(theta * torch.tensor([[1.], [math.nan], [2.]], dtype=F64))
    with pytest.raises(ValueError, match="cannot hold weights"): Plane(theta, torch.eye(2, problem.p, dtype=F64)).coordinates(torch.zeros(3, 7))
    with pytest.raises(ValueError, match="the outputs at theta are not finite"): alpha_rescale(problem, theta * math.nan)
    with pytest.raises(ValueError, match="this problem has none"): filter_plane(Centre(Quadratic(torch.eye(2)), torch.ones(2)))


UNITS = {measure: 1 for measure in ("sam", "sam:norm=inf,rho=0.005", "sam:steps=6,starts=2", "sam:m=20", "asam", "asam:steps=6", "average:pairs=4",
         "average:kind=adaptive,pairs=4", "average:kind=filter,pairs=4", "lambda_max", "trace:samples=4", "trace:kind=adaptive,samples=4",
         "trace:kind=filter,samples=4", "frobenius:samples=6", "relative_flatness:samples=4", "fisher_rao")} | \
        {"fisher_rao:labels=data": 2, "eps_radius:rays=2,eps=": 0, "eps_volume:rays=2,eps=": 0, "pac_bayes:risk=loss,draws=4,alpha=": 0}


@pytest.mark.parametrize("dtype, k", [(torch.float32, -100), (torch.float32, 100), (torch.float64, -900), (torch.float64, 900)])
def test_a_measure_follows_the_units_of_the_loss(dtype, k):
    "A loss 2^k times as large is that much sharper, and as wide at a height that is 2^k times as large."
    digits, power = load_dataset("digits-40"), lambda k: 2.**(k // 2) * 2.**(k - k // 2)
    one_hot = lambda y: torch.nn.functional.one_hot(y, 10)
    def measured(k):
        problem = Problem(build_model("fc-tanh:width=5,depth=1", digits).to(dtype), lambda out, y: (out - one_hot(y)).square().sum(1) * power(k), digits)
        return measure_flatness(problem, problem.theta0, [m + repr(.1 * power(k)) * m.endswith("=") for m in UNITS])
    plain, scaled = measured(0), measured(k)
    assert {m.partition(":")[0] for m in UNITS} == {*MEASURES} - {"keskar"}        # which adds 1 to the loss
    for (measure, units), (_, one), (_, other) in zip(UNITS.items(), plain.iterrows(), scaled.iterrows(), strict=True):
        with np.errstate(all="ignore"): want = np.ldexp(one[["value", "low", "high"]].to_numpy(float), k * units)
        got = other[["value", "low", "high"]].to_numpy(float)
        np.testing.assert_allclose(got, want, rtol=2e-3 if dtype == torch.float32 else 1e-9, err_msg=measure)
        assert one.converged == other.converged or not np.isfinite(want[0])


@pytest.mark.parametrize("c", [2.**-200, 2.**150])
def test_a_measure_follows_the_units_of_the_weights(c):
    "Of a bowl whose weights are c times as large curvature is 1/c² as large, widths are c times as large, and what is relative to the weights is the same."
    H, theta = torch.tensor([[3., 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, .5], [0, 0, .5, 4]]).double(), torch.tensor([[1., -.5], [.7, .3]]).double()
    bowl, wide = Quadratic(H, theta0=theta), Quadratic(H / c / c, theta0=theta * c)
    for measure, scaled, units in (("lambda_max", "lambda_max", -2), ("trace", "trace", -2), ("frobenius", "frobenius", -2), ("asam", "asam", 0), ("fisher_rao:labels=data", "fisher_rao:labels=data", 0),
                                   ("trace:kind=adaptive", "trace:kind=adaptive", 0), ("trace:kind=filter", "trace:kind=filter", 0), ("relative_flatness", "relative_flatness", 0),
                                   ("average:kind=adaptive", "average:kind=adaptive", 0), ("average:kind=filter", "average:kind=filter", 0), ("sam:rho=0.1", f"sam:rho={.1 * c!r}", 0),
                                   ("eps_radius:kind=filter", "eps_radius:kind=filter", 0)):
        one, other = (measure_flatness(p, p.theta0, m).iloc[0] for p, m in ((bowl, measure), (wide, scaled)))
        assert other.value == pytest.approx(one.value * c**units, rel=1e-9), measure
