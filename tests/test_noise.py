"Gradient noise: closed forms against all batches, draws and BackPACK; intervals that cover; probes that disturb nothing."
import warnings
from itertools import combinations, islice, product

import pytest
import torch
from torch import nn

from gradnb.bench.harness import peak_bytes
from gradnb.data import Dataset, load_dataset
from gradnb.data.variations import corrupt_labels, duplicate, imbalance
from gradnb.problem.designs import Design, exact_variance, whole_counts
from gradnb.move.estimators.clustering import GradientClustering
from gradnb.move.estimators.importance import ImportanceSampling
from gradnb.move.estimators.minibatch import FullBatch, MiniBatch
from gradnb.move.estimators.sam import SAM
from gradnb.move.estimators.strata import Strata, Stratified
from gradnb.move.estimators.svrg import SVRG
from gradnb.runs.laws import check_probe, proving_ground
from gradnb.measure.noise.batchsize import inner_product_test, norm_test, orthogonality_test
from gradnb.measure.noise.comparing import bias_check, step_cost
from gradnb.measure.noise.compat import faghri2020
from gradnb.measure.noise.coordinates import Moments, coordinate_normalized_variance, coordinate_variance, gsnr, stopping_evidence, tic_diagonal
from gradnb.measure.noise.spread import (Spread, excess, grad_norm_sq, grad_variance, jackknife, left_out, noise_scale, normalized_variance, signal_to_noise)
from gradnb.measure.probes.view import PROBES, View
from gradnb.problem import Problem
from gradnb.ground.draws import Draws
from gradnb.ground.roles import Batch, draw
from gradnb.move.rules.adam import Adam
from gradnb.move.rules.momentum import Momentum
from gradnb.move.steppers import Descent, trajectory
from gradnb.ground.streams import Stream
from gradnb.runs.training import train
from gradnb.ground.trees import flatten, unflatten


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=Stream(seed).generator(), dtype=torch.float64)


def network(conv=False, n=60, dtype=torch.float64, seed=0):
    "A small classifier on blobs."
    shape = (2, 5, 5) if conv else (6,)
    y = torch.arange(n) % 4
    x = (randn(n, *shape) + 1.5 * randn(4, *shape, seed=1)[y]).to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten()] if conv else [nn.Linear(6, 5), nn.ReLU()]
        layers = [*first, nn.Linear(27 if conv else 5, 4)]
        return Problem(nn.Sequential(*layers).to(dtype), "ce", Dataset(x, y, x, y, 4))


def ready(estimator, problem, theta=None):
    theta = problem.theta0 if theta is None else theta
    return estimator.refresh(estimator.init(problem, theta), problem, theta, 0, Stream(0) / "ready")


def sums(z, labels):
    return z.new_zeros(int(labels.max()) + 1, z.shape[1]).index_add_(0, labels, z)


def test_what_the_jackknife_counts_twice_over_all_samples():
    population = torch.tensor([[1.4, .2, .5], [-.2, 1.1, .2], [.2, -.8, -.3]], dtype=torch.float64)
    cov = torch.cov(population.T, correction=0)
    values, squares = [], []
    for idx in product(range(3), repeat=5):
        spread = Spread.of(population[list(idx)])
        V, V_out, m, m_out = left_out(spread)
        values.append(m - V / 5)
        squares.append(jackknife(values[-1], m_out - V_out / 4).stderr**2 - excess(spread._replace(cross=(cov @ cov).trace().item()))**2)
    assert torch.tensor(squares).mean().item() == pytest.approx(torch.tensor(values).var(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("statistic, signal", [(grad_norm_sq, 0), (grad_norm_sq, .5), (signal_to_noise, 0), (signal_to_noise, .5)])
def test_standard_errors_are_what_draws_show(statistic, signal):
    found = [statistic(g) for g in signal + randn(800, 30, 40)]
    stated, shown = (torch.tensor([e[i] for e in found]) for i in (1, 0))
    assert .9 < (stated.square().mean() / shown.var()).sqrt() < 1.2


# --- closed forms --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("counts, replace", [([1, 1], False), ([2, 1], False), ([3, 4], False), ([5, 2], False), ([7, 5], False),
                                             ([1, 1], True), ([2, 1], True), ([3, 4], True)], ids=str)
def test_a_design_equals_all_its_batches(counts, replace):
    "Two parts of 3 and 2, counts beyond a pass included: every batch is made and weighed."
    z, labels = randn(5, 3), torch.tensor([0, 0, 0, 1, 1])
    parts = []
    for k, c in enumerate(counts):
        members = (labels == k).nonzero()[:, 0].tolist()
        whole, rest = (0, c) if replace else divmod(c, len(members))
        picks = product(members, repeat=c) if replace else combinations(members, rest)
        parts.append([len(members) / 5 / c * (whole * z[members].sum(0) + z[list(pick)].sum(0)) for pick in picks])
    cloud = torch.stack([a + b for a in parts[0] for b in parts[1]])
    torch.testing.assert_close(cloud.mean(0), z.mean(0))
    design = Design(labels, torch.tensor(counts, dtype=torch.float64), replace)
    found = design.variance(z.square().sum(1), sums(z, labels))
    assert found.value == pytest.approx((cloud - z.mean(0)).square().sum(1).mean().item(), abs=1e-14) and found.stderr == 0


