"One law over all statistics: they follow the units of their draws, over the whole range of a dtype."
import math

import numpy as np
import pytest
import torch
from torch import nn

from gradnb import Problem, check_statistic
from gradnb.data import Dataset
from gradnb.ground.estimate import Estimate
from gradnb.ground.roles import ESTIMATORS, draw
from gradnb.ground.streams import Stream
from gradnb.move.estimators.svrg import optimal_alpha
from gradnb.problem.designs import exact_variance
from gradnb.measure import trajectories as paths
from gradnb.measure.noise import batchsize, comparing, coordinates, spread
from gradnb.measure.tail import controls, fit, noise, verdict
from gradnb.measure.tail.estimators import METHODS, compare_tails, tail_index
from gradnb.measure.tail.magnitudes import TailRefusal
from gradnb.measure.tail.sketch import TailSketch
from gradnb.measure.tail.stable import stable_sample

stream, one = Stream(0) / "controls", Estimate.normal(3., .1)
halves = lambda x: (x[:200], x[200:])


def sketched(x):
    sketch = TailSketch({"network": slice(None), "half": slice(0, 2)}, (1, 2, 4))
    for row in x: sketch.add(row)
    return tuple(sketch.tail_index("half", method) for method in METHODS)


def crossing(x):
    rising = x[:, 0].abs().double().cummax(0).values
    return paths.first_crossing(np.arange(400), rising.numpy(), rising[-1].item() / 3, rising[-1].item() / 9)


STATISTICS = {
    "grad_variance": (spread.grad_variance, 2), "grad_norm_sq": (spread.grad_norm_sq, 2), "signal_to_noise": (spread.signal_to_noise, 0),
    "normalized_variance": (spread.normalized_variance, 0), "noise_scale": (spread.noise_scale, 0),
    "noise_scale of batches": (lambda x: spread.noise_scale(x, 5, 100), 0),
    "norm_test": (batchsize.norm_test, 0), "inner_product_test": (batchsize.inner_product_test, 0),
    "orthogonality_test": (batchsize.orthogonality_test, 0), "cabs": (lambda x: batchsize.cabs(x, torch.ones(len(x)), .1), 2),
    "bias": (lambda x: comparing.bias_check(*halves(x)).sq, 2), "distance": (lambda x: comparing.bias_check(*halves(x))[1:], 1),
    "bias of the mean": (lambda x: comparing.bias_check(x, 2 * x[0]).sq, 2),
    "efficiency": (lambda x: comparing.efficiency(spread.grad_variance(x), 7.), 2),
    "coordinate_variance": (coordinates.coordinate_variance, 2), "normalised by coordinate": (coordinates.coordinate_normalized_variance, 0),
    "gsnr": (coordinates.gsnr, 0), "stopping_evidence": (coordinates.stopping_evidence, 0),
    "tic_trace": (lambda x: coordinates.tic_trace(x, one), 2), "tic_diagonal": (lambda x: coordinates.tic_diagonal(x, torch.ones(4), 0.), 2),
    "Estimate.mean": (lambda x: Estimate.mean(x[:, 0]), 1),
    "profile_change": (verdict.profile_change, 0), "gaussianity": (lambda x: verdict.gaussianity(x, stream, 20), 0),
    "compare_laws": (lambda x: fit.compare_laws(x, {k: fit.LAWS[k] for k in ("gaussian", "student")}, 2).drop(columns="held_out"), 0), "ks_test": (lambda x: fit.ks_test(fit.LAWS["student"], x, stream, 8), 0),
    "a fitted scale": (lambda x: fit.fit_law(fit.LAWS["student"], x).scale, 1),
    "ks_test of a vector": (lambda x: fit.ks_test(fit.LAWS["laplace"], x[:, 0].repeat(6), stream, 3), 0),
    "noise_norms": (noise.noise_norms, 1), "noise_index": (lambda x: noise.noise_index(x, stream, surrogates=3), 0),
    "controls": (lambda x: controls.control_row(x, lambda z: tail_index(z, "mohammadi"), stream, 3, {k: controls.CONTROLS[k] for k in ("gaussian", "scales")}), 0),
    "compare_tails": (lambda x: compare_tails(x, (2, 8)), 0), "first_crossing": (crossing, 0),
    "projected_distance": (lambda x: tuple(map(torch.as_tensor, paths.projected_distance(x.double().numpy(), 0 * x.double().numpy()))), 1),
} | {f"tail_index {m}": (lambda x, m=m: tail_index(x, m), 0) for m in METHODS} \
  | {f"tail_index {m} of a vector": (lambda x, m=m: tail_index(x[:, 0], m), 0) for m in METHODS} \
  | {"a sketch": (sketched, 0), "pairs": (lambda x: spread.noise_scale_of_pairs(x[:, 0].abs() / 2 + x[:, 1].abs() / 2, x[:, 1].abs() / 2, 1, 8), 0)}

