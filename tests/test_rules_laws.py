"LAMB, LARS and automatic gradient descent keep every law, with every estimator here, and are parts of a spec."
import os
import pickle
import signal
from collections import deque
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise, product

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch.utils._pytree import tree_leaves

from gradnb import Dataset, optim, train
from gradnb.bench.harness import peak_bytes
from gradnb.data import load_dataset
from gradnb.move.estimators.minibatch import FullBatch, MiniBatch
from gradnb.move.estimators.sam import SAM
from gradnb.move.estimators.svrg import SVRG
from gradnb.measure.probes.view import every, probe
from gradnb.runs.laws import check_rule, check_stepper, same, stored
from gradnb.models import build_model
from gradnb.problem import Problem
from gradnb.ground.layout import real
from gradnb.ground.roles import RULES, Passing, Rule, State, check_range
from gradnb.ground.streams import Stream
from gradnb.ground.trees import flatten, unflatten
from gradnb.move.rules.adam import Adam
from gradnb.move.rules.ademamix import AdEMAMix
from gradnb.move.rules.agd import AutomaticGradientDescent
from gradnb.move.rules.fromtorch import FromTorch
from gradnb.move.rules.gd import GD
from gradnb.move.rules.groups import Groups
from gradnb.move.rules.inplace import entrywise
from gradnb.move.rules.kfac import KFAC
from gradnb.move.rules.lamb import LAMB
from gradnb.move.rules.lars import LARS
from gradnb.move.rules.momentum import Momentum, MomentumState
from gradnb.move.rules.muon import Muon
from gradnb.move.rules.prodigy import Prodigy
from gradnb.move.rules.rmsprop import RMSProp
from gradnb.move.rules.schedule import Cosine, Scheduled
from gradnb.move.rules.units import PerSharpness
from gradnb.move.rules.schedulefree import ScheduleFreeAdamW, ScheduleFreeSGD
from gradnb.move.rules.shampoo import Shampoo
from gradnb.move.rules.sign import Lion, Signum
from gradnb.move.rules.soap import SOAP
from gradnb.move.rules.sophia import Sophia
from gradnb.move.rules.steepest import SteepestDescent
from gradnb.runs import Spec, Store
from gradnb.runs.record import terminable
from gradnb.move.steppers import Descent, trajectory

OURS = [LAMB(.01), LAMB.cybertronai(.01, weight_decay=.1), LAMB.timm(.01), LAMB.pytorch_optimizer(.01, weight_decay=.1),
        LAMB(.01, adapt="matrices", weight_decay=.1), LAMB(.01, decay="l2", weight_decay=.1, ratio_high=1., grad_averaging=False),
        LARS(5.), LARS.paper(5., nesterov=True), LARS.timm(.1), LARS.pytorch_optimizer(5.), AutomaticGradientDescent(vectors=True),
        PerSharpness(Scheduled(GD(.5), Cosine(10, warmup=2))), AutomaticGradientDescent(10., 3, True), Scheduled(LAMB.nvlamb(.01), Cosine(10, warmup=2)), Scheduled(LARS(5.), Cosine(10)),
        Groups((("*", LAMB(.01)),)), Signum(.01, weight_decay=.1), Lion(.01, weight_decay=.1),
        ScheduleFreeSGD(.1, weight_decay=.1, warmup=2), ScheduleFreeAdamW(.01, r=1., weight_decay=.1), Scheduled(ScheduleFreeAdamW(.01), Cosine(10)),
        AdEMAMix(.01, warmup=2, weight_decay=.1), Prodigy(d0=.01), Prodigy(d0=.01, weight_decay=.1, bias_correction=True, safeguard=True),
        Shampoo(.1, eps=.01), Shampoo(.1, .9, .9, eps=.01, every=2, graft="rmsprop", nesterov=True, weight_decay=.1), Shampoo(.1, graft="adagrad"), SOAP(.01, every=2), SOAP(.01, vectors=True, largest=5),
        Sophia(.01, gamma=1., every=2, weight_decay=.1), SteepestDescent(.01), SteepestDescent(.01, "spectral"), SteepestDescent(.01, "l2", True)]
PARTED = Groups((("matrix", Scheduled(LAMB.timm(.01), Cosine(20))), ("fc1.*", FromTorch(torch.optim.AdamW, lr=.01)), ("vector", GD(.1))))


@pytest.fixture(scope="module")
def problem():
    digits = load_dataset("digits-200")
    return Problem(build_model("fc-tanh:width=10,depth=1", digits), "mse", digits)