def test_unequal_probabilities_equal_all_their_batches():
    z, q = randn(4, 3), torch.tensor([.1, .2, .3, .4], dtype=torch.float64)
    design = Design.uniform(4, 2, replace=True)._replace(q=q)
    error = lambda i, j: ((z[i] / q[i] + z[j] / q[j]) / 8 - z.mean(0)).square().sum()
    value = sum((q[i] * q[j] * error(i, j)).item() for i in range(4) for j in range(4))
    assert design.variance(z.square().sum(1), z.sum(0)[None]).value == pytest.approx(value)
    best = z.norm(dim=1)                                                    # q ∝ ‖g‖: ((mean ‖g‖)² − ‖G‖²)/B
    design = design._replace(q=best / best.sum())
    closed = (best.mean()**2 - z.mean(0).square().sum()).item() / 2
    assert design.variance(z.square().sum(1), z.sum(0)[None]).value == pytest.approx(closed)


@pytest.mark.parametrize("expected", ([1.5, 1.5, 1.5, 1.5], [1.2, 2.6, .4, 1.8], [2., 1.5, 2.5, 1.]), ids=str)
@pytest.mark.parametrize("replace", (False, True))
def test_random_counts_add_what_draws_show(expected, replace):
    labels, z = torch.arange(4).repeat_interleave(3), randn(12, 2, seed=3) + 3 * randn(4, 2, seed=4).repeat_interleave(3, 0)
    expected = torch.tensor(expected, dtype=torch.float64)
    strata = Strata(0, torch.arange(12), torch.full((4,), 3), expected)
    found = Design(labels, expected, replace).variance(z.square().sum(1), sums(z, labels), draws=4000)
    batches = [strata.draw(Stream(i), replace) for i in range(4000)]
    seen = grad_variance(torch.stack([(b.weight[:, None] * z[b.idx]).mean(0) for b in batches]))
    assert abs(found.value - seen.value) < 4 * (found.stderr**2 + seen.stderr**2)**.5
    assert (found.stderr == 0) == (len({round(v % 1, 6) for v in expected.tolist()} - {0.}) < 2)


def test_counts_have_the_right_mean_and_sum():
    e = torch.tensor([.3, 2.7, 1.5, .5], dtype=torch.float64)
    many = torch.stack([whole_counts(e, Stream(i).generator()) for i in range(3000)])
    assert (many.sum(1) == 5).all() and (many >= e.floor()).all() and (many <= e.ceil()).all()
    assert ((many.double().mean(0) - e).abs() < 4.5 * (.25 / 3000)**.5).all()


