"A face outside is its rule inside: the same numbers, groups that know each other, and refusals by name."
import copy
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import pytest
import pytorch_optimizer as po
import torch
from torch import Tensor, nn

from gradnb import optim
from gradnb.data import load_dataset
from gradnb.move.estimators.minibatch import MiniBatch
from gradnb.models.inits import agd_init
from gradnb.ground.layout import Layout
from gradnb.models import build_model
from gradnb.problem import Problem
from gradnb.ground.roles import RULES, Rule
from gradnb.move.rules.agd import AutomaticGradientDescent
from gradnb.move.rules.fromtorch import FromTorch
from gradnb.move.rules.lamb import LAMB
from gradnb.move.steppers import Descent, trajectory
from gradnb.ground.streams import Stream

FACES = {name: cls for name, cls in vars(optim).items() if isinstance(cls, type) and issubclass(cls, optim.Face) and cls not in (optim.Face, optim.Sophia)}     # which is shown losses: test_rules_sophia.py
CASES = [("GD", dict(lr=.1)), ("Momentum", dict(lr=.05, nesterov=True)), ("Adam", {}), ("RMSProp", {}), ("LAMB", dict(lr=.01)),
         ("LAMB.paper", {}), ("LAMB.cybertronai", {}), ("LAMB.timm", {}), ("LAMB.apex", {}), ("LAMB.nvlamb", dict(weight_decay=0.)),
         ("LAMB.pytorch_optimizer", dict(weight_decay=.1)), ("LAMB", dict(adapt="matrices", weight_decay=.1)), ("LARS", dict(lr=5.)),
         ("LARS.paper", dict(lr=5.)), ("LARS.timm", dict(lr=.1)), ("LARS.pytorch_optimizer", dict(lr=5.)),
         ("AutomaticGradientDescent", dict(vectors=True)), ("Signum", dict(weight_decay=.1)), ("Lion", {}), ("Muon", dict(lr=.05)), ("Muon.torch", {}),
         ("ScheduleFreeSGD", dict(lr=.1, warmup=3)), ("ScheduleFreeAdamW", dict(weight_decay=.1)), ("AdEMAMix", dict(warmup=5)), ("Prodigy", dict(d0=.01)),
         ("Shampoo", dict(eps=.01, beta=.9, every=3)), ("Shampoo", dict(graft="rmsprop", beta2=.9)), ("SOAP", dict(every=3)),
         ("SteepestDescent", dict(lr=.01)), ("SteepestDescent", dict(lr=.01, norm="spectral"))]


def build(name, **hyper):
    cls, _, maker = name.partition(".")
    return lambda params: getattr(FACES[cls], maker)(params, **hyper) if maker else FACES[cls](params, **hyper)


def rule_of(name, **hyper):
    cls, _, maker = name.partition(".")
    return getattr(FACES[cls].rule, maker)(**hyper) if maker else FACES[cls].rule(**hyper)


@pytest.fixture(scope="module")
def problem():
    digits = load_dataset("digits-200").to(dtype=torch.float64)
    return Problem(build_model("fc-tanh:width=12,depth=2", digits), "ce", digits)


def test_every_rule_has_a_face():
    rules = {cls for cls in RULES.values() if isinstance(cls, type) and issubclass(cls, Rule) and cls.__module__.startswith("gradnb.")}
    assert rules and rules <= {cls.rule for cls in (*FACES.values(), optim.KFAC, optim.Sophia)}
    makers = {f"{cls.__name__}.{k}" for cls in rules - {optim.Sophia.rule} for k, v in vars(cls).items() if isinstance(v, classmethod) and k[0] != "_"}
    assert isinstance(optim.GD([torch.ones(1)], .1), torch.optim.Optimizer) and issubclass(optim.GD, torch.optim.Optimizer) and not issubclass(optim.GD, optim.Adam)
    assert makers <= {name for name, _ in CASES} and {f.rule.__name__ for f in FACES.values()} <= {name for name, _ in CASES}


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("name, hyper", CASES, ids=str)
def test_outside_is_inside(name, hyper, foreach, problem):
    net, data = build_model("fc-tanh:width=12,depth=2", problem.dataset), problem.dataset
    if name.startswith("Muon"):                                        # which moves matrices alone
        net = nn.Sequential(nn.Flatten(), *(nn.Linear(a, b, bias=False, dtype=torch.float64) for a, b in ((64, 12), (12, 11), (11, 10))))
        problem = Problem(net, "ce", data)
    optimizer = build(name, **hyper, foreach=foreach)(net.parameters())
    for state in islice(trajectory(problem, Descent(rule_of(name, **hyper))), 10):
        theta = torch.cat([p.detach().flatten() for p in net.parameters()])
        tolerance = 0 if foreach else 1e-14                            # sums of norms in another order
        assert (state.theta - theta).abs().max() <= tolerance
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data.x), data.y).backward()
        optimizer.step()


