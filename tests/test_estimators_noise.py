"Gradient estimators: their laws, their limits, and the exact variance each must have."
from functools import cache
from itertools import combinations

import pytest
import torch
from torch import nn

from gradnb.data import Dataset
from gradnb.problem.designs import exact_variance
from gradnb.move.estimators.clustering import GradientClustering, all_products
from gradnb.move.estimators.dropping import DropExamples
from gradnb.move.estimators.hartigan import Points, Products, hartigan
from gradnb.move.estimators.importance import ImportanceSampling
from gradnb.move.estimators.minibatch import MiniBatch
from gradnb.move.estimators.online import OnlineClustering
from gradnb.move.estimators.strata import Strata, Stratified, allocate, balanced, within
from gradnb.move.estimators.svrg import SVRG, optimal_alpha
from gradnb.runs.laws import check_estimator, check_stepper
from gradnb.problem import Problem
from gradnb.ground.roles import Batch
from gradnb.move.rules.momentum import Momentum
from gradnb.move.steppers import Descent
from gradnb.ground.streams import Stream

EVERYWHERE = [SVRG(8, every=3), SVRG(8, every=5, alpha=0.7, replace=True), SVRG(8, every=6, alpha="optimal", tune=2),
              GradientClustering(8, every=3), GradientClustering(10, k=4, every=3), GradientClustering(7, k=12, replace=True),
              GradientClustering(8, k=4, sketch=16, allocation="neyman"), GradientClustering(8, allocation="proportional"),
              OnlineClustering(8, k=4, every=4, update=2, sketch=8), Stratified(9, by="random", k=4, allocation="one"),
              Stratified(9, by="random", k=4), Stratified(9, by="random", k=4, allocation="neyman", every=3),
              ImportanceSampling(8, every=3), ImportanceSampling(8, every=3, floor=0.5), DropExamples(8, every=3)]
NETWORKS = [GradientClustering(8, variant="faghri2020", every=3), Stratified(20), Stratified(20, allocation="one"),
            Stratified(20, by="embedding", k=5, allocation="neyman", every=3), ImportanceSampling(8, by="loss", every=3),
            DropExamples(8, by="loss", every=3)]
everywhere, networks = (pytest.mark.parametrize("estimator", e, ids=repr) for e in (EVERYWHERE, EVERYWHERE + NETWORKS))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=Stream(seed).generator(), dtype=torch.float64)


@cache
def network(conv=False, n=60):
    "A small classifier in float64 on blobs."
    shape = (2, 5, 5) if conv else (6,)
    y = torch.arange(n) % 4
    x = draw(n, *shape) + 1.5 * draw(4, *shape, seed=1)[y]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)] if conv else [
            nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)]
    return Problem(nn.Sequential(*layers).double(), "ce", Dataset(x, y, x, y, 4))


def ready(estimator, problem, theta=None):
    theta = problem.theta0 if theta is None else theta
    return estimator.refresh(estimator.init(problem, theta), problem, theta, 0, Stream(0) / "ready")


@everywhere
def test_laws_on_a_quadratic(estimator):
    check_estimator(estimator, draws=200)


@networks
def test_laws_on_a_network(estimator):
    check_estimator(estimator, network(), draws=200)


@networks
def test_a_run_continues_bitwise_from_its_stored_state(estimator):
    check_stepper(Descent(Momentum(0.1), estimator), network())


@pytest.mark.parametrize("conv", (False, True))
def test_svrg_is_exact_at_its_snapshot(conv):
    problem = network(conv)
    svrg, truth = SVRG(5, every=10), problem.grad_and_loss(problem.theta0)[0]
    state = ready(svrg, problem)
    for k in range(5):
        g = svrg.estimate(state, problem, problem.theta0, svrg.sample(state, problem, Stream(k)))[0]
        torch.testing.assert_close(g, truth, rtol=0, atol=1e-14)