ESTIMATORS = [MiniBatch(7), MiniBatch(7, replace=True), SVRG(7, every=9), SVRG(7, every=9, alpha=.6, replace=True),
              GradientClustering(6), GradientClustering(9, k=6, replace=True), GradientClustering(9, k=6, allocation="neyman"),
              Stratified(9), Stratified(9, by="random", k=4, allocation="one"),
              ImportanceSampling(7), ImportanceSampling(7, floor=.5)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("conv", (False, True))
def test_closed_forms_lie_within_the_intervals_of_draws(estimator, conv):
    "At weights away from the snapshot; draws come from the batches themselves, so the sampling code is judged too."
    problem = network(conv)
    state, theta = ready(estimator, problem), problem.theta0 + .05 * randn(problem.p, seed=5)
    exact = exact_variance(problem, theta, estimator, state)
    batches = (estimator.sample(state, problem, Stream(i)) for i in range(500))
    draws = torch.stack([estimator.estimate(state, problem, theta, b)[0] for b in batches])
    seen = grad_variance(draws)
    assert abs(seen.value - exact.variance.value) < 4 * (seen.stderr**2 + exact.variance.stderr**2)**.5
    norm = problem.grad_and_loss(theta)[0].square().sum().item()
    assert exact.norm_sq == pytest.approx(norm) and abs(grad_norm_sq(draws).value - norm) < 4.5 * grad_norm_sq(draws).stderr
    parts = exact_variance(problem, theta, estimator, state, by_layer=True)
    assert sum(e.norm_sq for e in parts.values()) == pytest.approx(norm)
    if not exact.variance.stderr: assert sum(e.variance.value for e in parts.values()) == pytest.approx(exact.variance.value)


def test_twice_the_batch_has_half_the_variance():
    problem = network()
    value = lambda *how: exact_variance(problem, problem.theta0, MiniBatch(*how)).variance.value
    assert value(14, True) / value(7, True) == pytest.approx(.5)
    assert value(14) / value(7) == pytest.approx(.5 * 46 / 53)               # the finite-population factor
    assert value(60) == 0 and exact_variance(problem, problem.theta0, FullBatch()).variance.value == 0
    g = problem.example_grads(problem.theta0)
    assert value(1, True) == pytest.approx((g - g.mean(0)).square().sum(1).mean().item())


@pytest.mark.parametrize("replace", (False, True))
@pytest.mark.parametrize("size", (1, 7, 64))
def test_quadratics_know_their_batch_variance(size, replace):
    bowl = proving_ground()
    found = exact_variance(bowl, bowl.theta0, MiniBatch(size, replace)).variance.value
    assert found == pytest.approx(bowl.batch_variance(size, replace))


def test_svrg_has_no_variance_at_its_snapshot_and_gains_nothing_far_away():
    for dtype, tol in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        problem = network(dtype=dtype)
        svrg, plain = SVRG(5, every=9), exact_variance(problem, problem.theta0, MiniBatch(5)).variance.value
        assert abs(exact_variance(problem, problem.theta0, svrg, ready(svrg, problem)).variance.value) < tol * plain
    far = problem.theta0 + 3 * randn(problem.p).float()
    stale, plain = (exact_variance(problem, far, e, ready(e, problem)).variance.value for e in (svrg, MiniBatch(5)))
    assert stale > .3 * plain


def test_clusters_as_many_as_examples_as_copies_and_only_one():
    problem = network()
    value = lambda e, p=problem: exact_variance(p, p.theta0, e, ready(e, p)).variance.value
    plain = value(MiniBatch(7))
    assert value(GradientClustering(60)) < 1e-12 * plain
    assert value(GradientClustering(7, k=1)) == pytest.approx(plain)
    few = network(n=6).dataset
    x, y = few.x.repeat(5, 1), few.y.repeat(5)
    copies = Problem(problem.module, "ce", Dataset(x, y, x, y, 4))
    assert value(GradientClustering(6, rounds=30), copies) < 1e-12 * value(MiniBatch(6), copies)


def test_random_balanced_strata_are_mini_batches():
    problem, ratios = network(), []
    for i in range(40):
        strata = Stratified(6, by="random", k=6, allocation="one")
        state = strata.refresh(strata.init(problem, problem.theta0), problem, problem.theta0, 0, Stream(i))
        ratios.append(exact_variance(problem, problem.theta0, strata, state).variance.value)
    ratios = torch.tensor(ratios) / exact_variance(problem, problem.theta0, MiniBatch(6)).variance.value
    assert abs(ratios.mean() - 1) < 4.5 * ratios.std() / 40**.5


def test_what_has_no_closed_form_is_refused():
    problem = network()
    with pytest.raises(TypeError, match="design"):
        exact_variance(problem, problem.theta0, SAM(estimator=MiniBatch(5)))
    noisy = Problem(nn.Sequential(nn.Linear(6, 5), nn.Dropout(.5), nn.Linear(5, 4)).double(), "ce", problem.dataset)
    with pytest.raises(TypeError, match="noise of its own"):
        exact_variance(noisy, noisy.theta0, MiniBatch(5))


# --- statistics ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("conv", (False, True))
@pytest.mark.parametrize("rows", (None, 13))
def test_layers_give_the_spread_and_the_moments_of_the_gradients(dtype, conv, rows, monkeypatch):
    problem = network(conv, dtype=dtype)
    g = problem.example_grads(problem.theta0).double()
    if rows:
        whole = Problem.layer_io
        monkeypatch.setattr(Problem, "layer_io", lambda self, theta, batch=None: whole(self, theta, batch, rows))
    tol = dict(rtol=1e-10, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-4, atol=2e-5)
    for got, want in zip(Spread.at(problem, problem.theta0, turned=True), Spread.of(g)):
        torch.testing.assert_close(torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64), **tol)
    some = Batch(torch.arange(5, 45))
    for room in (2**23, 0):                                                                     # the groups at once, or again and again
        monkeypatch.setattr("gradnb.ground.draws.KEPT", room)
        got, want = Moments.at(problem, problem.theta0, some), g[5:45].unflatten(0, (10, 4))
        torch.testing.assert_close(torch.stack([got.sums[j] for j in range(10)]).double(), torch.stack([want.sum(1), want.square().sum(1)], 1), **tol)
        torch.testing.assert_close(got.whole.double(), torch.stack([want.sum((0, 1)), want.square().sum((0, 1))]), **tol)
        assert got.count.tolist() == [4.] * 10 and got.unit == 1


def test_unbiased_over_all_samples_of_a_small_population():
    "E of each estimate over all 3-subsets with replacement equals the truth exactly."
    z = randn(4, 2) + 1
    draws = [z[list(i)] for i in product(range(4), repeat=3)]
    mean = lambda f: torch.tensor([f(d).value for d in draws], dtype=torch.float64).mean().item()
    assert mean(grad_variance) == pytest.approx((z - z.mean(0)).square().sum(1).mean().item())
    assert mean(grad_norm_sq) == pytest.approx(z.mean(0).square().sum().item())


@pytest.mark.parametrize("statistic, truth", [
    (grad_variance, 14.), (grad_norm_sq, 3.), (signal_to_noise, 3 / 14), (noise_scale, 14 / 3), (norm_test, None),
    (inner_product_test, None), (orthogonality_test, None)], ids=lambda v: getattr(v, "__name__", ""))
def test_errors_are_as_large_as_they_say(statistic, truth):
    "Over independent samples the estimates scatter by their own standard errors."
    scale = torch.tensor([1., 2., 3.], dtype=torch.float64)
    found = [statistic(1 + scale * randn(150, 3, seed=100 + i)) for i in range(250)]
    values, errors = (torch.tensor([f[i] for f in found], dtype=torch.float64) for i in (0, 1))
    assert .8 < values.std() / errors.square().mean().sqrt() < 1.25
    if truth is not None:
        covered = sum(truth in f for f in found) / 250
        assert .89 <= covered <= .995


