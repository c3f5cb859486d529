"""The benches measure what they say: counts are counted, answers are checked, a missing or broken peer is said.

No test here asserts a time.
"""
import gc
import inspect
import json
import math
import sys
from importlib import import_module
from itertools import islice

import pytest
import torch

from gradnb import GD, Descent, Problem, Quadratic, build_model, load_dataset, sharpness, trajectory
from gradnb.bench import curvature, harness, rules, train
from gradnb.bench.harness import Row, alternate, attempt, find_benches, peer, run_benches, table, to_json
from gradnb.cli import main
from gradnb.measure.thresholds.norms import NORMS, generalized_sharpness
from gradnb.problem import Point

KEYS = ["name", "ours", "reference", "ratio", "target", "holds", "unit", "note"]


def diagonal(*values):
    "The quadratic with these eigenvalues, in float64."
    return Quadratic(torch.diag(torch.tensor(values, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_that_are_compared_leave_their_parameters_alone(dtype):
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    p.grad = torch.ones_like(p)
    assert torch.allclose(rules.three_steps(lambda q: torch.optim.SGD(q, .1), [p]), torch.full((3,), -.3).double()) and (p == 1).all()


@pytest.fixture
def digits():
    data = load_dataset("digits-100")
    return Problem(build_model("fc-tanh", data, width=8), "mse", data)


@pytest.fixture
def line():
    data = load_dataset("chebyshev-3-20")
    return Problem(build_model("regression", data, width=10), "mse", data)


# --- rows -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ours, reference, target, ratio, holds", [
    (1, 2, 0.5, 0.5, True),
    (1.01, 2, 0.5, 0.505, False),
    (0, 2, 0.5, 0, True),
    (1, 2, None, 0.5, None),
    (1, None, 0.5, None, None),
    (None, None, 0.5, None, None),
    (1, 0, 0.5, None, None),
])
def test_a_verdict_needs_a_ratio_and_a_target(ours, reference, target, ratio, holds):
    row = Row.of("x", ours, reference, target)
    assert row.ratio == pytest.approx(ratio) and row.holds is holds


def test_rows_on_paper():
    rows = [Row.of("a", 1.0, 2.0, 0.6, "s", "a note " * 40), Row.of("b", 12345.6, None, 1.0, "HVPs", "nobody there")]
    found = [*map(json.loads, to_json(rows))]
    assert [list(r) for r in found] == [KEYS, KEYS] and found[1]["holds"] is None
    lines = "\n".join(table(rows)).splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert "yes" in lines[1] and "12,346" in lines[-2] and lines[-1].strip() == "nobody there"


def test_json_refuses_what_is_no_json():
    with pytest.raises(ValueError):
        list(to_json([Row.of("a", math.inf, 1.0)]))


# --- times ------------------------------------------------------------------------------------------------------

class Clock:
    "A clock that stands still unless a function moves it."

    def __init__(self): self.now, self.calls = 0.0, []

    def __call__(self): return self.now

    def work(self, name, seconds):
        def go():
            self.calls.append(name)
            self.now += seconds(self.calls.count(name)) if callable(seconds) else seconds
        return go


@pytest.mark.parametrize("repeats, warmup", [(2, 0), (3, 1), (8, 2)])
def test_pairs_alternate_and_the_warm_up_is_dropped(repeats, warmup):
    clock = Clock()
    slow_at_first = lambda n: 50 if n <= warmup else 3
    times = alternate(clock.work("a", slow_at_first), clock.work("b", 2), repeats, warmup, clock)
    pairs = [clock.calls[i:i + 2] for i in range(0, len(clock.calls), 2)]
    assert pairs == [["a", "b"] if i % 2 == 0 else ["b", "a"] for i in range(repeats + warmup)]
    assert times == (3, 2, 1.5, 1.5, 1.5)


def test_a_drift_of_the_machine_cancels_in_the_ratio():
    clock = Clock()
    times = alternate(clock.work("a", lambda n: 3.0 * n), clock.work("b", lambda n: 2.0 * n), 9, 0, clock)
    assert times.ratio == pytest.approx(1.5) and times.low == pytest.approx(times.high)


def test_a_function_can_be_timed_against_itself():
    clock = Clock()
    same = clock.work("a", 2)
    assert alternate(same, same, 4, 1, clock) == (2, 2, 1, 1, 1)


def test_the_garbage_collector_comes_back():
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        alternate(lambda: 1 / 0, lambda: None)
    assert gc.isenabled()
    gc.disable()
    try:
        alternate(lambda: None, lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_one_pair_has_no_scatter():
    with pytest.raises(ValueError, match="at least 2 repeats"):
        alternate(lambda: None, lambda: None, repeats=1)


# --- peers and benches --------------------------------------------------------------------------------------------

def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(ImportError, match=r"curvlinops-for-pytorch is not installed: pip install 'gradnb\[bench\]'"):
        peer("curvlinops", "curvlinops-for-pytorch")


def test_a_library_that_misses_another_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "lame_library.py").write_text("import what_it_needs_itself\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="what_it_needs_itself"):
        peer("lame_library", "lame-library")


def test_a_peer_that_fails_says_so_and_stays_silent_otherwise(recwarn):
    def noisy(x):
        import warnings
        warnings.warn("old style", FutureWarning)
        return x + 1
    assert attempt(noisy, 1) == (2, "") and not recwarn
    answer, why = attempt(noisy, None)
    assert answer is None and why.startswith("noisy failed (TypeError")


@pytest.mark.parametrize("name", find_benches())
def test_every_bench_yields_rows_without_arguments(name):
    rows = import_module(f"gradnb.bench.{name}").rows
    assert inspect.isgeneratorfunction(rows)
    assert all(p.default is not p.empty for p in inspect.signature(rows).parameters.values())


def test_benches_run_by_name_and_rows_say_which(monkeypatch, capsys):
    benches = {name: lambda name=name: iter([Row.of("speed", 1, 2, 1.0, note=name)]) for name in ("one", "two")}
    monkeypatch.setattr(harness, "find_benches", lambda: benches)
    assert [r.name for r in run_benches(progress=False)] == ["one: speed", "two: speed"]
    assert [r.name for r in run_benches(["two"], progress=False)] == ["two: speed"]
    with pytest.raises(ValueError, match="onne"): run_benches(["onne"])
    assert main(["bench", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "one: speed"
    assert main(["bench", "onne"]) == 2
    assert "Did you mean 'one'?" in capsys.readouterr().err


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_a_bench_that_is_stopped_has_said_what_it_measured(monkeypatch, capsys, how):
    def rows():
        yield Row.of("speed", 1, 2, 1.0)
        assert "one: speed" in capsys.readouterr().out
        yield Row.of("memory", 2, 2, 1.0)
        raise KeyboardInterrupt
    monkeypatch.setattr(harness, "find_benches", lambda: {"one": rows})
    assert main(["bench", "one", *how]) == 130
    rest = capsys.readouterr().out
    assert "one: memory" in rest and (not how or json.loads(rest)["name"] == "one: memory")


# --- the bench of training ----------------------------------------------------------------------------------------

def test_the_plain_loop_takes_our_steps(digits, line):
    for problem in (digits, line):
        loop = train.PlainLoop(problem, 0.05)
        for _ in range(10): loop.step()
        ours = next(islice(trajectory(problem, Descent(GD(0.05))), 10, None)).theta
        torch.testing.assert_close(problem.layout.join(p.detach() for p in loop.params), ours)


def test_the_plain_gradient_is_ours(digits):
    loop = train.PlainLoop(digits, 0.05)
    torch.testing.assert_close(digits.layout.join(loop.gradient()), digits.grad_and_loss(digits.theta0)[0])


def test_stand_in_images_need_no_data_and_no_global_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADNB_DATA", str(tmp_path))
    before = torch.get_rng_state()
    data = train.images(50)
    assert torch.equal(before, torch.get_rng_state()) and not list(tmp_path.iterdir())
    assert data.name == "synthetic" and data.x.shape == (50, 3, 32, 32) and data.classes == 10
    assert torch.equal(data.x, train.images(50).x)


def test_real_images_where_they_are(tmp_path, monkeypatch):
    import numpy as np
    monkeypatch.setenv("GRADNB_DATA", str(tmp_path))
    pixels, labels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8), np.arange(30) % 10
    np.savez(tmp_path / "cifar10-5k.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    assert train.images(20).name == "npz:cifar10-5k.npz-20"


def vector(*entries):
    return torch.tensor(entries, dtype=torch.float64)


@pytest.mark.parametrize("answer, wrong", [
    (vector(2, 0, 0), ""),                                          # of any length
    (vector(1, 1e-5, 0), ""),
    (vector(1, 0.1, 0), "residual"),                                # not yet there
    (vector(0, 1, 0), "residual 0e+00, error 2e-01"),               # an eigenvector, but the second
    (vector(0, 0, 1), "error 3e+00"),                               # the largest in magnitude, but negative
])
def test_an_answer_is_checked_for_residual_and_for_value(answer, wrong):
    bowl = diagonal(5., 4., -10.)
    said = train.flaw(bowl.at(bowl.theta0), 5., train.Found(answer, 1), 1e-3)
    assert (wrong in said) if wrong else said == ""


PEERS = {"scipy eigsh": None, "hessian-eigenthings lanczos": "hessian_eigenthings", "PyHessian": "pyhessian"}


def test_all_peers_are_tested(): assert list(PEERS) == list(train._PEERS)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_answers_and_its_products_are_counted(name, monkeypatch):
    if PEERS[name]: pytest.importorskip(PEERS[name], reason="a peer of the extra 'bench'")
    bowl = diagonal(*torch.linspace(0, 1, 60).tolist(), 5.)
    bowl.hvp(bowl.theta0, bowl.theta0)                     # what is tried out before the first product
    paid, product = [0], torch.autograd.grad

    def counting(outputs, inputs, *args, **kwargs):
        paid[0] += not kwargs.get("create_graph", False)
        return product(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    before = torch.get_rng_state()
    found = train._PEERS[name](bowl, bowl.theta0, 1e-3)
    assert found.products == paid[0] > 1
    assert torch.equal(before, torch.get_rng_state())
    v = found.vector / found.vector.norm()
    assert v.shape == (61,) and v[-1].abs() > 0.99


def test_the_best_correct_peer_is_the_reference():
    bowl = diagonal(*range(1, 31))
    top, second = torch.eye(30, dtype=torch.float64)[[-1, -2]]
    peers = {"right": lambda *_: train.Found(top, 7), "also right": lambda *_: train.Found(-top, 5),
             "second": lambda *_: train.Found(second, 2), "broken": lambda *_: 1 / 0,
             "absent": lambda *_: peer("no_such_library", "no-such-library")}
    best, truth, note = train.judge(bowl, bowl.theta0, 1e-3, peers)
    assert best == 5 and truth == pytest.approx(30, rel=1e-5)
    assert all(said in note for said in ("right 7;", "second 2 (wrong", "ZeroDivisionError", "no-such-library is not inst"))
    nobody = train.judge(bowl, bowl.theta0, 1e-3, {"second": peers["second"]})
    assert nobody.products is None


def test_a_wrong_answer_of_ours_never_holds(digits, monkeypatch):
    def second(problem, theta, tol, vectors):
        eigs = sharpness(problem, theta, k=2, tol=tol, vectors=vectors)
        return eigs._replace(values=eigs.values[1:], vectors=eigs.vectors[:, 1:], matvecs=1)
    monkeypatch.setattr(train, "sharpness", second)
    row, *_ = train.sharpness_rows(digits, 0.02, 0)
    assert row.holds is False and row.note.startswith("ours is wrong: residual")


@pytest.mark.parametrize("steps, names", [(0, ["cold"]), (30, ["cold", "warm"])])
def test_sharpness_takes_no_more_products_than_the_peers(digits, steps, names):
    rows = list(train.sharpness_rows(digits, 0.02, steps))
    assert [r.name.split()[-1] for r in rows] == names
    assert all(r.unit == "HVPs" and r.reference == rows[0].reference for r in rows)
    assert rows[0].holds and rows[-1].ours <= rows[0].ours


def test_looks_at_norms_beside_looks_at_the_largest_eigenvalue(line, monkeypatch):
    "Products are those that a point makes, and the first and warm looks those of separate calls."
    thetas, paid = [line.theta0, line.theta0 * 1.01, line.theta0 * 1.02], []
    hvp = Point.hvp
    monkeypatch.setattr(Point, "hvp", lambda self, v, *more, **options: (paid.append(v[0].numel()), hvp(self, v, *more, **options))[1])
    rows = {r.name: r for r in curvature.norm_rows(line, thetas, "here")}
    assert len(rows) == 4 * len(NORMS) and {r.target for r in rows.values()} == {3.} and all(r.ours > 0 and r.reference > 0 for r in rows.values())
    for norm in NORMS:
        looks = {"ours": (lambda at, last: generalized_sharpness(at, norm, warm=last)), "reference": (lambda at, last: sharpness(at, warm=last and last.sketch))}
        counts = {}
        for side, look in looks.items():
            last, counts[side] = None, []
            for theta in thetas:
                paid.clear()
                last = look(line.at(theta), last)
                counts[side].append(sum(paid))
        first, warm = rows[f"{norm} sharpness here, first, HVPs"], rows[f"{norm} sharpness here, warm, HVPs"]
        assert (first.ours, first.reference) == (counts["ours"][0], counts["reference"][0])
        assert (warm.ours, warm.reference) == (sum(counts["ours"][1:]) / 2, sum(counts["reference"][1:]) / 2)
        assert first.holds


def test_rows_of_training_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADNB_DATA", str(tmp_path))
    for missing in ("curvlinops", "hessian_eigenthings.algorithms", "hessian_eigenthings", "pyhessian"):
        monkeypatch.setitem(sys.modules, missing, None)
    rows = list(train.rows(n=60, n_edge=40, edge_steps=40, width=8, repeats=2))
    unmeasured = [r for r in rows if r.ours is None]
    assert [r.note for r in unmeasured] == ["curvlinops-for-pytorch is not installed: pip install 'gradnb[bench]'"]
    assert len({r.name for r in rows}) == len(rows) == 12
    assert all(r.ours > 0 and r.reference > 0 for r in rows if r not in unmeasured)
    assert len([*map(json.loads, to_json(rows))]) == len(rows)


def test_curvlinops_multiplies_by_the_same_matrix(digits):
    pytest.importorskip("curvlinops", reason="a peer of the extra 'bench'")
    v = torch.randn(digits.p, generator=torch.Generator().manual_seed(0))
    other, why = attempt(train.curvlinops_product, digits, train.PlainLoop(digits, 0.1))
    assert why == ""
    torch.testing.assert_close(other(v), digits.hvp(digits.theta0, v), rtol=1e-4, atol=1e-6)
