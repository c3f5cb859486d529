"Runs that are trained together are the runs that would have been trained alone."
from dataclasses import replace

import numpy as np
import pytest
import torch

from gradnb import (GD, MODELS, PROBES, Adam, Cosine, FromTorch, FullBatch, MiniBatch, Momentum, Piecewise, Probe, RMSProp, Run, Scheduled,
                    Spec, Store)
from gradnb.runs.sweeps import stack
from gradnb.runs.sweeps.grid import grid
from gradnb.runs.sweeps.stack import pick, row, stacks
from gradnb.runs.sweeps.many import sweep

SPEC = Spec("digits-100", "fc-tanh:width=8", "ce", GD(0.2), 40, MiniBatch(10), ("sharpness:every=20", "test:every=15"), dtype="float64")
RULES = [GD(0.1), GD(0.3), Momentum(0.1), Momentum(0.1, 0.8, True), Adam(0.01), Adam(0.02), RMSProp(0.003),
         Scheduled(Momentum(0.1), Piecewise(((20, 0.5),))), Scheduled(GD(0.1), Cosine(40, 5))]


def compare(specs, tmp_path, rtol):
    "Both ways; every trace at the same steps with the same numbers, the same end, the same state."
    a, b = sweep(specs, tmp_path / "together", vectorize=True, progress=False), sweep(specs, tmp_path / "alone", progress=False)
    assert a.status.tolist() == b.status.tolist() and a.outcome.tolist() == b.outcome.tolist()
    for s in specs:
        x, y = (Store(tmp_path / where).open(s) for where in ("together", "alone"))
        assert x.manifest["vectorized"]["gradient_error"] <= 100 * torch.finfo(getattr(torch, s.dtype)).eps
        assert x.traces.keys() == y.traces.keys() and x.manifest["rows"] == y.manifest["rows"]
        for name, trace in x.traces.items():
            assert np.array_equal(trace.steps, y.traces[name].steps)
            for column, values in trace.columns.items():
                if column not in ("residual", "matvecs"): np.testing.assert_allclose(values, y.traces[name].columns[column], rtol=rtol, atol=rtol)
        torch.testing.assert_close(x.theta, y.theta, rtol=rtol, atol=rtol)
    return a


@pytest.mark.parametrize("estimator, rules", [(MiniBatch(10), RULES), (MiniBatch(10, replace=True), RULES[::4]), (FullBatch(), RULES[1::4]),
    *(pytest.param(e, RULES, marks=pytest.mark.slow) for e in (MiniBatch(10, replace=True), FullBatch()))], ids=["every rule", "replace", "full", "replace, every rule", "full, every rule"])
def test_together_is_alone_for_every_rule_and_seed(tmp_path, estimator, rules):
    "A rule knows nothing of how its gradient was estimated: each rule with one estimator, some with the others."
    base = replace(SPEC, estimator=estimator)
    specs = grid(base, rule=rules) + grid(base, rule=rules[:2], seed=[1, 2])
    assert [len(s) for s in stacks(specs)] == [len(rules) + 4]
    compare(specs, tmp_path, 1e-9)


@pytest.fixture
def words():
    "Models of the test's own."
    layers = dict(noisy=lambda k: [torch.nn.Dropout(0.5), torch.nn.Linear(64, k)], norm=lambda k: [torch.nn.BatchNorm1d(64), torch.nn.Linear(64, k)],
                  conv=lambda k: [torch.nn.Unflatten(1, (1, 8, 8)), torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.MaxPool2d(2),
                                  torch.nn.Flatten(), torch.nn.Linear(18, k)])
    for name, made in layers.items():
        MODELS[name] = lambda in_shape, outputs, made=made: torch.nn.Sequential(torch.nn.Flatten(), *made(outputs))
    yield
    for name in layers: del MODELS[name]


@pytest.mark.parametrize("model, loss", [("fc-relu:width=8", "mse"), ("conv", "ce")])
def test_together_is_alone_for_other_networks_in_float32(tmp_path, words, model, loss):
    compare(grid(replace(SPEC, dtype="float32", model=model, loss=loss, steps=12), rule__lr=[0.01, 0.02], seed=[3, 4]), tmp_path, 1e-3)