def test_batch_tests_equal_their_definitions():
    problem = network(True)
    g, B = problem.example_grads(problem.theta0), problem.n
    mean = g.mean(0)
    square = mean.square().sum()
    inner = ((g @ mean).sub(square).square().sum() / (B - 1) / B / square**2).sqrt()
    along = (g @ mean / square)[:, None] * mean
    across = ((g - along).square().sum() / (B - 1) / B / square).sqrt()
    norm = ((g - mean).square().sum() / (B - 1) / B / square).sqrt()
    for test, want in ((norm_test, norm), (inner_product_test, inner), (orthogonality_test, across)):
        assert test(g).value == pytest.approx(want.item())
        assert test(Spread.at(problem, problem.theta0)).value == pytest.approx(want.item())


@pytest.mark.parametrize("seed", range(20))
def test_normalized_variance_is_a_share(seed):
    z = randn(2 + seed % 7, 1 + seed % 4, seed=seed) * 10.**(seed - 10) + (seed % 3)
    found = normalized_variance(z)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_without_noise_there_is_only_signal():
    same = torch.ones(5, 3)
    assert grad_variance(same).value == 0 and normalized_variance(same).value == 0 and noise_scale(same).value == 0
    assert grad_norm_sq(same).value == 3 and signal_to_noise(same).value == float("inf")


def test_coordinates_equal_plain_formulas():
    g = randn(30, 8) + .5
    variance, mean = g.var(0), g.mean(0)
    torch.testing.assert_close(coordinate_variance(g).value, variance)
    assert coordinate_normalized_variance(g).mean.value == pytest.approx((variance / g.square().mean(0)).mean().item())
    assert stopping_evidence(g).mean.value == pytest.approx((1 - 30 * (mean.square() / variance).mean()).item())
    assert gsnr(g).mean.value == pytest.approx((27 / 29 * mean.square() / variance - 1 / 30).mean().item())
    dead = torch.cat([g, torch.zeros(30, 2, dtype=g.dtype)], 1)
    for statistic in (coordinate_normalized_variance, stopping_evidence, gsnr):
        a, b = statistic(g), statistic(dead)
        assert a.mean == b.mean and b.masked == pytest.approx(.2)
    with pytest.raises(ValueError, match="no parameter"): gsnr(torch.zeros(5, 3))


def test_published_plateaus_are_the_estimators_own():
    "R = 10 reads 1.125 and R = 50 reads 1.021 on pure noise, whose normalised variance is 1."
    for R, tol in ((10, .004), (50, .002)):
        a, b = randn(R, 40_000, seed=1), randn(R, 40_000, seed=2)
        assert faghri2020(a, b).normalized_variance == pytest.approx(1 + 1 / (R - 2), abs=tol)
        assert coordinate_normalized_variance(b).mean.value == pytest.approx(1, abs=tol)
    small = faghri2020(1e-5 * a, 1e-5 * b)
    assert small.normalized_variance < .1 and small.variance == pytest.approx(1e-10 * (1 + 1 / 50), rel=.01)


@pytest.mark.parametrize("conv", (False, True))
def test_backpack_finds_the_same_variances(conv):
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchL2Grad, SumGradSquared, Variance
    problem = network(conv, dtype=torch.float32)
    net, n = backpack.extend(problem.module), problem.n
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="mean"))(net(problem.dataset.x), problem.dataset.y)
    with backpack.backpack(Variance(), SumGradSquared(), BatchL2Grad()), warnings.catch_warnings(action="ignore"): loss.backward()
    params = list(net.parameters())
    flat = lambda name: n**2 * torch.cat([getattr(p, name).flatten() for p in params])          # theirs are of gᵢ/n
    variance, squares, norms = flat("variance"), flat("sum_grad_squared"), n**2 * sum(p.batch_l2 for p in params)
    other, close = network(conv, dtype=torch.float32), dict(rtol=1e-3, atol=1e-6)               # without their hooks
    moments = Moments.at(other, other.theta0)
    torch.testing.assert_close(coordinate_variance(moments).value * (n - 1) / n, variance, **close)
    torch.testing.assert_close(moments.whole[1] * moments.unit**2, squares, **close)
    exact = exact_variance(other, other.theta0, MiniBatch(1, replace=True)).variance.value
    assert exact == pytest.approx(variance.sum().item(), rel=1e-4)
    torch.testing.assert_close(torch.cat([io.sq_norms() for io in other.layer_io(other.theta0)]), norms, **close)


@pytest.mark.parametrize("estimator, per_step", [
    (MiniBatch(7), 7), (FullBatch(), 60), (SVRG(7, every=20), 2 * 7 + 60 / 20)], ids=repr)
def test_costs_are_counted(estimator, per_step):
    assert step_cost(estimator, network(), 20) == pytest.approx(per_step)