@pytest.mark.parametrize("rule", [*OURS, Muon(.02), Muon(.02, polar="svd", weight_decay=.1), Muon.torch()], ids=repr)
def test_rule(rule):
    check_rule(rule)
    spec = Spec("digits", "fc-tanh", "ce", rule, 3)
    assert Spec.from_json(spec.to_json()) == spec and spec.hash != replace(spec, steps=4).hash


@pytest.mark.parametrize("rule", [*OURS, GD(.1), Momentum(.1, nesterov=True), Adam(), RMSProp(), LARS(5., clip=True, adapt="matrices"), KFAC(.1), Muon(.1), Muon.torch()], ids=repr)
def test_a_step_reads_no_number(rule):
    "On the meta device a tensor has no value to wait for: .item(), float() and if would raise."
    blocks = {"w": torch.empty(4, 3, device="meta"), "c": torch.empty(5, 4, 3, 3, device="meta")}
    if not isinstance(rule, Muon): blocks["b"] = torch.empty(4, device="meta")
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


ALL = [*OURS, Groups((("matrix", Muon(.02)), ("*", Adam(.01)))), GD(.1), Momentum(.1, nesterov=True), Adam(.01), RMSProp(.01), PARTED]


def by_one(monkeypatch):
    from gradnb.move.rules import inplace
    monkeypatch.setattr(inplace.pieces, "__defaults__", (False,))       # every block is a piece


@pytest.fixture
def few(monkeypatch): by_one(monkeypatch)


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_a_run_that_is_written_over_is_the_trajectory(problem, rule, monkeypatch):
    "Against states that nothing writes over and whose blocks move all at once, and so is a step for θ alone; the state that a run goes on from stays."
    descent = Descent(rule, MiniBatch(16))
    states = list(islice(trajectory(problem, descent), 6))
    by_one(monkeypatch)
    assert same(descent.step(problem, states[4]), states[5]._replace(grad=None, loss=None, settled=()))
    assert torch.equal(descent.step(problem, Passing(*states[4])).theta, states[5].theta)
    assert same(train(problem, descent, 5, progress=False)[0], states[5])
    middle = states[2]._replace(rule=deepcopy(states[2].rule))
    assert same(train(problem, descent, 5, state=states[2], progress=False)[0], states[5]) and same(states[2].rule, middle.rule)


def test_a_gradient_that_is_left_in_blocks_is_a_vector_to_whoever_looks(problem):
    descent, other = Descent(Adam(.01), MiniBatch(16)), Descent(Adam(.01), SVRG(16, 4))
    truth = list(islice(trajectory(problem, descent), 7))
    state, _ = train(problem, descent, 5, progress=False)
    assert isinstance(state[4], dict) and torch.equal(state.grad, truth[5].grad) and state.step == 5
    for seen in State(*state), Passing(*state), state._replace(loss=truth[5].loss), deepcopy(state), pickle.loads(pickle.dumps(state)): assert same(seen, truth[5])
    assert type(deepcopy(state)) is type(pickle.loads(pickle.dumps(state))) is State and repr(state) == repr(truth[5])
    assert torch.equal(tree_leaves(state)[-2], truth[5].grad)
    for _ in range(2): assert torch.equal(descent.step(problem, state).theta, truth[6].theta)      # which leaves it as it is
    assert same(state, truth[5]) and same(train(problem, descent, 6, state=state, progress=False)[0], truth[6])
    for stepper in descent, other:
        here, there = (stepper.prepare(problem, s._replace(estimator=stepper.init(problem, problem.theta0).estimator), Stream(7)) for s in (state, truth[5]))
        assert same(here, there)


def test_whoever_stands_between_a_problem_and_a_rule_is_heard(problem):
    def decayed(found, theta): return found[0] + theta, found[1]
    class Decayed(Problem):
        def grad_and_loss(self, theta, batch=None): return decayed(super().grad_and_loss(theta, batch), theta)
    class Around:
        def __init__(self, problem): self.problem = problem
        def __getattr__(self, name): return getattr(self.problem, name)
        def grad_and_loss(self, theta, batch=None): return decayed(self.problem.grad_and_loss(theta, batch), theta)
    class Pulled(MiniBatch):
        def estimate(self, state, problem, theta, batch): return decayed(super().estimate(state, problem, theta, batch), theta)

    kind, patched = Decayed(problem.given, problem.per_example, problem.dataset), copy(problem)
    patched.grad_and_loss = Around(problem).grad_and_loss
    truth = next(islice(trajectory(problem, Descent(Momentum(.01), Pulled(16))), 5, None))
    for at, estimator in (problem, Pulled(16)), (kind, MiniBatch(16)), (Around(problem), MiniBatch(16)), (patched, MiniBatch(16)):
        assert same(train(at, Descent(Momentum(.01), estimator), 5, progress=False)[0], truth)