def test_a_face_is_a_torch_optimizer_as_a_rule_too(problem):
    runs = [trajectory(problem, Descent(rule, MiniBatch(20))) for rule in
            (LAMB.timm(.02), FromTorch(optim.LAMB, lr=.02, weight_decay=.01, adapt="decayed", max_grad_norm=1.))]
    for a, b in islice(zip(*runs), 6): assert torch.allclose(a.theta, b.theta, rtol=1e-13, atol=1e-15)


def blocks(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*s, generator=gen, dtype=torch.float64)) for s in ((5, 4), (4, 3, 2, 2), (6, 5), (5, 4))]


def stepped(optimizer, params, steps=3):
    for k in range(steps):
        for i, p in enumerate(params): p.grad = torch.full_like(p, 1. + i + k) + p.detach()
        optimizer.step()
    return params


@pytest.mark.parametrize("cls, hyper", [(optim.AutomaticGradientDescent, {}), (optim.LAMB, dict(max_grad_norm=.5))])
def test_groups_know_each_other(cls, hyper):
    one, apart = blocks(), blocks()
    stepped(cls(one, **hyper), one)
    stepped(cls([{"params": apart[:1]}, {"params": apart[1:3]}, {"params": apart[3:], "foreach": False}], **hyper), apart)
    assert all(torch.allclose(a, b, rtol=1e-13, atol=0) for a, b in zip(one, apart))
    alone = blocks()[:1]
    stepped(cls(alone, **hyper), alone)
    assert not torch.allclose(alone[0], one[0], rtol=1e-6)


def test_groups_have_hyperparameters_of_their_own():
    params, halves = blocks(), blocks()
    stepped(optim.AutomaticGradientDescent([{"params": params[:2]}, {"params": params[2:], "gain": 0.}]), params)
    assert torch.equal(params[2], halves[2]) and torch.equal(params[3], halves[3]) and not torch.equal(params[0], halves[0])
    a, b, c = blocks(), blocks(), blocks()
    stepped(optim.LAMB([{"params": a[:2]}, {"params": a[2:], "weight_decay": .5, "lr": .1}], lr=.01), a)
    stepped(optim.LAMB(b, lr=.01), b)
    stepped(optim.LAMB(c, lr=.1, weight_decay=.5), c)
    assert all(torch.equal(x, y) for x, y in zip(a, b[:2] + c[2:]))


def test_roles_of_groups():
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3, bias=False)).double()
    layout, x = Layout.of(net), torch.tensor([0, 1, 1, 5])
    with torch.no_grad():
        nn.utils.vector_to_parameters(agd_init(layout, Stream(0), torch.float64), net.parameters())
    rule, w = AutomaticGradientDescent(), {n: p.detach().clone() for n, p in net.named_parameters()}
    net(x).square().sum().backward()
    expected, _ = rule.step(rule.init(w, dict(zip(layout.names, layout.roles))), w, {n: p.grad for n, p in net.named_parameters()})
    groups = optim.by_role(net)
    assert [g["role"] for g in groups] == ["embedding", "matrix"]
    optimizer = optim.AutomaticGradientDescent(groups)
    optimizer.step()
    assert all(torch.allclose(p, expected[n], rtol=1e-14) for n, p in net.named_parameters())
    assert torch.equal(net[0].weight[2], w["0.weight"][2]) and not torch.equal(net[0].weight[1], w["0.weight"][1])


