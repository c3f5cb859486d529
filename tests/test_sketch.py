"""A sketch of an old matrix speeds a search up, and never decides what it finds."""
import gc

import pytest
import torch

from gradnb import Quadratic, Stream, lanczos, sharpness
from gradnb.linalg import Sketch, scan

EDGE = torch.cat([torch.tensor([106.7, 101.4, 100.4, 100.2, 97.0]), 90 / torch.arange(1., 296.)**.8]).double()
P = len(EDGE)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=(Stream(seed) / "sketch").generator()).to(dtype)


def symmetric(values, seed=0):
    U, _ = torch.linalg.qr(draw(len(values), len(values), seed=seed))
    return (U * values) @ U.T


def drifting(seed=1):
    "Matrices with the spectrum of the edge of stability, each some per cent from the one before."
    A = symmetric(EDGE)
    for t in range(12):
        yield A
        noise = draw(P, P, seed=seed + t)
        A = A + (noise + noise.T) / 20


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tracking_a_drifting_matrix(k, dtype):
    cold = warm = 0
    sketch, g = None, draw(P, seed=99, dtype=dtype)
    for A in drifting():
        A = A.to(dtype)
        start = g if sketch is None else sketch.vectors[:, :k] + 0.02 * g[:, None] / g.norm()
        e = lanczos(A.__matmul__, start, k=k, sketch=sketch, keep=k + 8)
        truth = torch.linalg.eigvalsh(A.double()).flip(0)[:k]
        assert e.converged and ((e.values - truth).abs() <= 1e-3 * truth[0]).all()
        assert (e.vectors.T @ e.vectors - torch.eye(k, dtype=dtype)).abs().max() < 1e-5
        V = e.sketch.vectors.double()
        assert (V.T @ V - torch.eye(V.shape[1]).double()).abs().max() < 1e-5      # no drift from update to update
        if sketch is not None:                                                       # to settle; looking for what is new costs the same
            cold += lanczos(A.__matmul__, g, k=k, check=False).matvecs
            warm += lanczos(A.__matmul__, start, k=k, sketch=sketch, check=False).matvecs
        sketch = e.sketch
    assert warm <= 0.75 * cold


@pytest.mark.parametrize("scale", [1., 1e-6, 1e6, -1.])
def test_a_false_sketch_costs_products_and_no_truth(scale):
    A, g = symmetric(EDGE), draw(P, seed=3)
    false = Sketch(scale * torch.linspace(120, 50, 8).double(), torch.linalg.qr(draw(P, 8, seed=4))[0])
    e, honest = lanczos(A.__matmul__, g, sketch=false, keep=9), lanczos(A.__matmul__, g)
    assert e.converged and abs(e.values[0] / EDGE[0] - 1) < 1e-3
    assert e.matvecs <= honest.matvecs + 12


@pytest.mark.parametrize("top", [-1., 0.])
def test_without_a_positive_eigenvalue_the_sketch_is_left_aside(top):
    A = torch.diag(torch.linspace(top, -5, 40).double())
    old = lanczos(A.__matmul__, draw(40), keep=6).sketch
    e = lanczos(A.__matmul__, draw(40, seed=5), sketch=old)
    assert abs(e.values[0] - top) < 1e-2


def test_all_products_paid_the_sketch_is_the_matrix():
    A = symmetric(torch.linspace(3, -2, 12).double())
    old = Sketch(torch.ones(2).double(), torch.eye(12, 2).double())
    s = lanczos(A.__matmul__, draw(12), k=12, tol=0, sketch=old, keep=12).sketch
    torch.testing.assert_close((s.vectors * s.values) @ s.vectors.T, A)


def test_no_sketch_unless_asked_for():
    A = symmetric(EDGE)
    assert lanczos(A.__matmul__, draw(P)).sketch is None