def test_bias_is_seen_where_there_is_one():
    problem, sam = network(), SAM(.3, MiniBatch(20))
    theta = problem.theta0
    sample = lambda e: torch.stack([e.estimate((), problem, theta, e.sample((), problem, Stream(i)))[0] for i in range(300)])
    truth = problem.grad_and_loss(theta)[0]
    none, some = bias_check(sample(MiniBatch(20)), truth), bias_check(sample(sam), truth)
    assert 0. in none.sq and some.sq.low > 0 and some.distance > 3 * some.floor > 0
    assert bias_check(sample(MiniBatch(20)), sample(MiniBatch(20)) + .5).sq.value == pytest.approx(problem.p / 4, rel=.1)


# --- any direction -------------------------------------------------------------------------------------------------

def after_some_steps(problem, run, steps=4):
    return View(problem, run, next(islice(trajectory(problem, run), steps, None)), Stream(3))


def test_the_step_of_momentum_is_as_noisy_as_its_gradient():
    "Given the past: the velocity has had no time to vary."
    problem = network()
    view = after_some_steps(problem, Descent(Momentum(.1), MiniBatch(6)))
    found = grad_variance(view.updates(400))
    assert abs(found.value - .1**2 * exact_variance(problem, view.theta, MiniBatch(6)).variance.value) < 4 * found.stderr


def test_the_first_step_of_signs_is_as_long_as_it_can_be():
    "Adam's first step is lr times the sign of the gradient, so its second moment is p lr² whatever the noise."
    problem = network()
    updates = after_some_steps(problem, Descent(Adam(.1, eps=1e-300), MiniBatch(6)), 0).updates(50)
    alive = (updates != 0).double().sum(1).mean().item()
    whole = grad_variance(updates).value * 49 / 50 + updates.mean(0).square().sum().item()
    assert whole == pytest.approx(.1**2 * alive) and 0 < normalized_variance(updates).value < 1


# --- probes --------------------------------------------------------------------------------------------------------

WORDS = ["grad_variance:every=3,draws=4", "grad_variance:of=[svrg:size=5,every=7],every=3,draws=4",
         "grad_variance:of=[svrg:size=5,every=7],every=3,draws=0,name=exact",
         "grad_variance:of=gradientclustering:size=6,every=3,draws=0", "update_variance:every=3,draws=4", "noise_scale:every=3",
         "noise_scale:every=3,examples=20", "batch_tests:every=3,examples=20", "gradient_moments:every=3", "tic:every=3,samples=4",
         "freshness:of=[svrg:size=5,every=7],every=3", "freshness:every=3", "clusters:every=3",
         "published_variance:every=3,draws=4"]


@pytest.mark.parametrize("word", WORDS)
def test_probes_keep_the_law(word):
    check_probe(PROBES.build(word), network(), Descent(Momentum(.05), GradientClustering(6, every=8)), steps=9)


def test_a_run_is_bitwise_the_same_with_all_probes_on():
    problem, run = network(), Descent(Adam(.01), GradientClustering(6, every=8))
    before = torch.get_rng_state()
    bare, _ = train(problem, run, 12, progress=False)
    measured, traces = train(problem, run, 12, [PROBES.build(w) for w in WORDS], progress=False)
    assert torch.equal(bare.theta, measured.theta) and torch.equal(before, torch.get_rng_state())
    assert len(traces) == len(WORDS) + 1 and all(len(t) for t in traces.values())


@pytest.mark.parametrize("of", ("svrg:size=5,every=7", "gradientclustering:size=6,every=7", "importancesampling:size=6,every=7"))
def test_another_estimators_state_survives_the_store(of):
    problem, run, memory = network(), Descent(Momentum(.05), MiniBatch(6)), {}
    probe = PROBES.build(f"grad_variance:of=[{of}],every=2,draws=5")
    state, _ = train(problem, run, 4, probe, memory=memory, progress=False)
    tensors = {}
    back = {probe.name: unflatten(flatten(memory[probe.name], tensors), tensors)}      # classes are forgotten on disk
    _, once = train(problem, run, 10, probe, state=state, memory=memory, progress=False)
    _, again = train(problem, run, 10, probe, state=state, memory=back, progress=False)
    assert once[probe.name].columns["value"].tolist() == again[probe.name].columns["value"].tolist()
    _, whole = train(problem, run, 10, probe, progress=False)
    assert whole[probe.name].values[2:].tolist() == once[probe.name].values.tolist()


def test_noise_of_the_network_is_measured_by_draws_alone():
    data = network().dataset
    problem = Problem(nn.Sequential(nn.Linear(6, 8), nn.Dropout(.5), nn.Linear(8, 4)).double(), "ce", data)
    run = Descent(Momentum(.05), FullBatch())
    _, traces = train(problem, run, 0, PROBES.build("grad_variance:draws=20"), progress=False)
    assert traces["grad_variance"].values[0] > 0                            # all examples, and Dropout still
    with pytest.raises(TypeError, match="noise of its own"):
        train(problem, run, 0, PROBES.build("grad_variance:draws=0"), progress=False)
    batches = Problem(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double(), "ce", data)
    with pytest.raises(TypeError, match="problem.frozen"):
        exact_variance(batches, batches.theta0, MiniBatch(4))