def test_state_for_analysis():
    params = blocks()
    with torch.no_grad(): params[0].mul_(10)
    optimizer = optim.LAMB.cybertronai(params, lr=.02)
    before = [p.detach().norm().item() for p in params]
    assert before[0] > 10 > before[1]
    stepped(optimizer, params, 1)
    for p, norm in zip(params, before):
        held = optimizer.state[p]
        assert list(held) == ["step", "exp_avg", "exp_avg_sq", "weight_norm", "adam_norm", "trust_ratio"]
        assert all(held[k].shape == () and held[k].dtype == p.dtype for k in ("weight_norm", "adam_norm", "trust_ratio"))
        assert abs(held["weight_norm"].item() - norm) < 1e-12
        assert abs((held["trust_ratio"] * held["adam_norm"]).item() - min(norm, 10)) < 1e-12


@pytest.mark.parametrize("name, hyper", CASES, ids=str)
def test_parameters_and_moments_are_written_over(name, hyper):
    params = blocks()
    optimizer = build(name, **hyper)(params)
    where = lambda: [t.data_ptr() for p in params for t in (p, *optimizer.state[p].values()) if isinstance(t, Tensor) and t.ndim]
    stepped(optimizer, params, 1)
    before = where()
    stepped(optimizer, params, 2)
    assert where() == before


@pytest.mark.parametrize("ours, theirs", [(lambda p: optim.ScheduleFreeSGD(p, lr=.01), lambda p: po.ScheduleFreeSGD(p, lr=.01)),
                                          (lambda p: optim.ScheduleFreeAdamW(p, lr=.01, beta1=.8), lambda p: po.ScheduleFreeAdamW(p, lr=.01, betas=(.8, .999)))])
def test_the_average_is_what_its_authors_evaluate(ours, theirs):
    "Against pytorch_optimizer's train and eval; when it is left nothing has happened, also by an exception; a parameter that was never moved stays."
    (a, b), idle = (blocks(), blocks()), nn.Parameter(torch.ones(2, dtype=torch.float64))
    one, other = ours([*a, idle]), theirs(b)
    stepped(one, a, 5); stepped(other, b, 5)
    before = copy.deepcopy((a, one.state_dict()))
    with pytest.raises(KeyError), one.averaged():
        other.eval()
        for p, q, y in zip(a, b, before[0]): assert torch.allclose(p, q, rtol=1e-7, atol=0) and not torch.allclose(p, y, rtol=1e-4)
        assert torch.equal(idle, torch.ones_like(idle))
        raise KeyError
    assert all(torch.equal(p, y) for p, y in zip(a, before[0])) and str(before[1]) == str(one.state_dict())
    for wrong, why in ((one.step, "leave `with optimizer.averaged"), (lambda: one.averaged().__enter__(), "at the average already")):
        with pytest.raises(RuntimeError, match=why), one.averaged(): wrong()
    assert all(torch.equal(p, y) for p, y in zip(a, before[0])) and str(before[1]) == str(one.state_dict())
    one.step()
    with pytest.raises(TypeError, match="Adam keeps no average"), optim.Adam(blocks()).averaged(): pass


class Halved(NamedTuple):
    step: int
    last: dict[str, Tensor]


@dataclass(frozen=True)
class Halving(Rule):
    "Somebody's own rule, which is no InPlace."
    lr: float

    def init(self, blocks, roles): return Halved(0, {n: torch.zeros_like(b) for n, b in blocks.items()})

    def step(self, state, blocks, grads):
        return {n: b - self.lr / 2 ** state.step * g for n, b in blocks.items() for g in [grads[n]]}, Halved(state.step + 1, dict(grads))


Halving_ = optim.face(Halving, __name__)