def test_svrg_is_unbiased_over_all_batches_and_its_alpha_is_the_best():
    problem = network(n=8)
    svrg, theta = SVRG(2, every=10, alpha=0.6), problem.theta0 + 0.2 * draw(problem.p)
    state, truth = ready(svrg, problem), problem.grad_and_loss(theta)[0]
    batches = [Batch(torch.tensor(pair)) for pair in combinations(range(8), 2)]
    cloud = lambda alpha: torch.stack([svrg.estimate(state._replace(alpha=alpha), problem, theta, b)[0] for b in batches])
    torch.testing.assert_close(cloud(0.6).mean(0), truth, rtol=0, atol=1e-14)
    variance = lambda alpha: (cloud(alpha) - truth).square().sum(1).mean().item()
    best = optimal_alpha(problem, theta, problem.theta0)
    assert variance(best) < min(variance(best + 1e-3), variance(best - 1e-3))
    g, g0 = (problem.example_grads(t) for t in (theta, problem.theta0))
    c, c0 = g - g.mean(0), g0 - g0.mean(0)
    assert best == pytest.approx(((c * c0).sum() / c0.square().sum()).item(), rel=1e-10)
    assert optimal_alpha(problem, theta, theta) == pytest.approx(1.0)


def test_snapshots_come_when_they_are_due():
    problem, svrg = network(), SVRG(8, every=6, alpha="optimal", tune=2)
    state, theta, steps = svrg.init(problem, problem.theta0), problem.theta0, []
    for k in range(9):
        state = svrg.refresh(state, problem, theta + 0.01 * k, k, Stream(k))
        steps.append((state.step, state.tuned))
    assert steps == [(0, 0), (0, 0), (0, 2), (0, 2), (0, 4), (0, 4), (6, 6), (6, 6), (6, 8)]


@pytest.mark.parametrize("conv", (False, True))
@pytest.mark.parametrize("how", (dict(), dict(sketch=128), dict(variant="faghri2020", rounds=20)), ids=str)
def test_as_many_clusters_as_examples_leave_no_variance(conv, how):
    problem = network(conv)
    gc = GradientClustering(60, **how)
    state, truth = ready(gc, problem), problem.grad_and_loss(problem.theta0)[0]
    if how.get("variant"):                                     # its pass may leave clusters empty, and says so by its ratio
        assert state.ratio < 1
        return
    assert state.ratio < 1e-12 and len(state.strata.sizes) == 60
    g = problem.grad_and_loss(problem.theta0, gc.sample(state, problem, Stream(3)))[0]
    torch.testing.assert_close(g, truth, rtol=0, atol=1e-14)


def test_one_cluster_is_a_mini_batch():
    problem = network()
    for replace in (False, True):
        gc = GradientClustering(7, k=1, replace=replace)
        state = ready(gc, problem)
        ours, theirs = (e.sample(s, problem, Stream(4)) for e, s in ((gc, state), (MiniBatch(7, replace), ())))
        assert torch.equal(ours.idx, theirs.idx) and torch.equal(ours.weight, torch.ones(7, dtype=torch.float64))
        assert state.ratio == pytest.approx(1.0)


@pytest.mark.parametrize("how", (dict(), dict(sketch=64)), ids=str)
def test_copies_need_as_many_clusters_as_there_are_different_examples(how):
    few, many = network(n=6), network()
    x, y = few.dataset.x.repeat(7, 1), few.dataset.y.repeat(7)
    problem = Problem(few.module, "ce", Dataset(x, y, x, y, 4))
    state = ready(gc := GradientClustering(6, rounds=30, **how), problem, many.theta0)
    assert state.ratio < 1e-12
    g = problem.grad_and_loss(many.theta0, gc.sample(state, problem, Stream(3)))[0]
    torch.testing.assert_close(g, few.grad_and_loss(many.theta0)[0], rtol=0, atol=1e-14)


def test_random_balanced_strata_are_mini_batches():
    "E K J / (N Σ‖gᵢ − ∇L‖²) = (N − K)/(N − 1), the finite-population factor of a mini-batch of K."
    problem = network()
    ratios = torch.tensor([within(problem, problem.theta0, balanced(60, 12, Stream(s))).ratio for s in range(150)])
    assert abs(ratios.mean() - 48 / 59) < 4.5 * ratios.std() / 150**0.5