@pytest.mark.parametrize("statistic", (grad_variance, grad_norm_sq, noise_scale, norm_test, coordinate_variance, gsnr))
def test_too_few_draws_are_refused(statistic):
    with pytest.raises(ValueError, match="at least"): statistic(torch.ones(1, 3))


def test_a_gradient_that_is_not_finite_is_named():
    z = randn(6, 3)
    z[4, 1] = float("nan")
    for statistic in (grad_variance, noise_scale, inner_product_test, coordinate_variance, gsnr):
        with pytest.raises(ValueError, match="gradient 4 is not finite .1 of 6"): statistic(z)


def test_a_batch_of_a_network_without_noise_carries_none():
    assert draw(MiniBatch(3), (), network(), Stream(0)).noise is None


@pytest.mark.parametrize("conv", (False, True))
@pytest.mark.parametrize("estimator", (MiniBatch(5), SVRG(5, every=9), GradientClustering(5), Stratified(5, by="random", k=5)), ids=repr)
def test_the_example_whose_gradient_is_not_finite_is_named(estimator, conv):
    fine = network(conv)
    x = fine.dataset.x.clone()
    x[17] *= 1e200                                              # finite, but its gradient's square is not
    problem = Problem(fine.module, "mse", Dataset(x, fine.dataset.y, x, fine.dataset.y, 4))
    state = ready(estimator, fine)
    for by_layer in (False, True):
        with pytest.raises(ValueError, match="example 17 is not finite .1 of 60"):
            exact_variance(problem, problem.theta0, estimator, state, by_layer)
    for measure in (Spread, Moments):
        with pytest.raises(ValueError, match="example 17 is not finite"): measure.at(problem, problem.theta0)
        with pytest.raises(ValueError, match="example 17 is not finite"):
            measure.at(problem, problem.theta0, Batch(torch.tensor([3, 5, 17, 20])))


class Endless(torch.utils.data.IterableDataset):
    "Examples that have no number and never end."
    def __iter__(self):
        gen = Stream(5).generator()
        while True: yield torch.randn(6, generator=gen, dtype=torch.float64), torch.tensor(0)


@pytest.mark.parametrize("stream, size", ((Endless(), 1), (torch.utils.data.DataLoader(Endless(), 4), 4)), ids=("examples", "batches"))
def test_a_stream_without_an_end_is_refused_but_its_gradients_can_be_measured(stream, size):
    fine = network()
    with pytest.raises(ValueError, match="Endless is a stream.*batches=16"): Problem(fine.module, "ce", stream)
    draws = torch.stack([1 - x.reshape(-1, 6).mean(0) for x, _ in islice(stream, 300)])       # of ½‖1 − x‖², Tr Σ = 6
    assert 6. / size in grad_variance(draws)


# --- draws that are made again ---------------------------------------------------------------------------------------

def streamed(rows, monkeypatch):
    "Draws of these rows that are made anew each time, however small they are."
    monkeypatch.setattr("gradnb.ground.draws.KEPT", 0)
    return Draws(lambda i: rows[i].clone(), len(rows))


@pytest.mark.parametrize("n, p, scale", ((2, 5, 1.), (9, 4, 1.), (50, 30, 1e-170), (7, 3, 1e200), (3, 200_000, 1.)), ids=str)
def test_a_spread_of_draws_is_what_their_gram_matrix_says(n, p, scale, monkeypatch):
    g = randn(n, p) + .3
    z = g - g.mean(0)
    gram, along = z @ z.T, z @ g.mean(0)
    want = dict(mean_sq=g.mean(0).square().sum(), far=gram.diagonal(), along=along, turned=gram @ along / (n - 1),
                cross=sum(gram[i, i - 1] ** 2 for i in range(n)) / n)
    for draws in (g * scale, streamed(g * scale, monkeypatch)):
        found = Spread.of(draws)
        u = scale / found.unit
        for name, power in dict(mean_sq=2, far=2, along=2, turned=4, cross=4).items():
            got = torch.as_tensor(getattr(found, name), dtype=torch.float64)
            torch.testing.assert_close(got, torch.as_tensor(want[name]) * u**power, rtol=1e-10, atol=1e-12 * float(abs(got).max()))


@pytest.mark.parametrize("scales", ((1e-30, 1., 1e30), (1e30, 1e-30, 1.), (1e-38, 1e-36, 1e-37), (1e37, 1e36, 1e34)), ids=str)
def test_draws_of_any_size_in_any_order_have_the_spread_of_their_matrix(scales, monkeypatch):
    g = torch.cat([s * torch.randn(4, 6, generator=Stream(0).generator()) for s in scales])
    for statistic in (grad_variance, grad_norm_sq, signal_to_noise, noise_scale, inner_product_test, orthogonality_test):
        assert statistic(streamed(g, monkeypatch)) == pytest.approx(statistic(g), rel=1e-6, nan_ok=True)
    u = max(scales)
    assert grad_variance(g).value / u / u == pytest.approx((g.double() / u).var(0).sum().item(), rel=1e-5)


