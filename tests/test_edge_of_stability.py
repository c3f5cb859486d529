"""The edge of stability against earlier, independent runs of the same tasks.

Initial weights are drawn otherwise here, so that an interval is such a run's number with a margin."""
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gradnb.data import load_dataset
from gradnb.move.estimators.minibatch import MiniBatch
from gradnb.move.estimators.sam import SAM
from gradnb.move.flows.gradient import GradientFlow
from gradnb.move.flows.integrators import Chebyshev
from gradnb.models import build_model
from gradnb.measure.probes.view import PROBES
from gradnb.problem import Problem
from gradnb.move.rules.adam import Adam
from gradnb.move.rules.gd import GD
from gradnb.move.rules.momentum import Momentum
from gradnb.move.rules.rmsprop import RMSProp
from gradnb.move.rules.schedule import Piecewise, Scheduled
from gradnb.move.steppers import Descent, trajectory
from gradnb.runs.training import train
from gradnb.measure.trajectories import first_crossing

pictures = pytest.mark.skipif(not Path(os.environ.get("GRADNB_DATA", "nowhere"), "cifar10-5k.npz").exists(),
                              reason="needs cifar10-5k.npz in GRADNB_DATA")


def sharpness_of(dataset, model, stepper, steps, loss="mse", every=20, probe="preconditioned_sharpness"):
    "Steps, and the sharpness in units of the threshold."
    data = load_dataset(dataset)
    net = build_model(model, data).to(torch.float64 if dataset.startswith("chebyshev") else torch.float32)
    _, traces = train(Problem(net, loss, data), stepper, steps, [PROBES.build(f"{probe}:every={every}")], progress=False)
    assert traces.outcome.kind == "finished" and traces[probe].columns["converged"].all()
    return traces[probe].steps, traces[probe].values / traces[probe].columns["threshold"]


def cifar(n): return f"npz:cifar10-5k.npz{n}"


