"Learning rates of one rule in terms of another: closed forms, the way back, and what is refused."
import pytest
import torch

from gradnb import GD, KFAC, Adam, MiniBatch, Momentum, Muon, Problem, Quadratic, SteepestDescent, build_model, load_dataset, translate
from gradnb.ground.layout import Layout
from gradnb.move.rules.agd import AutomaticGradientDescent
from gradnb.move.rules.rmsprop import RMSProp
from gradnb.move.rules.sophia import Sophia
from gradnb.runs.sweeps.translation import update_size

DOUBLE = torch.float64
BOWL = Quadratic(torch.diag(torch.tensor([3., 1., .2], dtype=DOUBLE)))


def network(bias=True):
    digits = load_dataset("digits-100").to(dtype=DOUBLE)
    torch.manual_seed(0)
    matrices = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6, bias=False), torch.nn.Tanh(), torch.nn.Linear(6, 10, bias=False)).double()
    return Problem(build_model("fc-tanh:width=6,depth=1", digits) if bias else matrices, "ce", digits)


@pytest.mark.parametrize("beta, nesterov", [(.5, False), (.7, True)])
def test_gd_and_momentum(beta, nesterov):
    "By the size 1 − β; by the edge the ratio of their thresholds."
    size = translate(BOWL, GD(1e-6), Momentum(.3, beta, nesterov), steps=60, skip=50)
    assert size.lr == pytest.approx(1e-6 * (1 - beta), rel=1e-3) and size.mismatch < 1e-4 and size.own == pytest.approx(1, abs=1e-3)
    edge = translate(BOWL, GD(1e-6), Momentum(.3, beta, nesterov), by="edge", steps=3, skip=1)
    assert edge.lr == pytest.approx(1e-6 * (1 + beta) / (1 + 2 * beta * nesterov), rel=.02)


@pytest.mark.parametrize("by", ["rms", "spectral", "edge"])
def test_a_rule_into_itself(by):
    "With another rate to begin from; nothing is left open."
    found = translate(network(), RMSProp(2e-3), RMSProp(.7), by, steps=7, skip=4)
    slack = .03 if by == "edge" else 1e-6
    assert found.lr == pytest.approx(2e-3, rel=slack) and found.rule == RMSProp(found.lr) and found.low * (1 - slack) <= 2e-3 <= found.high * (1 + slack)
    assert found.mismatch < slack and found.own == pytest.approx(1, rel=slack) and found.cosine == pytest.approx(1)
    assert found.drift == pytest.approx(1, rel=slack) and list(found.blocks.values()) == pytest.approx([1.] * 4, rel=slack)


def test_there_and_back():
    "The second pilot is another run, so the way back ends within a fifth of where the first began."
    problem = network()
    there = translate(problem, Adam(1e-3), Momentum(.1), steps=40, estimator=MiniBatch(25))
    back = translate(problem, there.rule, Adam(1.), steps=40, estimator=MiniBatch(25))
    assert there.low <= there.lr <= there.high and len(there.rates) == 20
    assert back.lr == pytest.approx(1e-3, rel=.2)


def test_sizes():
    layout = Layout(("w", "b"), ((2, 3), (2,)), ("matrix", "vector"))
    w, b = torch.tensor([[3., 0., 0.], [0., 4., 0.]]), torch.tensor([0., -4.5])
    move = torch.cat([w.flatten(), b])
    assert [update_size(move, layout, by) for by in ("rms", "linf", "l2", "spectral")] == pytest.approx([(45.25 / 8) ** .5, 4.5, 5., 4.5])


def test_steepest_descent_in_two_norms_is_translated_by_its_dual_norms():
    "Of a linear function normalized steps have one length in their own norm, and two in the other's."
    problem = network(bias=False)
    found = translate(problem, SteepestDescent(1e-7, "spectral", True), SteepestDescent(.01, "l2", True), by="spectral", steps=4, skip=2)
    g = [torch.linalg.svdvals(b) for b in problem.layout.named(problem.grad_and_loss(problem.theta0)[0]).values()]
    assert found.lr == pytest.approx(1e-7 / max((s[0] / s.norm()).item() for s in g), rel=1e-3)


@pytest.mark.parametrize("words, why", [
    (dict(into=KFAC(.1, damping=1e-6)), "not make twice the update of KFAC"), (dict(into=Sophia(.01), by="edge"), "there is nothing to match|not make"),
    (dict(into=AutomaticGradientDescent(vectors=True)), "takes no learning rate"), (dict(into=Muon(.01)), "moves matrices"), (dict(into=Adam(), steps=5, skip=5), "6 ≤ steps"),
    (dict(into=Adam(), by="size"), "'size'"), (dict(into=Adam(), every=0), "1 ≤ every")])
def test_what_is_refused(words, why):
    with pytest.raises(ValueError, match=why): translate(network(), GD(.1), **dict(steps=12, skip=4) | words)