def test_a_face_for_ones_own_rule():
    params, w = blocks(), [p.detach().clone() for p in blocks()]
    optimizer = Halving_(params, .1)
    pointers = [p.data_ptr() for p in params]
    for k in range(2):
        for p in params: p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(torch.allclose(p, b - .15, rtol=1e-14) for p, b in zip(params, w)) and pointers == [p.data_ptr() for p in params]
    assert optimizer.state[params[0]]["step"] == 2 and repr(optimizer).startswith("Halving")

    @dataclass(frozen=True)
    class Odd(Rule):
        def init(self, blocks, roles): return [1, "two"]
        def step(self, state, blocks, grads): return blocks, state
    with pytest.raises(TypeError, match="the state of Odd must be a NamedTuple"): stepped(optim.face(Odd)(params), params)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name, hyper", CASES, ids=str)
def test_a_gpu_computes_the_same(name, hyper, dtype, tolerance):
    here, there = blocks(), blocks()
    for p, q in zip(here, there): p.data, q.data = p.data.to(dtype), q.data.to("cuda", dtype)
    with torch.no_grad(): start = [p.clone() for p in here]
    stepped(build(name, **hyper)(here), here)
    torch.cuda.set_sync_debug_mode("error")
    try: stepped(build(name, **hyper)(there), there)
    finally: torch.cuda.set_sync_debug_mode("default")
    for p, q, b in zip(here, there, start): assert (p - q.cpu()).norm() <= tolerance * b.norm() and not torch.equal(p, b)


@pytest.mark.parametrize("name, hyper", CASES, ids=str)
def test_mixed_dtypes(name, hyper):
    mixed, double = blocks()[:3], blocks()[:3]
    for p, dtype in zip(mixed, (torch.bfloat16, torch.float32, torch.float64)): p.data = p.data.to(dtype)
    stepped(build(name, **hyper)(mixed), mixed, 2)
    stepped(build(name, **hyper)(double), double, 2)
    for p, q, b in zip(mixed, double, blocks()):
        rounding = .005 * q.norm() if p.dtype == torch.bfloat16 else 0        # half of a bfloat16's last digit
        assert (q - b).norm() > 0 and (p - q).norm() < .02 * (q - b).norm() + rounding


def test_refusals():
    w, bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match="no argument of LAMB 'weigth_decay'. Did you mean 'weight_decay'"): optim.LAMB([w], weigth_decay=.1)
    with pytest.raises(ValueError, match="takes no learning rate, got lr=0.1"): optim.AutomaticGradientDescent([w], lr=.1)
    with pytest.raises(ValueError, match="takes no learning rate"): optim.AutomaticGradientDescent([{"params": [w], "lr": .1}])
    with pytest.raises(ValueError, match="block 'fc1.bias' has shape .32,."): optim.AutomaticGradientDescent([("fc1.bias", bias)])
    with pytest.raises(ValueError, match="only vectors: .'bias'."):
        loose, bias.grad = optim.AutomaticGradientDescent([("bias", bias)], vectors=True), torch.ones(32)
        loose.step()
    with pytest.raises(ValueError, match="empty parameter list"): optim.LAMB([])
    with pytest.raises(ValueError, match="a parameter group of LAMB is empty"): optim.LAMB([{"params": [w]}, {"params": []}])
    fine = optim.LAMB([w])
    with pytest.raises(ValueError, match="lr=-1"): fine.add_param_group({"params": [bias], "lr": -1.})
    assert len(fine.param_groups) == 1
    w.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(TypeError, match="LAMB takes dense gradients, but that of 0 is sparse"): fine.step()


@pytest.mark.parametrize("name, hyper", CASES, ids=str)
def test_a_state_dict_of_another_rule_is_refused(name, hyper):
    params = blocks()
    optimizer = build(name, **hyper)(params)
    stepped(optimizer, params, 1)
    for other in (torch.optim.SGD(blocks(), lr=.1, momentum=.9), torch.optim.AdamW(blocks()), optim.LAMB(blocks()), optim.LARS(blocks(), 1.)):
        if type(other) is type(optimizer): continue
        held = other.param_groups[0]["params"]
        stepped(other, held, 1)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=type(optimizer).__name__): optimizer.load_state_dict(other.state_dict())
        assert str(before) == str(optimizer.state_dict())