@pytest.mark.parametrize("degree, lr, many", [(3, .4, 2400), *(pytest.param(d, .2, 8000, marks=pytest.mark.slow) for d in (3, 4, 5))])
def test_polynomials(degree, lr, many):
    "Acceptance 4: the mean of the second half of 8,000 steps was 1.001, 1.013 and 1.017, at twice the rate that of 2,400 steps 1.020."
    steps, ratio = sharpness_of(f"chebyshev-{degree}-20", "regression", Descent(GD(lr)), many, every=40)
    assert ratio[0] < .6 and .98 < ratio[len(ratio) // 2:].mean() < 1.05


@pytest.mark.slow
@pytest.mark.parametrize("stepper, was", [
    (Descent(Adam(1e-3)), .976), (Descent(Adam(3e-3)), .985), (Descent(RMSProp(1e-3)), 1.022), (Descent(GD(.2), SAM(.02)), 1.016),
], ids=["adam 1e-3", "adam 3e-3", "rmsprop", "sam"])
def test_adaptive_rules_and_sam(stepper, was):
    "Acceptance 5, on chebyshev-4-20: within a twentieth of the means (SAM: the median) of the second half."
    steps, ratio = sharpness_of("chebyshev-4-20", "regression", stepper, 8000, every=40)
    assert np.median(ratio[len(ratio) // 2:]) == pytest.approx(was, rel=.05)


@pytest.mark.slow
def test_a_deep_linear_network():
    "With 2/η = 10,000 the mean of the second half of 6,000 steps was 1.009; with 40,000 it never came to the crossing, and ended at 0.73."
    for lr, low, high in ((2e-4, .97, 1.05), (5e-5, .5, .95)):
        ratio = sharpness_of("linear-50-50", "deeplinear", Descent(GD(lr)), 3000, every=60)[1]
        assert low < ratio[len(ratio) // 2:].mean() < high


@pictures
@pytest.mark.slow
@pytest.mark.parametrize("n, lr, steps, start", [("-1k", .02, 2000, 500), ("", .025, 1000, 600)], ids=["A", "B"])
def test_pictures(n, lr, steps, start):
    "Acceptance 1: means of 1.086 and 1.046 from `start` on. When the crossing comes depends on the first weights: B's at 480 there, at 615 here."
    at, ratio = sharpness_of(cifar(n), "fc-tanh", Descent(GD(lr)), steps)
    assert ratio[0] < 1 and 1. < ratio[at >= start].mean() < 1.15
    assert 200 < first_crossing(at, ratio, 1.).value < 800


@pictures
@pytest.mark.slow
def test_a_drop_of_the_rate_sets_the_sharpness_free():
    "Acceptance 2: it rose from 108 at once and hovered at 198–206 from 1,200 steps later, with 2/η = 200."
    at, ratio = sharpness_of(cifar("-1k"), "fc-tanh", Descent(Scheduled(GD(.02), Piecewise(((800, .5),)))), 2600)
    after = ratio[at >= 800]
    assert .45 < after[0] < .6 and (np.diff(after[:20]) > 0).all() and .97 < ratio[at >= 2200].mean() < 1.06


@pictures
@pytest.mark.slow
def test_descent_leaves_the_flow_after_the_crossing():
    "Acceptance 3: 4 units of time after the crossing it is more than ten times as far from the flow as at the crossing."
    data, lr, start = load_dataset(cifar("-1k")), .02, None
    problem, far = Problem(build_model("fc-tanh", data), "mse", data), []
    flow = trajectory(problem, GradientFlow(lr, Chebyshev(1e-5)))
    for a, b in islice(zip(trajectory(problem, Descent(GD(lr))), flow), 800):
        far.append(float((a.theta - b.theta).norm()))
        if start is None and b.rule.sharpness > 2 / lr: start = b.step
        if start is not None and b.step == start + round(4 / lr): break
    assert 200 < start < 600 and far[-1] > 10 * far[start]


@pictures
@pytest.mark.slow
def test_with_the_cross_entropy_the_sharpness_falls_in_the_end():
    "Acceptance 6: it rose to 1.45 of the threshold, and fell below half of it as the loss did."
    at, ratio = sharpness_of(cifar("-1k"), "fc-tanh", Descent(GD(.05)), 1600, "ce")
    assert ratio[0] < .5 and 1. < ratio.max() < 1.6 and ratio[-1] < .5
    assert ratio[(at >= 120) & (at <= 380)].mean() == pytest.approx(1.14, abs=.12)


@pytest.mark.slow
@pytest.mark.parametrize("degree, rule", [(3, Momentum(.2)), (4, Momentum(.05, nesterov=True))], ids=["polyak", "nesterov"])
def test_momentum(degree, rule):
    "Means were 0.944 (Polyak, on chebyshev-5-20, which diverges from the weights here) and 0.963 (Nesterov, chebyshev-4-20)."
    ratio = sharpness_of(f"chebyshev-{degree}-20", "regression", Descent(rule), 4000 * rule.nesterov + 4000, every=40)[1]
    assert .9 < ratio[len(ratio) // 2:].mean() < 1.05 and ratio.max() > 1


def plain(net, loss, x, y, mode, size=1000):
    "Loss and accuracy as a loop in plain torch takes them, batch by batch (gd.py's compute_losses)."
    net.train(mode == "batch")
    with torch.no_grad():
        out = [(net(a), b) for a, b in zip(x.split(size), y.split(size))]
        per = {"ce": lambda o, b: torch.nn.functional.cross_entropy(o, b, reduction="sum"),
               "mse": lambda o, b: .5 * (o - torch.nn.functional.one_hot(b, 10)).square().sum()}[loss]
        return sum(per(*v).item() for v in out) / len(y), sum((o.argmax(1) == b).sum().item() for o, b in out) / len(y)


@pytest.mark.parametrize("loss", ["ce", "mse"])
@pytest.mark.parametrize("stepper, mode", [(Descent(GD(.02)), "batch"), (Descent(GD(.02), SAM(.01)), "batch"), (GradientFlow(.02), "batch"),
                                           (Descent(GD(.02), MiniBatch(30)), "running")])
def test_batchnorm_is_evaluated_as_the_run_descends_it_and_the_trace_says_so(loss, stepper, mode):
    data = load_dataset("digits-90")
    problem = Problem(build_model("cnn-bn-tanh", data), loss, data)
    words = ("train", "test", "train:frozen=false", "train:frozen=true", "test:frozen=true")
    _, traces = train(problem, stepper, 0, words, progress=False)
    fresh = lambda split, mode: plain(build_model("cnn-bn-tanh", data), loss, *((data.x, data.y) if split == "train" else (data.x_test, data.y_test)), mode)
    for name, split, how in (("train", "train", mode), ("test", "test", mode), ("batch_train", "train", "batch"),
                             ("frozen_train", "train", "running"), ("frozen_test", "test", "running")):
        found = {k: v[0] for k, v in traces[name].columns.items()}
        assert (found["loss"], found["accuracy"]) == pytest.approx(fresh(split, how), rel=1e-5), name
        assert found["frozen"] == (how == "running")


def test_the_mode_is_no_column_where_there_is_one_only():
    data = load_dataset("digits-90")
    _, traces = train(Problem(build_model("fc-tanh:width=5", data), "ce", data), Descent(GD(.02)), 0, ["train", "test"], progress=False)
    assert [*traces["train"].columns] == [*traces["test"].columns] == ["loss", "accuracy"]
    with pytest.raises(ValueError, match="frozen is true, false or none, got 'batch'"): PROBES.build("train:frozen=batch")


def test_goals_are_those_of_the_train_probe_and_looked_at_when_asked():
    data = load_dataset("digits-90")
    problem = Problem(build_model("cnn-bn-tanh", data), "ce", data)
    path, traces = train(problem, Descent(GD(.05)), 40, ["train:every=1", "train:every=1,frozen=true"], progress=False)
    losses, frozen = traces["train"].columns["loss"], traces["frozen_train"].columns["loss"]
    for every in (1, 7):
        goal = (losses[14] + losses[13]) / 2
        first = next(k for k in range(0, 41, every) if losses[k] < goal)
        assert next(k for k in range(0, 41, every) if frozen[k] < goal) != first         # the other mode would stop elsewhere
        _, stopped = train(problem, Descent(GD(.05)), 40, loss_goal=goal, goal_every=every, progress=False)
        assert stopped.outcome.kind == "goal" and stopped.outcome.step == first
    with pytest.raises(ValueError, match="goal_every"): train(problem, Descent(GD(.05)), 1, loss_goal=1., goal_every=0)