@pytest.mark.parametrize("rule", [r for r in ALL if entrywise(r) and not isinstance(r, PerSharpness)], ids=repr)
def test_a_rule_that_says_so_moves_every_entry_by_itself(rule):
    torch.manual_seed(0)
    blocks, grads = {"w": torch.randn(7, 5), "b": torch.randn(7)}, [{"w": torch.randn(7, 5), "b": torch.randn(7)} for _ in range(3)]
    def ends():
        w, state = blocks, rule.init(blocks, {"w": "matrix", "b": "vector"})
        for g in grads: w, state = rule.step(state, w, g)
        return w
    before = ends()
    grads[1]["w"][3, 2] *= -3
    after = ends()
    moved = before["w"] != after["w"]
    assert moved[3, 2] and moved.sum() == 1 and torch.equal(before["b"], after["b"])


def test_rules_that_sum_over_a_block_do_not_say_so():
    assert {type(r) for r in ALL if entrywise(r)} >= {GD, Momentum, Adam, RMSProp, AdEMAMix, Signum, Lion, ScheduleFreeSGD, ScheduleFreeAdamW, Sophia, Scheduled}
    assert not any(entrywise(r) for r in [*ALL, Muon(.1), KFAC(.1)] if isinstance(r, (LAMB, LARS, AutomaticGradientDescent, Prodigy, Shampoo, SOAP, SteepestDescent, Groups, Muon, KFAC, FromTorch)))
    @dataclass(frozen=True)
    class Normed(Adam):
        apart = True
        def update(self, state, blocks, grads, total, ops): return super().update(state, blocks, grads, total, ops)
    assert not entrywise(Normed()) and not entrywise(Scheduled(LAMB(.01), Cosine(9))) and not entrywise(PARTED) and entrywise(PerSharpness(GD(.5)))


def test_a_step_of_ones_own_is_taken(problem):
    "Of a rule derived from one of ours, or mixed into one, or made of others; each leaves all as it is."
    class Still:
        def step(self, state, blocks, grads): return super().step(state, blocks, {n: torch.zeros_like(g) for n, g in grads.items()})
    class StillAdam(Still, Adam): pass
    class Later(StillAdam): pass
    class Cooled(Scheduled):
        def step(self, state, blocks, grads): return blocks, state
    class Apart(Still, Groups): pass
    class Fixed(PerSharpness):
        def step(self, state, blocks, grads): return blocks, state
    class Alternating(Rule):
        def __init__(self): self.rule, self.rules = "by turns", (GD(0.), GD(0.))
        def step(self, state, blocks, grads): return self.rules[0].step(state, blocks, grads)
    for rule in StillAdam(.01), Later(.01), Cooled(GD(.1), Cosine(9)), Apart((("*", GD(.1)),)), Fixed(GD(.5)), Alternating(), Scheduled(StillAdam(.01), Cosine(9)), Groups((("*", StillAdam(.1)),)):
        assert not entrywise(rule) and torch.equal(train(problem, Descent(rule, MiniBatch(16)), 3, progress=False)[0].theta, problem.theta0), rule
    class Doubled:
        def update(self, state, blocks, grads, total, ops): return super().update(state, blocks, {n: g * 2 for n, g in grads.items()}, total, ops)
    class DoubledGD(Doubled, GD): pass
    assert not DoubledGD.over and same(train(problem, Descent(DoubledGD(.1)), 3, progress=False)[0], train(problem, Descent(GD(.2)), 3, progress=False)[0])


