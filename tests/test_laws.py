"Every rule with every estimator keeps every law; a new one is enrolled by one line below."
from itertools import islice, product

import pytest
import torch
from torch import nn

from gradnb import (FromTorch, FullBatch, GD, Adam, Cosine, Descent, MiniBatch, Momentum, Piecewise, PROBES, Problem, RMSProp, Scheduled,
                    build_model, check_estimator, check_probe, check_rule, check_stepper, every, load_dataset, probe, train, trajectory,
                    Store, tail_index, threshold)

RULES = [GD(0.05), Momentum(0.02), Momentum(0.02, 0.5, nesterov=True), Adam(0.01), RMSProp(0.01),
         FromTorch(torch.optim.SGD, lr=0.02, momentum=0.9), FromTorch(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
         FromTorch(torch.optim.Adagrad), FromTorch(torch.optim.NAdam, lr=0.01), FromTorch(torch.optim.Rprop),
         Scheduled(GD(0.05), Piecewise(((2, 0.5),))), Scheduled(FromTorch(torch.optim.SGD, lr=0.1), Cosine(10, warmup=2))]
ESTIMATORS = [FullBatch(), MiniBatch(8), MiniBatch(8, replace=True)]
READY = ["sharpness:every=5", "sharpness:every=5,k=3", "train:every=5", "test:every=5", "grad_norm:every=5"]


@pytest.fixture(scope="module")
def problem():
    digits = load_dataset("digits-200")
    return Problem(build_model("fc-tanh:width=10,depth=1", digits), "mse", digits)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rule(rule): check_rule(rule)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_estimator(estimator, problem):
    check_estimator(estimator)
    check_estimator(estimator, problem, draws=problem.p // 2)


@pytest.mark.parametrize("rule, estimator", list(product(RULES, ESTIMATORS)), ids=repr)
def test_composition(rule, estimator, problem): check_stepper(Descent(rule, estimator), problem)


@pytest.mark.parametrize("name", READY)
def test_probe(name, problem): check_probe(PROBES.build(name), problem)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_no_disturbance(rule, problem):
    @probe(every(3))
    def draws(view): return view.grads(3).norm() + view.updates(3).norm()

    watch = [PROBES.build(name) for name in ("sharpness:every=4", "train:every=4")]
    before = torch.get_rng_state()
    ends = [train(problem, Descent(rule, MiniBatch(16)), 12, probes, progress=False)[0].theta
            for probes in ([], [*watch, draws], [draws, *reversed(watch)])]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    assert torch.equal(before, torch.get_rng_state())


PLAIN = [(torch.optim.SGD, dict(lr=0.1)), (torch.optim.SGD, dict(lr=0.05, momentum=0.9)),
         (torch.optim.SGD, dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)),
         (torch.optim.Adam, dict(lr=1e-2)), (torch.optim.Adam, dict(lr=1e-2, amsgrad=True)),
         (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1)),
         (torch.optim.RMSprop, dict(lr=1e-2)), (torch.optim.RMSprop, dict(lr=1e-2, momentum=0.9, centered=True))]


def loop(module, data, optimizer, batches):
    "A training loop as anybody would write it; the parameters after each step."
    path = []
    for idx in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(data.x[idx]), data.y[idx]).backward()
        optimizer.step()
        path.append(torch.cat([p.detach().reshape(-1).clone() for p in module.parameters()]))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls, hyper", PLAIN, ids=str)
def test_fromtorch_is_a_plain_loop(cls, hyper, dtype):
    digits = load_dataset("digits-200").to(dtype=dtype)
    net = build_model("fc-relu:width=12", digits)
    states = list(islice(trajectory(Problem(net, "ce", digits), Descent(FromTorch(cls, **hyper), MiniBatch(20))), 16))
    batches = [MiniBatch(20).sample((), Problem(net, "ce", digits), s).idx for s in train_streams(15)]
    path = loop(net, digits, cls(net.parameters(), **hyper), batches)
    assert all(torch.equal(state.theta, theta) for state, theta in zip(states[1:], path, strict=True))


def train_streams(n):
    from gradnb import Stream
    return [Stream(0) / "train" / k / "batch" for k in range(n)]


OURS = [(GD(0.1), torch.optim.SGD, dict(lr=0.1)), (Momentum(0.05, 0.9), torch.optim.SGD, dict(lr=0.05, momentum=0.9, fused=True)),
        (Momentum(0.05, 0.9, nesterov=True), torch.optim.SGD, dict(lr=0.05, momentum=0.9, nesterov=True, fused=True)),
        (Adam(1e-2), torch.optim.Adam, dict(lr=1e-2, fused=True)), (RMSProp(1e-2), torch.optim.RMSprop, dict(lr=1e-2, foreach=False))]


@pytest.mark.parametrize("ours, cls, hyper", OURS, ids=str)
def test_our_rules_are_torchs(ours, cls, hyper, problem):
    runs = (trajectory(problem, Descent(rule, MiniBatch(20))) for rule in (ours, FromTorch(cls, **hyper)))
    for a, b in islice(zip(*runs), 30):
        assert torch.equal(a.theta, b.theta)


def test_two_rules_see_the_same_batches(problem):
    seen = []

    class Spy(MiniBatch):
        def sample(self, state, problem, stream):
            seen.append(super().sample(state, problem, stream).idx)
            return super().sample(state, problem, stream)

    for rule in (GD(0.1), Adam(0.1)):
        list(islice(trajectory(problem, Descent(rule, Spy(5))), 4))
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))
    assert not torch.equal(seen[0], seen[1])


def test_a_probe_in_words_and_what_is_no_learning_rate_and_no_draws(tmp_path):
    check_probe("sharpness:every=5")
    with pytest.raises(ValueError, match="Did you mean 'sharpness'"): check_probe("sharpnes")
    with pytest.raises(TypeError, match="is of a learning rate, got GD"): threshold(GD(.1))
    with pytest.raises(TypeError, match="tail_index takes gradients .*example_grads"): tail_index(Problem(build_model("fc-tanh:width=4", data := load_dataset("digits-60")), "ce", data))
    with Store(tmp_path).record("mine") as run:
        with pytest.raises(ValueError, match=r"a step is a whole number ≥ 0; .* got \{'loss': 1.0\}"): run.log({"loss": 1.}, 3)