@pytest.mark.parametrize("n, p, scale", ((3, 5, 1.), (9, 4, 1e-140), (25, 30, 1e140), (23, 7, 1.)), ids=str)
def test_moments_of_draws_are_those_of_the_groups_that_are_left(n, p, scale, monkeypatch):
    "Every statistic of the coordinates against the draws without each group, written out."
    g = randn(n, p) + .5 * randn(p, seed=1)
    parts = torch.arange(n).tensor_split(min(10, n))
    sets = [g, *(g[[i for i in range(n) if i not in part]] for part in parts)]
    def jack(values):
        rest = torch.stack(values[1:])
        return values[0], (((len(rest) - 1) / len(rest)) * (rest - rest.mean(0)).square().sum(0)).sqrt()
    square, H = lambda s: s.square().mean(0), torch.rand(p, generator=Stream(9).generator(), dtype=torch.float64) + .1
    want = {coordinate_normalized_variance: lambda s: (s.var(0) / square(s)).mean(), stopping_evidence: lambda s: (1 - len(s) * s.mean(0).square() / s.var(0)).mean(),
            gsnr: lambda s: ((len(s) - 3) / (len(s) - 1) * s.mean(0).square() / s.var(0) - 1 / len(s)).mean()}
    for draws in (g * scale, streamed(g * scale, monkeypatch)):
        close = dict(rtol=1e-10, atol=0)
        found = coordinate_variance(draws)
        value, error = jack([s.var(0) for s in sets])
        gaussian = value * (2 / (n - 1))**.5                                 # Var(s²) = 2σ⁴/(n−1)
        for got, expected in zip(found, (value, error.maximum(gaussian))): torch.testing.assert_close(got / scale / scale, expected, **close)
        assert n < 20 or (error > gaussian).any() and (error < gaussian).any()
        for statistic, of in want.items():
            if n < 4: continue
            got, expected = statistic(draws), jack([of(s) for s in sets])
            assert got.masked == 0 and got.mean[:2] == pytest.approx([float(v) for v in expected], rel=1e-9)
        got, expected = tic_diagonal(draws, H, 0.), jack([(square(s) / H).sum() for s in sets])
        assert (got.value / scale / scale, got.stderr / scale / scale) == pytest.approx([float(v) for v in expected], rel=1e-9)
    a, b = (g[:n // 2] * 1e3, g[n // 2:2 * (n // 2)] * 1e3)
    noise, second = (b - a.mean(0)).square().sum(0), b.square().sum(0)
    published = [noise.mean() / len(b), (noise / (second + 1e-7)).mean(), ((second + 1e-10).log() - (noise + 1e-10).log()).mean(), second.mean() / len(b)]
    assert faghri2020(streamed(a, monkeypatch), streamed(b, monkeypatch)) == pytest.approx([float(v) for v in published], rel=1e-10)


def test_draws_that_are_not_finite_or_not_the_same_again_are_named(monkeypatch):
    g = randn(5, 3)
    g[3, 1] = float("inf")
    with pytest.raises(ValueError, match="gradient 3 is not finite .1 of 5"): grad_variance(streamed(g, monkeypatch))
    gen = Stream(0).generator()
    with pytest.raises(RuntimeError, match=r"draw 0 is another one.*view.grads\(n\)"): grad_variance(Draws(lambda i: torch.randn(3, generator=gen), 4))
    with pytest.raises(ValueError, match="at least 2 draws"): grad_variance(Draws(lambda i: g[0], 1))
    with pytest.raises(TypeError, match="view.draws"): grad_variance(iter(g))


def test_a_view_makes_draws_one_at_a_time_and_refuses_a_matrix_that_does_not_fit(monkeypatch):
    problem = network()
    stepper = Descent(Momentum(.1), MiniBatch(4))
    view = View(problem, stepper, next(trajectory(problem, stepper)), Stream(0) / "probe")
    assert torch.equal(torch.stack([*view.draws(5)]), view.grads(5)) and torch.equal(view.draws(5)[3], view.grads(5)[3])
    assert torch.equal(view.draws(5, "updates").stacked(), view.updates(5))
    with pytest.raises(ValueError, match="'updates'"): view.draws(5, "steps")
    with pytest.raises(ValueError, match="n=0"): view.grads(0)
    monkeypatch.setattr("gradnb.ground.memory.free_memory", lambda device: 1e9)
    with pytest.raises(MemoryError, match=r"10000000 grads of 59 parameters take 4.4 GB and 0.931 GB are free.*view.draws\(10000000, 'grads'\)"): view.grads(10**7)


# --- memory --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def million():
    "A run of 10⁶ parameters in float32 at its third step."
    gen = Stream(0).generator()
    x, y = torch.randn(256, 100, generator=gen), torch.arange(256) % 10
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(100, 940), nn.Tanh(), nn.Linear(940, 940), nn.Tanh(), nn.Linear(940, 10))
    problem = Problem(net, "ce", Dataset(x, y, x, y, 10))
    stepper = Descent(Momentum(.05), MiniBatch(32))
    return problem, stepper, next(islice(trajectory(problem, stepper), 2, None))


@pytest.mark.parametrize("words", ("grad_variance:draws=12", "grad_variance:draws=24", "grad_variance:draws=12,of=[svrg:size=32,every=100]", "grad_variance:draws=0", "update_variance:draws=12",
    "published_variance:draws=12", "freshness", "freshness:of=[svrg:size=32,every=100]", "noise_scale", "noise_scale:examples=64", "batch_tests", "gradient_moments", "tic:samples=3",
    "tail_index:draws=80,surrogates=3", "tail_index:draws=80,surrogates=3,groups=layers", "noise_norms:draws=40", "layer_norms", "grad_norms", "update_norms"))
def test_probes_of_noise_hold_six_copies_of_the_parameters_however_many_draws(words, million):
    "What torch's allocator gives out at most, beyond the run, the probe's own memory and the gradient's graph."
    problem, stepper, state = million
    probe, memory, shared = PROBES.build(words), {}, {}
    view = lambda: View(problem, stepper, state, Stream(0) / "probe" / probe.name, memory, shared)
    if words.startswith("tic"): view().point.grad
    probe.measure(view())
    shared = {k: v for k, v in shared.items() if k == "point"}
    assert peak_bytes(lambda: probe.measure(view())) / state.theta.nbytes < 6.1


def test_what_keeps_more_says_so_before_it_starts(million, monkeypatch):
    problem, stepper, state = million
    view = View(problem, stepper, state, Stream(0))
    monkeypatch.setattr("gradnb.ground.memory.free_memory", lambda device: 10. * state.theta.nbytes)
    with pytest.raises(MemoryError, match="keeps 8 gradients.*take most=3,"): PROBES.build("original_index:size=32").measure(view)
    monkeypatch.setattr("gradnb.ground.memory.free_memory", lambda device: 10. * state.theta.nbytes)
    parts = Stratified(20, by="random", k=20)
    with pytest.raises(MemoryError, match="the 20 parts of Stratified.*on draws"): exact_variance(problem, state.theta, parts, ready(parts, problem))


# --- variations ----------------------------------------------------------------------------------------------------

def test_variations_say_where_examples_come_from():
    plain = load_dataset("digits-100")
    for varied in (duplicate(plain, 4, 5), duplicate(plain, 4, 5, inside=True), corrupt_labels(plain, .3),
                   imbalance(plain, (2, 3), .1)):
        d = varied.dataset
        assert torch.equal(d.x, plain.x[varied.source]) and len(varied.source) == len(varied.changed) == d.n
        assert torch.equal(d.x_test, plain.x_test) and torch.equal(d.y_test, plain.y_test)
    wrong = corrupt_labels(plain, .3)
    assert torch.equal(wrong.dataset.y != plain.y, wrong.changed) and wrong.changed.sum() == 30
    assert not torch.equal(duplicate(plain, 4, 5, Stream(1)).source, duplicate(plain, 4, 5, Stream(2)).source)
    both = duplicate(corrupt_labels(plain, .3).dataset, 4, 5)
    assert load_dataset("duplicate:of=[corrupt:of=digits-100,share=0.3],points=4,copies=5").y.tolist() == both.dataset.y.tolist()


@pytest.mark.parametrize("word, says", [
    ("duplicate:of=digits-10,points=11,copies=1", "1 … 10 points"),
    ("duplicate:of=digits-10,points=2,copies=5,inside=true", "leave 0 of 10"),
    ("corrupt:of=digits-10,share=1.5", "is a share"), ("imbalance:of=digits-10,rare=12,share=.5", "no example of class 12"),
    ("random-features:tau=0", "tau must be a positive"), ("linreg:n=-1", "n must be a positive")])
def test_variations_refuse_what_they_cannot_do(word, says):
    with pytest.raises(ValueError, match=says): load_dataset(word)


def test_the_noise_scale_with_dropout_is_that_of_all_masks():
    "A linear network whose inputs are dropped: Σ and G by enumerating examples and masks; batches with replacement, whatever their size."
    d, n, q = 4, 12, .75
    x, y, w = (torch.randn(*shape, generator=Stream(5, (name,)).generator(), dtype=torch.float64) for shape, name in (((n, d), "x"), ((n, 1), "y"), ((1, d), "w")))
    net = nn.Sequential(nn.Dropout(1 - q), nn.Linear(d, 1, bias=False)).double()
    with torch.no_grad(): net[1].weight.copy_(w)
    masks = torch.cartesian_prod(*[torch.tensor([0., 1.])] * d).double()
    odds = (q ** masks.sum(1) * (1 - q) ** (d - masks.sum(1))).repeat_interleave(n) / n
    seen = (masks[:, None] * x / q).flatten(0, 1)
    g = 2 * (seen @ w.T - y.repeat(len(masks), 1)) * seen
    G = odds @ g
    truth = float(odds @ (g - G).square().sum(1) / G.square().sum())
    problem = Problem(net, lambda model, batch: (model(batch[0]) - batch[1]).square().squeeze(1), torch.utils.data.TensorDataset(x, y))
    rows = {}
    for seed in range(20):
        _, traces = train(problem, Descent(Momentum(.1, .9), MiniBatch(5)), 0, ["noise_scale:every=1", "noise_scale:every=1,examples=10"], seed=seed, progress=False)
        for name in ("noise_scale", "noise_scale of 10"): rows.setdefault(name, []).append({k: float(v[0]) for k, v in traces[name].columns.items()})
    for name, found in rows.items():
        assert sum(row["low"] <= truth <= row["high"] for row in found) >= 17, name
        assert sorted(row["value"] for row in found)[10] == pytest.approx(truth, rel=.2)