@pytest.mark.parametrize("rows", (None, 11, 2))        # strata that end in the next part, or span several
@pytest.mark.parametrize("conv", (False, True))
def test_what_varies_inside_equals_brute_force(conv, rows, monkeypatch):
    problem = network(conv)
    labels, g = balanced(60, 7, Stream(1)), problem.example_grads(problem.theta0)
    whole = problem.layer_io
    monkeypatch.setattr(problem, "layer_io", lambda theta, batch=None, rows=rows: whole(theta, batch, rows))
    inside = within(problem, problem.theta0, labels)
    spread = torch.stack([(g[labels == k] - g[labels == k].mean(0)).square().sum() for k in range(7)])
    torch.testing.assert_close(inside.spread, spread)
    assert inside.total == pytest.approx((g - g.mean(0)).square().sum().item())
    torch.testing.assert_close(all_products(problem, problem.theta0)[0], g @ g.T)


@pytest.mark.parametrize("size, allocation", [(5, "one"), (12, "one"), (7, "proportional"), (12, "neyman"), (3, "neyman")])
@pytest.mark.parametrize("replace", (False, True))
def test_every_example_weighs_the_same_in_the_mean(size, allocation, replace):
    labels = torch.tensor([0] * 9 + [1] * 4 + [2] + [3] * 6 + [5] * 2)
    spread = torch.tensor([1., 8., 0., 0.5, 3.])
    strata = Strata.of(labels, size, allocation, spread)
    weights = torch.zeros(2000, 22, dtype=torch.float64)
    for s in range(2000):
        batch = strata.draw(Stream(s), replace)
        assert len(batch.idx) == len(batch.weight) == size
        weights[s].index_add_(0, batch.idx, batch.weight / size)
    z = (weights.mean(0) - 1 / 22) / (weights.std(0) / 2000**0.5).clamp_min(1e-12)
    assert z.abs().max() < 4.5


def test_without_replacement_a_stratum_repeats_nothing_before_it_is_through():
    strata = Strata.of(torch.tensor([0, 0, 0, 1]), 10)
    counts = strata.draw(Stream(0)).idx.bincount()
    assert counts[3] == 5 and sorted(counts[:3].tolist()) == [1, 2, 2]