SLOW = "compare_tails", "a sketch", "tail_index mle", "ks_test"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in STATISTICS])
def test_a_statistic_follows_the_units_of_its_draws(name):
    check_statistic(*STATISTICS[name], dtypes=(torch.float64,) if name in ("first_crossing", "projected_distance") else (torch.float64, torch.float32))


@pytest.mark.parametrize("scale", [1e39, 1e-40, 1e-300, 1e290])
def test_cauchy_is_cauchy_in_any_units(scale):
    cauchy = stable_sample(1., (20_000,), Stream(1).generator(), dtype=torch.float64)
    for method in METHODS: assert tail_index(cauchy * scale, method).value == pytest.approx(1, abs=.12 if method in ("pickands", "dedh") else .05)


def test_digits_that_a_dtype_has_lost_are_said():
    cauchy = stable_sample(1., (2000,), Stream(1).generator(), dtype=torch.float64)
    assert tail_index((cauchy * 1e-40).float(), "hill").value == pytest.approx(1, abs=.15)         # subnormal, with digits enough
    with pytest.raises(TailRefusal, match="float32 has lost their digits"): tail_index((cauchy * 1e-43).float())
    with pytest.warns(RuntimeWarning, match="fewer than 12 bits"): spread.grad_variance((cauchy.view(-1, 4) * 1e-45).float().clamp(-1e-43, 1e-43))
    z = torch.randn(50, 3, generator=Stream(2).generator())
    assert spread.grad_variance(z * 1e-25).value == pytest.approx(spread.grad_variance(z).value * 1e-50, rel=1e-5)      # 0 in float32
    assert math.isinf(spread.grad_variance(z.double() * 1e200).value) and spread.grad_variance(z.double() * 1e-200).value == 0


def test_draws_without_digits_are_a_row_with_the_reason():
    z = torch.randn(400, generator=Stream(3).generator())
    for draws in (z * 1e-44, z.view(-1, 2) * 1e-44):
        lost, told = compare_tails(draws, (2, 8)), compare_tails(draws.double(), (2, 8))
        assert lost[["method", "m"]].equals(told[["method", "m"]]) and lost.columns.equals(told.columns)
        assert lost.note.str.contains("float32 has lost their digits").all() and lost[["value", "stderr", "low", "high"]].isna().all(axis=None)


