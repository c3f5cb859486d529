"LAMB, LARS and automatic gradient descent keep every law, with every estimator here, and are parts of a spec."
from copy import copy
from dataclasses import replace
from itertools import islice, pairwise, product

import pytest
import torch

from gradnb.data import load_dataset
from gradnb.move.estimators.minibatch import FullBatch, MiniBatch
from gradnb.move.estimators.sam import SAM
from gradnb.runs.laws import check_rule, check_stepper
from gradnb.models import build_model
from gradnb.problem import Problem
from gradnb.ground.roles import RULES
from gradnb.move.rules.adam import Adam
from gradnb.move.rules.agd import AutomaticGradientDescent
from gradnb.move.rules.fromtorch import FromTorch
from gradnb.move.rules.gd import GD
from gradnb.move.rules.groups import Groups
from gradnb.move.rules.kfac import KFAC
from gradnb.move.rules.lamb import LAMB
from gradnb.move.rules.lars import LARS
from gradnb.move.rules.momentum import Momentum
from gradnb.move.rules.rmsprop import RMSProp
from gradnb.move.rules.schedule import Cosine, Scheduled
from gradnb.runs import Spec, Store
from gradnb.move.steppers import Descent, trajectory

OURS = [LAMB(.01), LAMB.cybertronai(.01, weight_decay=.1), LAMB.timm(.01), LAMB.pytorch_optimizer(.01, weight_decay=.1),
        LAMB(.01, adapt="matrices", weight_decay=.1), LAMB(.01, decay="l2", weight_decay=.1, ratio_high=1., grad_averaging=False),
        LARS(5.), LARS.paper(5., nesterov=True), LARS.timm(.1), LARS.pytorch_optimizer(5.), AutomaticGradientDescent(vectors=True),
        AutomaticGradientDescent(10., 3, True), Scheduled(LAMB.nvlamb(.01), Cosine(10, warmup=2)), Scheduled(LARS(5.), Cosine(10)),
        Groups((("*", LAMB(.01)),))]
PARTED = Groups((("matrix", Scheduled(LAMB.timm(.01), Cosine(20))), ("fc1.*", FromTorch(torch.optim.AdamW, lr=.01)), ("vector", GD(.1))))


@pytest.fixture(scope="module")
def problem():
    digits = load_dataset("digits-200")
    return Problem(build_model("fc-tanh:width=10,depth=1", digits), "mse", digits)


@pytest.mark.parametrize("rule", OURS, ids=repr)
def test_rule(rule):
    check_rule(rule)
    spec = Spec("digits", "fc-tanh", "ce", rule, 3)
    assert Spec.from_json(spec.to_json()) == spec and spec.hash != replace(spec, steps=4).hash


@pytest.mark.parametrize("rule", [*OURS, GD(.1), Momentum(.1, nesterov=True), Adam(), RMSProp(), LARS(5., clip=True, adapt="matrices"), KFAC(.1)], ids=repr)
def test_a_step_reads_no_number(rule):
    "On the meta device a tensor has no value to wait for: .item(), float() and if would raise."
    blocks = {"w": torch.empty(4, 3, device="meta"), "c": torch.empty(5, 4, 3, 3, device="meta"), "b": torch.empty(4, device="meta")}
    state = rule.init(blocks, {})
    for _ in range(3): blocks, state = rule.step(state, blocks, dict(blocks))
    assert all(b.is_meta for b in blocks.values())


def test_roles_are_those_of_the_layout_and_can_be_others(problem):
    "The first weight as an embedding: every row by itself."
    layout, run = problem.layout, lambda p: Descent(AutomaticGradientDescent(vectors=True)).step(p, next(trajectory(p, Descent(
        AutomaticGradientDescent(vectors=True))))).theta
    other = copy(problem)
    other.layout = replace(layout, roles=("embedding", *layout.roles[1:]))
    plain, rows = (layout.named(run(p) - problem.theta0) for p in (problem, other))
    lengths = rows[layout.names[0]].norm(dim=1)
    assert torch.allclose(lengths, lengths.max().expand_as(lengths), rtol=1e-4)
    assert plain[layout.names[0]].norm(dim=1).std() > 1e-2 * plain[layout.names[0]].norm(dim=1).mean()


@pytest.mark.parametrize("rule, estimator", list(product([*OURS, PARTED], [FullBatch(), SAM(.05, MiniBatch(8))])), ids=repr)
def test_composition(rule, estimator, problem): check_stepper(Descent(rule, estimator), problem)


def test_every_group_is_moved_by_its_own_rule_alone(problem):
    "Each block as if its rule moved all of them and were given the gradients of this run."
    run = list(islice(trajectory(problem, Descent(PARTED)), 6))
    for name, rule in zip(problem.layout.names, [PARTED.rules[0][1], PARTED.rules[1][1], PARTED.rules[0][1], PARTED.rules[2][1]]):
        block = {name: problem.layout.named(run[0].theta)[name]}
        state = rule.init(block, {})
        for before, after in pairwise(run):
            grads = problem.layout.named(before.grad)
            if rule is PARTED.rules[0][1]:        # LAMB clips the norm over its group
                scale = torch.stack([grads[n].norm() for n in problem.layout.names if n.endswith("weight")]).norm().clamp(min=1)
                block, state = replace(rule, rule=replace(rule.rule, max_grad_norm=None)).step(state, block, {name: grads[name] / scale})
            else: block, state = rule.step(state, block, {name: grads[name]})
            torch.testing.assert_close(block[name], problem.layout.named(after.theta)[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", [LAMB.timm(.01), AutomaticGradientDescent(vectors=True), PARTED], ids=repr)
def test_a_stored_run_goes_on_bit_for_bit(rule, tmp_path, monkeypatch):
    spec = Spec("digits-100", "fc-tanh:width=8,depth=1", "ce", rule, 12, MiniBatch(16))
    whole = Store(tmp_path / "a").run(spec, progress=False).theta
    from gradnb.move import steppers
    step, left = steppers.Descent.step, [7]

    def stop(self, *args):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        return step(self, *args)
    monkeypatch.setattr(steppers.Descent, "step", stop)
    with pytest.raises(KeyboardInterrupt), pytest.warns(RuntimeWarning, match="interrupted"):
        Store(tmp_path / "b").run(spec, progress=False)
    monkeypatch.undo()
    assert torch.equal(whole, Store(tmp_path / "b").run(spec, progress=False).theta)


def test_words():
    assert RULES.build("lamb:lr=0.1,norm_high=10") == LAMB(.1, norm_high=10)
    assert RULES.build("agd:gain=2,vectors=true") == AutomaticGradientDescent(2, vectors=True)
    assert RULES.build("lars-timm:lr=0.5") == LARS.timm(.5)
    with pytest.raises(ValueError, match="takes no learning rate"): RULES.build("agd:lr=0.1")