def test_neyman_is_the_best_allocation():
    sizes, spread = torch.tensor([40, 10, 30]), torch.tensor([4., 90., 1.], dtype=torch.float64)
    e = allocate(sizes, 30, "neyman", spread)
    variance = lambda e: (sizes * spread / e).sum()
    assert e.sum() == pytest.approx(30)
    for a, b in combinations(range(3), 2):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[a], shift[b] = 0.1, -0.1
        assert variance(e) < min(variance(e + shift), variance(e - shift))
    assert allocate(sizes, 30, "neyman", torch.tensor([1., 0., 1.])).tolist()[1] == 1.0
    assert torch.equal(allocate(sizes, 30, "neyman", torch.zeros(3)), torch.full((3,), 10.0, dtype=torch.float64))
    assert (allocate(sizes, 3, "neyman", spread) == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_moves_never_raise_the_distortion_and_end_where_no_move_helps(seed):
    x, k = draw(80, 4, seed=seed), 6

    def J(labels):
        return sum((torch.cdist(x[labels == l], x[labels == l]).square().sum() / 2).item() for l in range(k))

    start = torch.randint(k - 2, (80,), generator=Stream(seed).generator())       # two clusters start empty
    found = hartigan(Points(x), start, k, rounds=100)
    assert found.moves == 0 and all(b <= a for a, b in zip(found.history, found.history[1:]))
    assert found.history[0] == pytest.approx(J(start)) and found.distortion == pytest.approx(J(found.labels))
    for i in range(80):
        for l in range(k):
            other = found.labels.clone()
            other[i] = l
            assert J(other) >= found.distortion * (1 - 1e-9)
    for points, block in ((Products(x @ x.T), 256), (Points(x), 7), (Products(x @ x.T), 33)):
        assert torch.equal(hartigan(points, start, k, rounds=100, block=block).labels, found.labels)


@pytest.mark.parametrize("how", [dict(), dict(sketch=16), dict(variant="faghri2020")], ids=repr)
def test_clusters_know_what_varies_inside_them(how):
    problem = network()
    labels, inside = GradientClustering(9, **how).find(problem, problem.theta0, None, Stream(3))
    truth = within(problem, problem.theta0, labels)
    torch.testing.assert_close(inside.spread, truth.spread, rtol=1e-9, atol=1e-9 * truth.total)
    assert torch.equal(inside.sizes, truth.sizes) and inside.total == pytest.approx(truth.total)
    assert inside.ratio == pytest.approx(truth.ratio)


def test_clusters_are_made_anew_from_the_old_ones():
    problem, gc = network(), GradientClustering(8, every=5)
    first = ready(gc, problem)
    theta = problem.theta0 + 0.05 * draw(problem.p)
    assert gc.refresh(first, problem, theta, 4, Stream(9)) is first
    later = gc.refresh(first, problem, theta, 5, Stream(9))
    assert later.strata.step == 5 and later.ratio <= within(problem, theta, first.strata.labels).ratio


@pytest.mark.parametrize("estimator", [GradientClustering(8), OnlineClustering(8), ImportanceSampling(8), DropExamples(8),
                                       Stratified(8, allocation="neyman"), GradientClustering(8, variant="faghri2020")], ids=repr)
def test_a_bad_example_is_named(estimator):
    "Its gradient is finite and its square is not: norms do not mind."
    problem = network()
    x = problem.dataset.x.clone()
    x[17] *= 1e120
    huge = Problem(torch.nn.Linear(x.shape[1], 4).double(), "mse", Dataset(x, problem.dataset.y, x, problem.dataset.y, 4))
    if isinstance(estimator, (ImportanceSampling, DropExamples)):
        assert getattr(ready(estimator, huge), "q", torch.ones(18))[17] > .8
        return
    with pytest.raises(ValueError, match="example 17 is not finite"):
        ready(estimator, huge)


@pytest.mark.parametrize("make, says", [
    (lambda p: GradientClustering(61).init(p, p.theta0), "61 strata of 60 examples"),
    (lambda p: OnlineClustering(8, k=61).init(p, p.theta0), "61 strata of 60 examples"),
    (lambda p: Stratified(61).init(p, p.theta0), "replace=True"),
    (lambda p: GradientClustering(61, k=5).init(p, p.theta0), "replace=True"),
    (lambda p: DropExamples(50).init(p, p.theta0), "too few for a batch of 50"),
    (lambda p: GradientClustering(8, k=0), "1 ≤ k"),
    (lambda p: GradientClustering(8, allocation="all"), "one, proportional, neyman"),
    (lambda p: SVRG(8, every=2, alpha=-1.0), "alpha"),
    (lambda p: ImportanceSampling(8, by="label"), "norm, loss"),
    (lambda p: OnlineClustering(8, decay=1.0), "decay"),
])
def test_bad_input_is_refused_with_the_remedy(make, says):
    with pytest.raises(ValueError, match=says):
        make(network())


def test_too_many_inner_products_are_refused(monkeypatch):
    problem = network()
    monkeypatch.setattr(Problem, "n", property(lambda self: 60_000))
    with pytest.raises(ValueError, match="sketch=512"):
        all_products(problem, problem.theta0)




@pytest.mark.parametrize("estimator", [
    MiniBatch(7), MiniBatch(7, replace=True), SVRG(7, every=9, alpha=0.7), GradientClustering(8), GradientClustering(10, k=4),
    GradientClustering(9, k=5, replace=True), GradientClustering(12, k=4, allocation="neyman"), Stratified(8, allocation="one"),
    Stratified(9), OnlineClustering(8, k=4), ImportanceSampling(8)], ids=repr)
def test_draws_have_the_variance_of_the_design(estimator):
    problem = network()
    theta = problem.theta0 + 0.1 * draw(problem.p)
    state, truth = ready(estimator, problem), problem.grad_and_loss(theta)[0]
    exact = exact_variance(problem, theta, estimator, state)
    batches = (estimator.sample(state, problem, Stream(8) / i) for i in range(600))
    seen = torch.stack([(estimator.estimate(state, problem, theta, b)[0] - truth).square().sum() for b in batches])
    stderr = (seen.var() / 600 + exact.variance.stderr**2).sqrt()
    assert abs(seen.mean() - exact.variance.value) < 4.5 * stderr
    assert exact.norm_sq == pytest.approx(truth.square().sum().item())