def test_what_others_hold_is_not_written_over(problem, few):
    "A probe that keeps a state, returns arrays of it or looks again later; an estimator that keeps θ; somebody's own record."
    class Keeping(MiniBatch):
        def estimate(self, state, problem, theta, batch):
            thetas.append(theta)
            views.append(problem.layout.named(theta)["fc1.weight"])
            return super().estimate(state, problem, theta, batch)

    class Record:
        def append(self, *row): pass
        def checkpoint(self, state, memory, last=False): shown.append(state)

    thetas, views, shown, kept = [], [], [], []
    look = probe(every(2), "moment")(lambda view: kept.append(view.state) or view.state.rule.exp_avg["fc1.weight"])
    states = list(islice(trajectory(problem, Descent(Adam(.01), MiniBatch(16))), 7))
    for record in None, Record():
        for held in thetas, views, kept: held.clear()
        _, traces = train(problem, Descent(Adam(.01), Keeping(16)), 6, look, record=record, progress=False)
        assert all(torch.equal(a, s.theta) for a, s in zip(thetas, states, strict=True))
        assert all(torch.equal(a, problem.layout.named(s.theta)["fc1.weight"]) for a, s in zip(views, states, strict=True))
        assert all(same(a, s) for a, s in zip(kept, states[::2], strict=True))
        rows = [next(iter(traces["moment"].arrays[k].values())) for k in (0, 2, 4, 6)]
        assert all(np.array_equal(row, s.rule.exp_avg["fc1.weight"].numpy()) for row, s in zip(rows, states[::2], strict=True))
    assert all(same(a, s) for a, s in zip(shown, [*states, states[-1]], strict=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_between_two_arrays_waits(problem, number, few):
    @dataclass(frozen=True)
    class Struck(Adam):
        apart = True
        def update(self, state, blocks, grads, total, ops):
            if state.step == 3: os.kill(os.getpid(), number)
            return super().update(state, blocks, grads, total, ops)

    states = list(islice(trajectory(problem, Descent(Adam(.01), MiniBatch(16))), 8))
    with terminable(), pytest.warns(RuntimeWarning, match="interrupted at step 4"):
        state, traces = train(problem, Descent(Struck(.01), MiniBatch(16)), 7, progress=False)
    assert len(traces["loss"]) == 4 and state.step == 4 and torch.equal(state.theta, states[4].theta) and same(state.rule, states[4].rule)
    assert same(train(problem, Descent(Adam(.01), MiniBatch(16)), 7, state=state, progress=False)[0], states[7])


def test_a_run_holds_its_parameters_two_moments_and_a_gradient():
    torch.manual_seed(0)
    x, y = torch.randn(4, 400), torch.randn(4, 400)
    problem = Problem(torch.nn.Sequential(*[torch.nn.Linear(400, 400) for _ in range(8)]), "mse", Dataset(x, y, x, y))
    held = lambda rule: peak_bytes(lambda: train(problem, Descent(rule), 3, progress=False)) / problem.theta0.nbytes
    for rule, copies in (Adam(1e-3), 4), (Scheduled(Adam(1e-3), Cosine(10)), 4), (Groups((("vector", Adam(1e-2)), ("*", Adam(1e-3)))), 4), (AdEMAMix(1e-3), 5), (Lion(1e-3), 3), (GD(1e-4), 2):
        assert held(rule) < copies + .3, rule                   # what two blocks need
    assert held(LAMB(1e-3)) < 5.1                               # a rule that sums over blocks: the gradient once in blocks as it comes, once in a vector
    state = next(trajectory(problem, Descent(Adam(1e-3))))
    assert peak_bytes(lambda: Descent(Adam(1e-3)).step(problem, state)) / problem.theta0.nbytes < 3.15     # the next θ and moments, and what one block needs


KERNELS = [GD(.1), Adam(.01), Momentum(.1), Momentum(.1, nesterov=True)]


def walked(rule, dtype=torch.float32, threads=1, steps=3, lay=lambda t: t, alone=False):
    "Where a rule goes with blocks of odd sizes, in one call or alone, and its state."
    gen = torch.Generator().manual_seed(0)
    draw = lambda: {str(s): torch.randn(s, generator=gen, dtype=dtype) for s in ((3,), (7, 5), (1, 40), (301, 217))}
    blocks, grads, before = draw(), [draw() for _ in range(steps)], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = []
        for some in [[n] for n in blocks] if alone else [list(blocks)]:
            w = {n: lay(blocks[n]) for n in some}
            state = rule.init(w, {})
            for g in grads: w, state = rule.step(state, w, {n: lay(g[n]) for n in some})
            out += [*w.values(), *(t for field in state if isinstance(field, dict) for t in field.values())]
        return sorted(out, key=lambda t: (t.shape, t.sum().item()))
    finally: torch.set_num_threads(before)


def turned(t): return t.t().clone(memory_format=torch.contiguous_format).t() if t.ndim > 1 else t


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", KERNELS, ids=repr)
def test_a_kernel_gives_a_block_the_same_bits_in_any_call_threads_and_place(rule, dtype):
    truth = walked(rule, dtype)
    moved = lambda t: torch.cat([t.new_zeros(5), t.flatten()])[5:].view(t.shape)     # begins where no register does
    for other in dict(alone=True), dict(threads=2), dict(threads=3), dict(lay=moved):
        assert all(map(torch.equal, walked(rule, dtype, **other), truth)), other


@pytest.mark.parametrize("rule", KERNELS, ids=repr)
def test_a_kernel_takes_the_step_of_the_passes(rule, monkeypatch):
    "Wherever the entries lie in memory, and whatever it was asked for."
    truth, close = walked(rule, torch.float64), partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(walked(rule, torch.float64, lay=turned), truth)                              # a view turned in memory
    close(walked(rule, torch.float64, lay=lambda t: torch.stack([t, t], -1)[..., 0]), truth)     # one with holes
    w, g = turned(truth[-1]), truth[-1].sin()
    (one, kept), (other, held) = (rule.step(rule.init({"w": b}, {}), {"w": b}, {"w": d}) for b, d in ((w, g), (w.contiguous(), turned(g))))
    close(one["w"], other["w"])
    close(rule.step(held, one, {"w": g})[0]["w"], rule.step(kept, one, {"w": g})[0]["w"])       # a state that lies otherwise than its block
    z, by = torch.complex(truth[-1], g), torch.tensor(1j, dtype=torch.complex128).conj().imag     # −1, as minus another
    step = lambda w, g: rule.step(rule.init({"w": w}, {}), {"w": w}, {"w": g})[0]["w"]
    close(real(step(z, z.sin().conj())), step(real(z), real(z.sin().conj())))                # a complex block moves as its pairs
    close(step(truth[-1].sum(), by), step(truth[-1].sum(), by.clone()))
    close(torch.compile(step, backend="aot_eager", fullgraph=True)(w, g), step(w, g))
    import gradnb.move.rules.adam
    import gradnb.move.rules.gd
    import gradnb.move.rules.momentum
    for module in gradnb.move.rules.adam, gradnb.move.rules.gd, gradnb.move.rules.momentum: monkeypatch.setattr(module, "fused", lambda *_, **__: None)
    close(walked(rule, torch.float64), truth)


@pytest.mark.parametrize("rule", [*KERNELS, Momentum(.1, 0.), RMSProp(.01), AdEMAMix(.01), SOAP(.01), ScheduleFreeAdamW(.01)], ids=repr)
def test_a_derivative_is_taken_of_every_step(rule):
    "A kernel, or what is written over a root, would lose it without a word."
    gen = torch.Generator().manual_seed(0)
    w, g, d = torch.randn(3, 40, generator=gen, dtype=torch.float64)
    def end(g):
        blocks, state = {"w": w}, rule.init({"w": w}, {})
        for k in range(3): blocks, state = rule.step(state, blocks, {"w": g + g**2 * k})
        return blocks["w"].square().sum()
    slope = (end(g + 1e-6 * d) - end(g - 1e-6 * d)) / 2e-6
    asked = g.clone().requires_grad_()
    for found in torch.autograd.grad(end(asked), asked)[0] @ d, torch.func.grad(end)(g) @ d, torch.func.jvp(end, (g,), (d,))[1]:
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-8)


def test_words():
    assert RULES.build("lamb:lr=0.1,norm_high=10") == LAMB(.1, norm_high=10)
    assert RULES.build("agd:gain=2,vectors=true") == AutomaticGradientDescent(2, vectors=True)
    assert RULES.build("lars-timm:lr=0.5") == LARS.timm(.5)
    with pytest.raises(ValueError, match="takes no learning rate"): RULES.build("agd:lr=0.1")


class Lookahead(torch.optim.Optimizer):
    "Slow weights around an optimizer of its own: a count, tensors, a queue, ids as keys, a generator and its own lr, none of it in `state`."
    def __init__(self, params, lr=.1, every=3):
        super().__init__(params, dict(lr=lr))
        self.fast, self.every, self.k, self.past = torch.optim.SGD(self.param_groups, lr=lr, momentum=.9), every, 0, deque(maxlen=2)
        self.ps = [p for g in self.param_groups for p in g["params"]]
        self.slow, self.gen = {id(p): p.detach().clone() for p in self.ps}, torch.Generator().manual_seed(1)

    @torch.no_grad()
    def step(self, closure=None):
        self.fast.step()
        self.k += 1
        self.past.append(self.ps[0].clone())
        self.param_groups[0]["lr"] *= .9
        for p in self.ps: p.add_(torch.randn(p.shape, generator=self.gen, dtype=p.dtype), alpha=.01)
        if self.k % self.every == 0:
            for p in self.ps: p.copy_(self.slow[id(p)].lerp_(p, .5))
            self.ps[0].add_(self.past[0], alpha=-.1)


class OnTheClass(torch.optim.SGD):
    count = 0
    def step(self, closure=None):
        type(self).count += 1
        self.param_groups[0]["lr"] = .1 / type(self).count
        return super().step(closure)


class InASlot(torch.optim.SGD):
    __slots__ = ("count",)
    def step(self, closure=None):
        self.count = getattr(self, "count", 0) + 1
        if self.count % 5 == 0: self.param_groups[0]["lr"] *= .5
        return super().step(closure)


THEIRS = ["ASGD", "AdaShift", "AdamW", "GrokFastAdamW", "Magma", "NAdam", "QHAdam", "Ranger", "ScheduleFreeSGD", "StableAdamW"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cls", [Lookahead, torch.optim.NAdam, torch.optim.ASGD, torch.optim.Rprop, *(getattr(pytorch_optimizer, n) for n in THEIRS)],
                         ids=lambda c: f"{c.__module__}.{c.__name__}" if isinstance(c, type) else str(c))
def test_what_an_optimizer_keeps_travels(cls, dtype):
    "Fourteen steps from states that were stored after each, against a loop that keeps the optimizer; to the last bit."
    gen = torch.Generator().manual_seed(0)
    draw = lambda: {n: torch.randn(*s, generator=gen, dtype=torch.float64).to(dtype) for n, s in dict(w=(6, 4), v=(3, 6)).items()}
    blocks, rule = draw(), FromTorch(cls)
    params = [torch.nn.Parameter(b.clone()) for b in blocks.values()]
    torch.manual_seed(0)
    grads, plain = [draw() for _ in range(14)], cls(params)
    for g in grads:
        for p, x in zip(params, g.values()): p.grad = x.clone()
        plain.step()
    torch.manual_seed(0)
    like = state = rule.init(blocks, {})
    for g in grads: blocks, state = rule.step(stored(state, like), blocks, g)
    assert all(torch.equal(b, p.detach()) for b, p in zip(blocks.values(), params))


@pytest.mark.parametrize("cls", [OnTheClass, InASlot])
def test_what_does_not_travel_is_noticed(cls):
    with pytest.raises(RuntimeError, match="in the state|plain loop"): check_rule(FromTorch(cls, lr=.1))
    check_rule(FromTorch(Lookahead))


def test_what_cannot_travel_is_named():
    class Slots:
        __slots__ = ("n",)
    class Odd(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.thing = Slots()
    with pytest.raises(TypeError, match="a Slots in 'thing'"): FromTorch(Odd, lr=.1).init({"w": torch.ones(2)}, {})


def test_a_schedule_still_has_the_last_word():
    "A learning rate that the optimizer changes stays changed; one that the rule changes is the rule's, as torch's schedulers do."
    blocks, g = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    rule = FromTorch(Lookahead, lr=.1)
    _, state = rule.step(rule.init(blocks, {}), blocks, g)
    assert rule.step(state, blocks, g)[1].optimizer["param_groups"][0]["lr"] == pytest.approx(.081)
    assert replace(rule, lr=.5).step(state, blocks, g)[1].optimizer["param_groups"][0]["lr"] == pytest.approx(.45)


@pytest.mark.parametrize("rule", [LAMB(.01), LAMB.timm(.01), LAMB.pytorch_optimizer(.01), LAMB(.01, eps=0.)], ids=repr)
def test_zero_gradients_in_half_precision(rule):
    blocks = {"w": torch.ones(3, 2, dtype=torch.float16), "v": torch.ones(4, dtype=torch.float16)}
    state = rule.init(blocks, {})
    for k in range(4):
        blocks, state = rule.step(state, blocks, {n: torch.full_like(b, 1e-3 * (k == 2)) for n, b in blocks.items()})
        assert all(b.isfinite().all() for b in blocks.values()), k
    assert not torch.equal(blocks["w"], torch.ones_like(blocks["w"]))


@pytest.mark.parametrize("rule", [*OURS, GD(.1), Momentum(.1), Adam(), RMSProp(), FromTorch(torch.optim.Adam)], ids=repr)
def test_parameters_without_dimension_without_entries_and_with_five_dimensions(rule):
    "The others move as if these were not there, where a rule looks at each alone; and 0-d moves as (1,) does."
    gen, scalar = torch.Generator().manual_seed(0), torch.tensor(2., dtype=torch.float64)
    blocks = {"w": torch.randn(4, 3, generator=gen, dtype=torch.float64), "t": scalar, "e": scalar.new_zeros(0),
              "c": torch.randn(2, 3, 2, 2, 2, generator=gen, dtype=torch.float64)}
    roles, flat = {"w": "matrix", "t": "vector", "e": "vector", "c": "conv"}, blocks | {"t": scalar.view(1)}
    if isinstance(rule, Groups): roles = dict.fromkeys(blocks, "matrix")
    state, other = rule.init(blocks, roles), rule.init(flat, roles)
    for _ in range(3):
        grads = {n: b.cos() for n, b in blocks.items()}
        blocks, state = rule.step(state, blocks, grads)
        flat, other = rule.step(other, flat, {n: g.view(flat[n].shape) for n, g in grads.items()})
    assert blocks["t"].shape == () and blocks["e"].shape == (0,) and blocks["t"].isfinite() and blocks["t"] != 2
    for n in blocks: assert torch.allclose(blocks[n], flat[n].view(blocks[n].shape), rtol=1e-12, atol=0)


def test_a_state_without_names_is_refused():
    class Bare(Momentum):
        def init(self, blocks, roles): return super().init(blocks, roles)._asdict()
        def step(self, state, blocks, grads):
            blocks, state = super().step(MomentumState(**state), blocks, grads)
            return blocks, state._asdict()
    with pytest.raises(RuntimeError, match="keeps a dict as its state; make it a NamedTuple"): check_rule(Bare(.1))


@pytest.mark.parametrize("make", [optim.LAMB, optim.LARS, optim.Adam, optim.RMSProp, optim.Momentum, optim.GD])
def test_a_face_of_a_temperature_and_of_nothing(make):
    "A 0-d parameter moves as one of shape (1,) does."
    ps = [torch.nn.Parameter(t) for t in (torch.tensor(2.), torch.zeros(0), torch.tensor([2.]), torch.ones(2, 1, 2, 1, 2))]
    opt = make(ps, lr=.1)
    for _ in range(3):
        opt.zero_grad()
        sum(p.square().sum() for p in ps).backward()
        opt.step()
    assert ps[0] == ps[2] != 2 and ps[1].shape == (0,) and all(p.isfinite().all() for p in ps)


@pytest.mark.parametrize("name", ["Kron", "ROSE"])
def test_what_cannot_be_stored_is_refused_when_the_rule_is_made(name):
    with pytest.raises(TypeError, match=f"{name} keeps what no stored run could give back.*dtype"): FromTorch(getattr(pytorch_optimizer, name), lr=.01)


def test_a_block_that_a_rule_does_not_take_is_named_with_the_remedy():
    blocks = {"wte": torch.zeros(9, 4), "fc.weight": torch.zeros(4, 4), "fc.bias": torch.zeros(4)}
    roles = {"wte": "embedding", "fc.weight": "matrix", "fc.bias": "vector"}
    with pytest.raises(ValueError, match="block 'wte' is an embedding, .9, 4.*Groups.*groups:matrix="): Muon(.02).init(blocks, roles)
    with pytest.raises(ValueError, match="block 'fc.bias' is a vector, .4,.*Groups"): Muon(.02).init({n: b for n, b in blocks.items() if n != "wte"}, roles)
    with pytest.raises(ValueError, match="block 'wte' is .9, 4., with one above largest=8.*groups:wte=adam"): Shampoo(.1, largest=8).init(blocks, roles)
    state = Groups((("matrix", Muon(.02)), ("wte", Adam()), ("*", Shampoo(.1, largest=8)))).init(blocks, roles)
    assert list(state.states[0].momentum) == ["fc.weight"]


def test_a_wrong_word_names_the_class_as_it_is_called():
    with pytest.raises(ValueError, match=r"^torch\.optim\.SGD does not take lr=-1"): FromTorch(torch.optim.SGD, lr=-1)
    with pytest.raises(ValueError, match=r"^SOAP does not take lr=-1"): FromTorch(pytorch_optimizer.SOAP, lr=-1)


@pytest.mark.parametrize("name", ["SOAP", "SPlus"])
def test_matrices_are_multiplied_as_before_after_a_state_was_stored(name):
    "The layout of an eigenbasis decides roundings: a plain loop, to the last bit."
    gen = torch.Generator().manual_seed(0)
    blocks, grads = {"w": torch.randn(7, 5, generator=gen)}, [{"w": torch.randn(7, 5, generator=gen)} for _ in range(14)]
    rule, params = FromTorch(getattr(pytorch_optimizer, name), lr=.01), [torch.nn.Parameter(blocks["w"].clone())]
    plain, like = getattr(pytorch_optimizer, name)(params, lr=.01), rule.init(blocks, {})
    state = like
    for g in grads:
        params[0].grad = g["w"].clone()
        plain.step()
        blocks, state = rule.step(stored(state, like), blocks, g)
    assert torch.equal(blocks["w"], params[0].detach())


@pytest.mark.parametrize("t", [torch.arange(12.).view(3, 4).T, torch.arange(24.).view(2, 3, 4).permute(2, 0, 1), torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
                               torch.arange(16.).view(4, 4)[::2], torch.ones(3).expand(2, 3), torch.zeros(0, 3).T, torch.tensor(1.)])
def test_a_stored_tensor_keeps_its_layout(t):
    kept = {}
    node = flatten((t,), kept)
    back, = unflatten(node, kept)
    assert torch.equal(back, t) and all(v.is_contiguous() for v in kept.values())
    if t.permute(sorted(range(t.ndim), key=lambda d: -t.stride(d))).is_contiguous(): assert back.stride() == t.stride()


@pytest.mark.parametrize("c", [.3, .7, 1.6])
def test_a_rate_in_units_of_the_edge_is_that_rate(c, tmp_path):
    "The run is the one at the learning rate that LAPACK's largest eigenvalue gives, resumed or not; its probes know the threshold."
    from gradnb import Problem, Spec, Store, build_model, load_dataset, train
    problem = Problem(build_model("fc-tanh:width=4,depth=1", data := load_dataset("digits-60")).double(), "mse", data)
    top = float(torch.linalg.eigvalsh(problem.hvp(problem.theta0, torch.eye(problem.p, dtype=torch.float64)))[-1])
    stepper = Descent(PerSharpness(GD(c), tol=1e-10))
    state, traces = train(problem, stepper, 12, ["directional_sharpness:every=6"])
    plain = train(problem, Descent(GD(2 * c / top)), 12)[0]
    torch.testing.assert_close(state.theta, plain.theta, rtol=1e-8, atol=1e-9)
    assert traces["directional_sharpness"].columns["threshold"] == pytest.approx([top / c] * 3, rel=1e-9)
    half = train(problem, stepper, 5)[0]
    assert torch.equal(train(problem, stepper, 12, state=half)[0].theta, state.theta)
    spec = Spec("digits-60", "fc-tanh:width=4", "mse", PerSharpness(GD(c)), 3)
    assert Spec.from_json(spec.to_json()) == spec and Store(tmp_path).run(spec).manifest["status"] == "finished"


def test_what_a_rule_of_ones_own_forgets_is_said():
    @dataclass(frozen=True)
    class Mine(Rule):
        lr: float
        def __post_init__(self): check_range(self, "lr", 0)
        def step(self, state, blocks, grads):
            moved = {k: b - self.lr * grads[k] for k, b in blocks.items()}
            return moved if self.lr == 1 else (moved, state, 0) if self.lr == 2 else ({k: v for k, v in moved.items() if k != "fc1.weight"}, state)
    data = load_dataset("digits-60")
    problem = Problem(build_model("fc-tanh:width=4", data), "ce", data)
    with pytest.raises(TypeError, match="Mine.step must return two things, .* returned a dict"): train(problem, Descent(Mine(1.)), 1)
    with pytest.raises(TypeError, match="returned a tuple of 3;"): train(problem, Descent(Mine(2.)), 1)
    with pytest.raises(ValueError, match="Mine.step returned no block 'fc1.weight'"): train(problem, Descent(Mine(.5)), 1)
    with pytest.raises(ValueError, match=r"got lr=(np.float32\()?0.5\)?; write lr=float\(lr\)"): Mine(np.float32(.5))
    with pytest.raises(ValueError, match=r"got lr=(np.float64\()?-1.0\)?\.$"): Mine(np.float64(-1.))
    with pytest.raises(ValueError, match=r"got size=np.int64\(8\); write size=int\(size\)"): MiniBatch(np.int64(8))
    with pytest.raises(ValueError, match=r"loss mse_loss cannot read outputs of shape \(8, 10\) with targets of shape \(8,\)"):
        Problem(build_model("fc-tanh:width=4", data), torch.nn.functional.mse_loss, data)