def test_runs_end_each_at_its_own_time(tmp_path):
    "A goal, a divergence, and the end; what is left moves on as if the others had never been there."
    base = replace(SPEC, loss_goal=0.5, steps=60, probes=["train:every=50"])
    specs = grid(base, rule=[Adam(0.1), Adam(0.03), Adam(0.0001), GD(1e308)])
    assert [len(s) for s in stacks(specs)] == [4]
    frame = compare(specs, tmp_path, 1e-8)
    assert frame.status.tolist() == ["goal", "goal", "finished", "diverged"] and frame.outcome.nunique() == 4


def vectorized(specs, root): return ["vectorized" in Store(root).open(s).manifest for s in specs]


def test_what_does_not_qualify_is_trained_by_itself(tmp_path, words):
    short = replace(SPEC, steps=3, probes=())
    specs = grid(short, [dict(chunk_size=5), dict(rule=FromTorch(torch.optim.SGD, lr=0.1)), dict(model="noisy"), dict(model="norm")],
                 seed=[0, 1])
    assert set(sweep([*specs, *grid(short, seed=[0, 1])], tmp_path, vectorize=True, progress=False).status) == {"finished"}
    assert vectorized(specs, tmp_path) == [False] * 8 and vectorized(grid(short, seed=[0, 1]), tmp_path) == [True] * 2
    alone, together = (Store(tmp_path).open(s).manifest for s in (specs[0], grid(short, seed=[0])[0]))
    assert together.keys() == alone.keys() | {"vectorized"} and together["schema"] == alone["schema"]
    assert [s.keys() for s in together["stretches"]] == [s.keys() for s in alone["stretches"]] and together["stretches"][0]["threads"] == torch.get_num_threads()


def test_a_gradient_that_does_not_agree_is_not_used(tmp_path, monkeypatch):
    right, specs = stack.gradients, grid(replace(SPEC, steps=3, probes=()), seed=range(3))
    def wrong(problem, theta, batches):
        g, loss = right(problem, theta, batches)
        if len(g) == 3: g[1] += 1e-3 * g[1].norm() * torch.ones_like(g[1]) / g.shape[1] ** 0.5
        return g, loss
    monkeypatch.setattr(stack, "gradients", wrong)
    sweep(specs, tmp_path, vectorize=True, progress=False)
    assert vectorized(specs, tmp_path) == [True, False, True]


def test_a_begun_run_is_resumed_alone_and_a_failing_one_named(tmp_path):
    calm = []

    @PROBES.add("impatient-test")
    def impatient():
        def measure(view):
            if view.step == 2 and not calm: raise KeyboardInterrupt
            return 0.0
        return Probe("impatient-test", lambda k: True, measure)

    begun, *others = specs = grid(replace(SPEC, steps=4, probes=("impatient-test",)), seed=range(3))
    try:
        with pytest.raises(KeyboardInterrupt), pytest.warns(RuntimeWarning): Store(tmp_path).run(begun, progress=False)
        with pytest.raises(KeyboardInterrupt): sweep(specs, tmp_path, vectorize=True, progress=False)
        assert [Run(tmp_path / s.hash).status for s in specs] == ["interrupted", "unfinished", "unfinished"]
        calm.append(True)
        assert set(sweep(specs, tmp_path, vectorize=True, progress=False).status) == {"finished"}
    finally: del PROBES["impatient-test"]
    assert vectorized(specs, tmp_path) == [False, True, True]
    assert all(Store(tmp_path).open(s).traces["loss"].steps.tolist() == [0, 1, 2, 3, 4] for s in specs)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_called_elementwise_is(rule):
    "Stacked rows and single networks take the same steps, for every rule that may be stacked."
    from gradnb import Layout, Stream
    layout = Layout(("a", "b", "c"), ((3, 5), (7,), (2, 1, 2, 2)), ("matrix", "vector", "conv"))
    g = (Stream() / "test").generator()
    theta = torch.randn(4, layout.p, generator=g, dtype=torch.float64)
    alone = [(t, rule.init(layout.named(t), dict(zip(layout.names, layout.roles)))) for t in theta]
    state = rule.init({"all": theta}, {"all": "matrix"})
    for _ in range(5):
        grads = torch.randn(4, layout.p, generator=g, dtype=torch.float64)
        blocks, state = rule.step(state, {"all": theta}, {"all": grads})
        theta = blocks["all"]
        for i, (t, s) in enumerate(alone):
            blocks, s = rule.step(s, layout.named(t), layout.named(grads[i]))
            alone[i] = layout.join(blocks.values()), s
            torch.testing.assert_close(theta[i], alone[i][0], rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(row(state, i, layout), s, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(row(pick(state, [3, 1]), 0, layout), alone[3][1], rtol=1e-14, atol=1e-14)