def layered(kind, dtype, k, shrink=0):
    "A problem whose loss is 2^k times the squared distance, and whose inputs are 2^shrink times as large."
    g = Stream(0).generator()
    x, y = torch.randn(40, 5, generator=g) * 2.**shrink, torch.randn(40, 3, generator=g)
    bias = kind != "without biases"
    net = nn.Sequential(nn.Linear(5, 4, bias), nn.Tanh(), nn.Linear(4, 3, bias)) if kind != "convolution" else \
        nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3))
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=g) / 2
    return Problem(net.to(dtype), lambda out, t: (out - t).square().sum(1) * 2.**(k // 2) * 2.**(k - k // 2), Dataset(x, y, x, y, None))


@pytest.mark.parametrize("kind", ["linear", "without biases", "convolution"])
@pytest.mark.parametrize("dtype, k, shrink", [(torch.float32, -100, 0), (torch.float32, -66, 0), (torch.float32, 95, 0), (torch.float64, -800, 0),
                                              (torch.float64, 800, 0), (torch.float32, 0, -90), (torch.float32, 0, 45)])
def test_gradients_of_examples_in_any_units(kind, dtype, k, shrink):
    "The statistics of a problem's gradients are those of the gradients in float64, which were taken one by one in a unit of 1."
    problem, plain = layered(kind, dtype, k, shrink), layered(kind, torch.float64, 0, shrink)
    z, rtol = plain.example_grads(plain.theta0), 3e-5 if dtype == torch.float32 else 1e-10
    variance = z.var(0).sum().item()
    found = spread.Spread.at(problem, problem.theta0, turned=True)
    with np.errstate(all="ignore"): want = float(np.ldexp(variance, 2 * k))
    assert spread.grad_variance(found).value == pytest.approx(want, rel=rtol)
    assert spread.signal_to_noise(found).value == pytest.approx(z.mean(0).square().sum().item() / variance - 1 / 40, rel=rtol, abs=rtol)
    moments = coordinates.Moments.at(problem, problem.theta0)
    kept = z.square().mean(0) > 1e-12 * z.square().mean(0).max()
    ratio = (z.var(0) / z.square().mean(0))[kept].mean().item()
    assert coordinates.coordinate_normalized_variance(moments).mean.value == pytest.approx(ratio, rel=rtol)
    assert batchsize.norm_test(found).value == pytest.approx(batchsize.norm_test(z).value, rel=rtol)


def drawn(word, problem):
    "Three estimates along a way, and the variance that the estimator knows of itself."
    estimator, s, theta = ESTIMATORS.build(word), Stream(3), problem.theta0
    other = theta + .1 * torch.randn(theta.shape, generator=Stream(1).generator(), dtype=torch.float64).to(theta)
    state, found = estimator.init(problem, theta), []
    for i, at in enumerate((theta, other, other)):
        state = estimator.refresh(state, problem, at, i, s / i)
        found.append(estimator.estimate(state, problem, at, draw(estimator, state, problem, s / "draw" / i))[0])
    known = exact_variance(problem, other, estimator, state, stream=s).variance.value if hasattr(estimator, "design") else 0.
    return torch.stack(found).double(), known, optimal_alpha(problem, other, theta)


@pytest.mark.parametrize("word", ["minibatch:size=16", "svrg:size=16,every=2", "gradientclustering:size=16,k=3", "gradientclustering:size=16,k=3,sketch=64",
    "importancesampling:size=16", "importancesampling:size=16,by=loss", "dropexamples:size=16", "onlineclustering:size=16", "sam:rho=.1", "asam:rho=.1", "projected:k=3,size=16"])
@pytest.mark.parametrize("dtype, k", [(torch.float32, -100), (torch.float32, 60), (torch.float64, -800), (torch.float64, 400)])
def test_estimators_draw_the_same_in_any_units(word, dtype, k):
    "A loss in other units: the same examples, the gradient in these units, and its variance in their squares. Inputs keep theirs."
    if word.startswith("online") and k == -800: pytest.skip("its centres are kept from step to step, in the units of the first")
    (a, va, alpha), (b, vb, beta) = drawn(word, layered("linear", dtype, 0)), drawn(word, layered("linear", dtype, k))
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(b * 2.**(-k // 2) * 2.**(-k - -k // 2), a, rtol=rtol, atol=rtol * a.abs().max().item())
    assert beta == pytest.approx(alpha, rel=rtol)
    with np.errstate(all="ignore"): assert vb == pytest.approx(float(np.ldexp(va, 2 * k)), rel=10 * rtol, abs=np.ldexp(1e-13, 2 * k))