@pytest.mark.parametrize("which", [1, *(pytest.param(i, marks=pytest.mark.slow) for i in (4, 30, 150))])
@pytest.mark.parametrize("rate", [0.005, pytest.param(0.02, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [1000, *(pytest.param(s, marks=pytest.mark.slow) for s in (3000, 5000))])
def test_a_decoupled_direction_that_overtakes_is_seen(which, rate, seed):
    "The old top vector stays an exact eigenvector; the gradient holds a little of everything, drawn anew for each look."
    late, sketch = [], None
    values = torch.cat([torch.tensor([1., .9, .85, .8, .75]), torch.linspace(.6, -.05, 195)]).double()
    for t in range(60):
        values[which] += rate
        bowl = Quadratic(torch.diag(values))
        e = sharpness(bowl, draw(200, seed=seed + t) / values.abs().clamp_min(.05), warm=sketch)
        if e.values[0] / values.max() < 1 - 1e-3: late.append(t)
        sketch = e.sketch
    assert len(late) <= 2 and 59 not in late, late           # near the crossing, where the two hardly differ


def test_more_pairs_than_the_sketch_holds():
    bowl = Quadratic(torch.diag(torch.linspace(5, 0, 30).double()))
    one = sharpness(bowl, bowl.theta0)
    few = Sketch(one.sketch.values[:1], one.sketch.vectors[:, :1])
    e = sharpness(bowl, bowl.theta0, k=4, warm=few)
    torch.testing.assert_close(e.values, torch.linspace(5, 0, 30).double()[:4], rtol=1e-3, atol=0)


def test_a_sketch_of_other_strides_gives_the_same_bits():
    bowl = Quadratic(symmetric(EDGE).float())
    old = sharpness(bowl, bowl.theta0).sketch
    stored = Sketch(old.values, old.vectors.contiguous())
    assert stored.vectors.stride() != old.vectors.stride()
    a, b = (sharpness(bowl, bowl.theta0 * 1.5, warm=w) for w in (old, stored))
    assert torch.equal(a.vectors, b.vectors) and torch.equal(a.sketch.vectors, b.sketch.vectors)


@pytest.mark.parametrize("tol", [.001, .01, .1])
def test_a_cluster_as_wide_as_the_tolerance_does_not_stop_a_search_in_little_memory(tol):
    for seed in range(8):
        bulk, cluster = .2 * draw(288, seed=seed).abs(), 1 - tol * torch.rand(12, generator=torch.Generator().manual_seed(seed)).double()
        values, sketch = torch.cat([cluster, bulk]), None
        for look in range(3):
            values = values * (1 + tol / 3 * draw(300, seed=seed + 100 * look))
            start = draw(300, seed=seed) if sketch is None else sketch.vectors[:, 0].double() + .01 * draw(300, seed=seed)
            e = lanczos(lambda v: values * v, start, tol=tol, sketch=sketch, keep=9, memory=16)
            sketch = e.sketch
            assert e.converged and 0 <= values.max() - e.values[0] <= e.errors[0] <= 1.001 * tol * e.values[0], (seed, look, e)


def test_a_memory_without_end_is_none():
    endless, untold = (lanczos(lambda v: EDGE * v, torch.ones(P, dtype=torch.float64), keep=5, memory=m) for m in (float("inf"), None))
    assert torch.equal(endless.vectors, untold.vectors) and endless.matvecs == untold.matvecs


@pytest.mark.parametrize("keep", [0, 9])
def test_little_memory_keeps_to_its_budget_of_products(keep):
    "Wherever it ends: beside the second eigenvector, inside the scan that finds the first, or while that is put together."
    second = torch.eye(P, dtype=torch.float64)[1]
    for n in range(1, 40):
        e = lanczos(lambda v: EDGE * v, second, memory=16, keep=keep, max_matvecs=n)
        assert e.matvecs <= n and EDGE[0] <= e.values[0] + e.errors[0], (n, e)
        if e.converged: return
    assert False, e


@pytest.mark.parametrize("value", [0., 1e-9])
@pytest.mark.parametrize("p", [2, P])
def test_a_start_that_says_nothing_of_the_scale_does_not_set_it(value, p):
    values = torch.cat([EDGE[:p - 1], torch.tensor([value]).double()]).float()
    e = lanczos(lambda v: values * v, torch.eye(p)[-1], memory=16, keep=9)
    assert e.converged and abs(e.values[0] - EDGE[0]) <= e.errors[0] <= .0011 * EDGE[0], e


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_search_for_the_unseen_saw_is_kept(dtype, monkeypatch):
    "The true eigenvectors past the first are in the sketch after a few looks for one, and looks are shorter; without the rows of the scans neither."
    def looks():
        sketch, paid = None, []
        for i, A in zip(range(5), drifting()):
            start = draw(P, seed=9 + i, dtype=dtype) if sketch is None else sketch.vectors[:, 0].to(dtype) + .001 * draw(P, seed=9 + i, dtype=dtype)
            e = lanczos(A.to(dtype).__matmul__, start, sketch=sketch, keep=9, memory=18)
            assert 0 <= torch.linalg.eigvalsh(A)[-1] - e.values[0] + 1e-4 <= e.errors[0] + 2e-4
            sketch, paid = e.sketch, [*paid, e.matvecs]
        held = torch.linalg.qr(sketch.vectors.double())[0].T @ torch.linalg.eigh(A)[1].flip(1)[:, :6]
        return held.norm(dim=0).min(), sum(paid[1:])
    held, paid = looks()
    monkeypatch.setattr("gradnb.linalg.scan._Bent.keep", lambda *a: None)
    less, more = looks()
    assert held > .98 and less < .9 and paid < .8 * more, (held, less, paid, more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k, memory", [(1, 9), (1, 15), (3, 18)])      # 9: the least there can be
def test_a_budget_of_memory_is_kept_and_the_bound_holds(k, memory, dtype, request, monkeypatch):
    "What lives while a product is made is counted by the garbage collector; the rest of the budget is the product's. In the end something overtakes that only a scan finds."
    found, again = [], scan._again
    monkeypatch.setattr(scan, "_again", lambda *a: found.append(i) or again(*a))
    gc.freeze()                                      # what other tests have left need not be looked through
    request.addfinalizer(gc.unfreeze)
    held, sketch = [], None
    def live():
        seen = {}
        for x in gc.get_objects():
            if type(x) is torch.Tensor and P in x.shape and x.shape != (P, P): seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return sum(seen.values()) / (P * dtype.itemsize)
    for i, A in zip(range(5), drifting()):
        if i == 4:
            v = sketch.vectors[:, 0].double()
            u = draw(P, seed=50) - (draw(P, seed=50) @ v) * v
            u /= u.norm()
            A = A - torch.outer(u, A @ u) - torch.outer(A @ u, u) + (u @ A @ u + 1.1 * truth[0]) * torch.outer(u, u)
        A = A.to(dtype)
        def product(v):
            held.append(live() - before)
            return A @ v
        g, truth, before = draw(P, seed=9 + i, dtype=dtype), torch.linalg.eigvalsh(A.double()).flip(0)[:k], 0.
        if sketch is not None: g = sketch.vectors[:, :k].to(dtype) + .02 * (i < 4) * g[:, None] / g.norm()
        before = live() - sum(t.nbytes for t in (g, *(() if sketch is None else (sketch.vectors,)))) / (P * dtype.itemsize)
        e = lanczos(product, g, k, sketch=sketch, keep=9, memory=memory)
        assert e.converged and (-1e-5 * truth[0] <= truth - e.values).all() and (truth - e.values <= e.errors).all()
        sketch = e.sketch
    assert max(held) <= memory - 2 and (4 in found or k > 1), (held, found)


@pytest.mark.parametrize("seed", range(2))
def test_a_sketch_that_promises_too_much_of_a_negative_matrix_is_refuted_soon(seed):
    "Every eigenvalue was another, the largest above all that there are now; products that find nothing of it must go to its old vectors."
    gen = torch.Generator().manual_seed(seed)
    values = -1 - torch.linspace(0, 1, 1000, dtype=torch.float64).sqrt()
    before, start = values * (1 + .1 * torch.randn(1000, generator=gen, dtype=torch.float64)), torch.randn(1000, generator=gen, dtype=torch.float64)
    old = lanczos(lambda v: before * v, start, keep=9)
    cold, warm = lanczos(lambda v: values * v, start), lanczos(lambda v: values * v, old.vectors, sketch=old.sketch, keep=9)
    assert warm.converged and warm.values[0] <= -1 <= warm.values[0] + warm.errors[0] and warm.matvecs < 2 * cold.matvecs, (warm.matvecs, cold.matvecs)
