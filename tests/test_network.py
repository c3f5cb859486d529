"Dropout and BatchNorm: training agrees with a plain torch loop, resumes bitwise, and is not disturbed by measuring."
import copy
import functools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from gradnb import (Batch, Dataset, Descent, FullBatch, GD, MiniBatch, Momentum, PROBES, Problem, Stream, build_model, check_problem, grad_variance,
                    load_dataset, sharpness, train, trajectory)
from gradnb.ground import roles
from gradnb.linalg import lanczos
from gradnb.linalg.spectra import spectrum, xtrace
from gradnb.measure.flatness.centre import measure_flatness
from gradnb.measure.noise.coordinates import Moments, gsnr
from gradnb.measure.noise.spread import Spread, noise_scale
from gradnb.move.estimators.sam import SAM
from gradnb.problem.designs import exact_variance
from gradnb.problem import modes
from gradnb.problem.modes import drawing
from gradnb.runs.laws import check_stepper

DIGITS = load_dataset("digits-200")


def network(dropout=0.3, batchnorm=True, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12) if batchnorm else nn.Identity(), nn.Tanh(),
                             nn.Dropout(dropout), nn.Linear(12, 10)).to(dtype)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_batchnorm_trains_as_a_plain_loop():
    plain = network(dropout=0.)
    problem = Problem(copy.deepcopy(plain), "ce", DIGITS)
    opt = torch.optim.SGD(plain.parameters(), lr=.1, momentum=.9)
    for state, _ in zip(trajectory(problem, Descent(Momentum(.1, .9), MiniBatch(20))), range(8)):
        idx = Descent(GD(.1), MiniBatch(20)).estimator.sample((), problem, Stream(0) / "train" / state.step / "batch").idx
        plain.eval()
        with torch.no_grad():
            expected = nn.functional.cross_entropy(plain(DIGITS.x_test.double()), DIGITS.y_test)
        torch.testing.assert_close(torch.tensor(problem.frozen(state.buffers).evaluate(state.theta, "test").loss).double(), expected)
        assert torch.equal(state.buffers["2.running_var"], plain[2].running_var)
        assert state.buffers["2.num_batches_tracked"] == state.step
        plain.train()
        opt.zero_grad()
        nn.functional.cross_entropy(plain(problem.dataset.x[idx]), problem.dataset.y[idx]).backward()
        opt.step()


def test_the_module_and_the_generator_stay_as_they_were():
    module, rng = network(), torch.get_rng_state()
    before = copy.deepcopy(module.state_dict())
    train(Problem(module, "ce", DIGITS, chunk_size=32), Descent(GD(.1), MiniBatch(40)), 5, [PROBES.build("sharpness:every=2")], progress=False)
    assert same(before, module.state_dict()) and torch.equal(rng, torch.get_rng_state()) and module.training


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("estimator", [MiniBatch(30), FullBatch(), SAM(.05, MiniBatch(30))])
def test_running_statistics_move_with_the_gradient_as_in_a_pass_of_their_own(estimator, chunk_size, monkeypatch):
    problem, stepper = Problem(network(), "ce", DIGITS, chunk_size=chunk_size), Descent(GD(.1), estimator)
    state = stepper.init(problem, problem.theta0)
    for k in range(2):
        with monkeypatch.context() as once:
            once.setattr(Problem, "settle", None)
            state = stepper.prepare(problem, state, Stream(k))
        batch = roles.draw(estimator, state.estimator, problem, Stream(k) / "batch")
        assert same(state.settled, problem.settle(state.theta, state.buffers, batch)) and not same(state.settled, state.buffers)
        state = stepper.step(problem, state)


def test_probes_do_not_disturb_and_runs_resume_bitwise():
    problem, stepper = Problem(network(), "ce", DIGITS), Descent(Momentum(.1, .9), MiniBatch(30))
    probes = [PROBES.build(p) for p in ("sharpness:every=3", "sharpness:every=3,frozen=true", "test:every=2")]
    alone, _ = train(problem, stepper, 9, progress=False)
    measured, traces = train(problem, stepper, 9, probes, progress=False)
    half, _ = train(problem, stepper, 5, progress=False)
    resumed, _ = train(problem, stepper, 9, state=half, progress=False)
    for other in (measured, resumed):
        assert torch.equal(alone.theta, other.theta) and same(alone.buffers, other.buffers) and same(alone.settled, other.settled)
    assert set(traces) == {"loss", "sharpness", "frozen_sharpness", "test"}
    assert not (traces["sharpness"].columns["value"] == traces["frozen_sharpness"].columns["value"]).any()


def test_two_rules_see_the_same_masks():
    problem = Problem(network(batchnorm=False), "ce", DIGITS)
    first = [next(trajectory(problem, Descent(rule, FullBatch()))) for rule in (GD(.1), Momentum(.3, .9))]
    assert torch.equal(first[0].grad, first[1].grad)
    assert not torch.equal(first[0].grad, problem.grad_and_loss(problem.theta0)[0])


def test_noise_averages_to_no_bias_of_a_linear_output():
    "E over masks of a linear network's outputs is the network without Dropout."
    module = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(64, 10)).double()
    problem = Problem(module, "mse", DIGITS)
    outs = torch.stack([problem.outputs(problem.theta0, problem.dataset.x[:4], Stream(k)) for k in range(2000)])
    z = (outs.mean(0) - problem.outputs(problem.theta0, problem.dataset.x[:4])) / (outs.std(0) / 2000**.5)
    assert z.square().mean() < 1.6 and z.abs().max() < 4.5


@pytest.mark.parametrize("frozen", [False, True])
def test_curvature_in_both_modes_is_the_dense_hessian(frozen):
    problem = Problem(network(), "ce", DIGITS)
    q = problem.frozen(problem.settle(problem.theta0, problem.buffers)) if frozen else problem
    module = network(dropout=0.)
    if frozen:
        with torch.no_grad(): module(problem.dataset.x)
        module.eval()
    names = problem.layout.names

    def loss(t): return nn.functional.cross_entropy(torch.func.functional_call(module, problem.layout.named(t), (problem.dataset.x,)),
                                                    problem.dataset.y)
    v = torch.randn(problem.p, generator=Stream(5).generator(), dtype=torch.float64)
    _, expected = torch.autograd.functional.vhp(loss, problem.theta0, v)
    torch.testing.assert_close(q.hvp(problem.theta0, v), expected)
    assert names == tuple(n for n, _ in module.named_parameters())


def test_ghost_batches_are_chunks():
    "Chunks normalise by their own statistics, and move the running ones in turn."
    problem, module = Problem(network(dropout=0.), "ce", DIGITS, chunk_size=50), network(dropout=0.)
    losses = [nn.functional.cross_entropy(module(x), y) for x, y in zip(problem.dataset.x.split(50), problem.dataset.y.split(50))]
    torch.testing.assert_close(problem.loss(problem.theta0), torch.stack(losses).mean().detach())
    assert same(problem.settle(problem.theta0, problem.buffers), dict(module.named_buffers()))


def test_laws_hold_with_noise():
    problem = Problem(network(), "ce", DIGITS)
    check_stepper(Descent(GD(.05), MiniBatch(16)), problem)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_stream_is_a_mask(a, b):
    problem = Problem(network(batchnorm=False), "ce", DIGITS)
    loss = [float(problem.loss(problem.theta0, Batch(torch.arange(20), noise=Stream(s)))) for s in (a, b, a)]
    assert loss[0] == loss[2] and (loss[0] == loss[1]) == (a == b)


def test_a_single_example_of_a_coupled_network_is_refused_and_frozen_it_is_not():
    problem = Problem(network(), "ce", DIGITS)
    with pytest.raises(TypeError, match="problem.frozen"): problem.example_grads(problem.theta0)
    assert problem.frozen().example_grads(problem.theta0, Batch(torch.arange(3))).shape == (3, problem.p)


def test_augmentation_is_the_batchs_own_whatever_the_chunks():
    from dataclasses import replace
    data = replace(DIGITS, augment=lambda x, gen: x + torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x))
    whole, parts = (Problem(network(0., False), "ce", data, chunk_size=c) for c in (None, 7))
    batch = Batch(torch.arange(30), noise=Stream(3))
    torch.testing.assert_close(whole.loss(whole.theta0, batch), parts.loss(parts.theta0, batch))
    assert whole.loss(whole.theta0, batch) != whole.loss(whole.theta0, batch._replace(noise=None))
    assert torch.equal(whole.frozen().loss(whole.theta0, batch), whole.loss(whole.theta0, batch._replace(noise=None)))


def test_third_derivatives_that_torch_gets_wrong_are_refused():
    problem = Problem(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LayerNorm(4), nn.Linear(4, 10)), "ce", DIGITS)
    with pytest.raises(TypeError, match="gradnb.models.norms"): problem.curvature_grad(problem.theta0, problem.theta0, problem.theta0)


def test_layers_of_a_frozen_network_see_its_running_statistics():
    data = load_dataset("digits-40")
    problem = Problem(build_model("fc-bn-tanh:width=8,depth=1", data).double(), "ce", data)
    buffers = {k: b + 0.7 if b.is_floating_point() else b for k, b in problem.buffers.items()}
    frozen, one = problem.frozen(buffers), lambda t, i: frozen.piece(t, *next(frozen.chunks(Batch(torch.tensor([i])))))
    truth = torch.stack([torch.func.grad(one)(problem.theta0, i) for i in range(5)])
    got = next(frozen.layer_io(problem.theta0)).example_grads()[:5]
    torch.testing.assert_close(got, truth)
    assert all(torch.equal(b, problem.buffers[k]) for k, b in problem.module.named_buffers())


# --- what a problem owes to the module that it was made of -----------------------------------------------------------

def draw(*shape, name="test"): return torch.randn(*shape, generator=Stream(0, (name,)).generator(), dtype=torch.float64)


def made(cls, *args, **kwargs):
    "A network whose weights are always the same."
    with drawing(Stream(0, (cls.__name__,)), torch.device("cpu")): return cls(*args, **kwargs).double()


def slope(problem, theta, v, h=1e-6, batch=None): return (problem.loss(theta + h * v, batch) - problem.loss(theta - h * v, batch)) / (2 * h)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 10)

    def forward(self, x, run=lambda f, h: f(h)):
        h = self.a(x.flatten(1))
        return self.o(h + run(self.block, h))

    def block(self, h): return self.b(h).tanh()


class Checkpointed(Base):
    def forward(self, x): return super().forward(x, lambda f, h: checkpoint(f, h, use_reentrant=False))


class Reentrant(Base):
    def forward(self, x): return super().forward(x, lambda f, h: checkpoint(f, h, use_reentrant=True))


class ReentrantFirst(Base):
    def forward(self, x): return self.o(checkpoint(self.a, x.flatten(1).detach().requires_grad_(), use_reentrant=True).tanh() + self.b.bias)


class Dropping(Base):
    def __init__(self): super().__init__(); self.drop = nn.Dropout(.3)
    def block(self, h): return self.drop(self.b(h).tanh())


class DroppingCheckpointed(Dropping, Checkpointed): pass


class Implicit(Base):
    "A fixed point z = tanh(.3 b(z) + u), whose gradient a hook computes (the layer of deep equilibrium models)."
    def block(self, u):
        f = lambda z: torch.tanh(.3 * self.b(z) + u)
        with torch.no_grad():
            z = torch.zeros_like(u)
            for _ in range(80): z = f(z)
        z = f(z)
        if z.requires_grad:
            start = z.detach().requires_grad_()
            again = f(start)
            def solve(g):
                y = g
                for _ in range(80): y = torch.autograd.grad(again, start, y, retain_graph=True)[0] + g
                return y
            z.register_hook(solve)
        return z


class Listed(Base):
    def __init__(self): super().__init__(); self.ws = [self.b.weight]
    def block(self, h): return (h @ self.ws[0].T + self.b.bias).tanh()


class Closed(Base):
    def __init__(self):
        super().__init__()
        w = self.b.weight
        self.through = lambda h: (h @ w.T + self.b.bias).tanh()
    def block(self, h): return self.through(h)


class Bound(Base):
    def __init__(self): super().__init__(); self.table = (dict(f=self.b), functools.partial(F.linear, weight=self.o.weight))
    def forward(self, x):
        h = self.a(x.flatten(1))
        return self.table[1](h + self.table[0]["f"](h).tanh()) + self.o.bias


class Unregistered(Base):
    def __init__(self): super().__init__(); self.layers = [nn.Linear(12, 12).double()]
    def block(self, h): return self.layers[0](self.b(h)).tanh()


LIVE = made(nn.Linear, 12, 12)


class Foreign(Base):
    def block(self, h): return self.b(LIVE(h)).tanh()


class Detached(Base):
    def block(self, h): return self.b(h.detach()).tanh() + (h @ self.b.weight.detach()).sigmoid()


class Blind(Base):
    @torch.no_grad()
    def block(self, h): return self.b(h).tanh()


class Halving(Base):
    def block(self, h):
        if h.requires_grad: h.register_hook(lambda g: g / 2)
        return self.b(h).tanh()


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x.sin()
    @staticmethod
    def backward(ctx, g): return 1.1 * g * ctx.saved_tensors[0].cos()


class ByHand(Base):
    def block(self, h): return Wrong.apply(self.b(h))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w): return (8 * w).round() / 8
    @staticmethod
    def backward(ctx, g): return g


class StraightThrough(Base):
    def block(self, h): return F.linear(h, Rounded.apply(self.b.weight), self.b.bias).tanh()


class Counting(Base):
    calls = 0
    def block(self, h): self.calls += 1; return self.calls * self.b(h).tanh()


class Owning(Base):
    gen = np.random.default_rng(0)
    def block(self, h): return float(self.gen.random()) * self.b(h)


class FunctionDropout(Base):
    def block(self, h): return F.dropout(self.b(h).tanh(), .3, self.training)


class Careless(Base):
    "Forgets that Dropout is to stop in evaluation mode."
    def block(self, h): return F.dropout(self.b(h).tanh(), .3)


class Reparametrised(Base):
    "As in a variational autoencoder."
    def block(self, h): return h + torch.randn_like(h) * self.b(h).exp() if self.training else h


class Bernoulli(Base):
    def block(self, h): return self.b(h).tanh() * torch.bernoulli(torch.full_like(h, .5))


class DropPath(nn.Module):
    def forward(self, h): return h * h.new_empty(len(h), 1).bernoulli_(.7) / .7 if self.training else h


class Stochastic(Base):
    def __init__(self): super().__init__(); self.path = DropPath()
    def block(self, h): return self.path(self.b(h).tanh())


class FusedAttention(Base):
    def block(self, h):
        h = self.b(h).view(-1, 1, 3, 4)
        return F.scaled_dot_product_attention(h, h, h, dropout_p=.4 if self.training else 0.).flatten(1)


class Encoder(nn.Module):
    def __init__(self, dropout=.3):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, activation="gelu", batch_first=True)
        self.body, self.o = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10)
    def forward(self, x): return self.o(self.body(x.view(-1, 8, 8)).flatten(1))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, dropout=0.):
        super().__init__()
        self.r, self.o = kind(8, 6, 2, batch_first=True, dropout=dropout), nn.Linear(6, 10)
    def forward(self, x): return self.o(self.r(x.view(-1, 8, 8))[0][:, -1])


class Numbers(nn.Module):
    "Parameters without dimensions, without entries, tied, and without use."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o, self.idle = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 10), nn.Linear(3, 3)
        self.scale, self.rezero, self.empty, self.twin = nn.Parameter(torch.tensor(2.)), nn.Parameter(torch.tensor(0.)), nn.Parameter(torch.zeros(0, 3)), nn.Linear(12, 12)
        self.twin.weight = self.b.weight
    def forward(self, x):
        h = self.a(x.flatten(1))
        return self.o(h * self.scale + self.rezero * self.twin(self.b(h).tanh())) + self.empty.sum()


class Averaging(Base):
    "Assigns a buffer, where BatchNorm would write into it."
    def __init__(self): super().__init__(); self.register_buffer("mean", torch.zeros(12))
    def block(self, h):
        if self.training: self.mean = .9 * self.mean + .1 * h.detach().mean(0)
        return self.b(h if self.training else h - self.mean).tanh()


RIGHT = [Checkpointed, DroppingCheckpointed, Listed, Closed, Bound, FunctionDropout, Careless, Reparametrised, Bernoulli, Stochastic,
         FusedAttention, Encoder, Recurrent, functools.partial(Recurrent, nn.GRU, .4), Numbers, Averaging,
         lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.RReLU(), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)),
         lambda: nn.Sequential(nn.Unflatten(2, (8, 1)), nn.Flatten(3), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 10)),
         lambda: network(.5)]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", RIGHT, ids=lambda k: getattr(k, "__name__", "partial"))
def test_every_law_of_a_problem(kind, mode):
    with drawing(Stream(1), torch.device("cpu")): module = kind()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gradients of single examples|.*batching rule")
        check_problem(getattr(module, mode)(), "ce", load_dataset("digits-20"))


@pytest.mark.parametrize("kind, plain", [(Checkpointed, Base), (Listed, Base), (Closed, Base), (Bound, Base), (DroppingCheckpointed, Dropping)])
def test_what_goes_on_after_the_forward_pass_is_right_far_from_the_start(kind, plain):
    "The same numbers as a plain network of the same weights: at any θ, of any order, by example, by layer, frozen, under noise."
    data = load_dataset("digits-40").to(dtype=torch.float64)
    ours, truth = made(kind), made(plain)
    ours.load_state_dict(truth.state_dict())
    ours, truth = Problem(ours, "ce", data), Problem(truth, "ce", data)
    theta, V = truth.theta0 + draw(truth.p), draw(truth.p, 2, name="v")
    for p, q in ((ours, truth), (ours.frozen(), truth.frozen())):
        torch.testing.assert_close(p.grad_and_loss(theta), q.grad_and_loss(theta))
        torch.testing.assert_close(p.hvp(theta, V), q.hvp(theta, V))
        torch.testing.assert_close(p.at(theta).quadratic(V), q.at(theta).quadratic(V))
        torch.testing.assert_close(p.at(theta).ggn(V), q.at(theta).ggn(V))
        torch.testing.assert_close(p.curvature_grad(theta, V[:, 0], V[:, 1]), q.curvature_grad(theta, V[:, 0], V[:, 1]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(p.example_grads(theta), q.example_grads(theta))
    if kind in (Checkpointed, DroppingCheckpointed):
        torch.testing.assert_close(next(ours.layer_io(theta)).sq_norms(), truth.example_grads(theta).square().sum(1))
    noisy = Batch(torch.arange(40), noise=Stream(4))
    torch.testing.assert_close(ours.grad_and_loss(theta, noisy), truth.grad_and_loss(theta, noisy))
    first, other = ours.at(theta), ours.at(truth.theta0)                  # two graphs that are kept at once
    torch.testing.assert_close(first.hvp(V) + 0 * other.grad[0], truth.hvp(theta, V))


def test_training_with_checkpoints_is_training():
    paths = [train(Problem(made(kind), "ce", DIGITS), Descent(GD(.5)), 60, progress=False)[0].theta for kind in (Checkpointed, Checkpointed)]
    module = made(Checkpointed)
    opt = torch.optim.SGD(module.parameters(), lr=.5)
    for _ in range(60):
        opt.zero_grad()
        F.cross_entropy(module(DIGITS.x.double()), DIGITS.y).backward()
        opt.step()
    plain = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    assert torch.equal(*paths)
    torch.testing.assert_close(paths[0], plain, rtol=1e-9, atol=1e-11)


class Normed(Base):
    "Of a function that is computed again, and that calls what has no second derivative, or a wrong one."
    def __init__(self, again=True): super().__init__(); self.g, self.again = nn.Parameter(torch.ones(12, 1)), again
    def block(self, h): return F.linear(h, torch._weight_norm(self.b.weight, self.g, 0)).tanh()
    def forward(self, x): return super().forward(x, lambda f, h: checkpoint(f, h, use_reentrant=False) if self.again else f(h))


class Hard(Base):
    "Of a function whose second derivatives torch has not, whose saved tensors look like those of what stands for it."
    def __init__(self, again=True): super().__init__(); self.again = again
    def block(self, h): return F.hardsigmoid(self.b(F.hardsigmoid(h)))
    def forward(self, x): return super().forward(x, lambda f, h: checkpoint(f, h, use_reentrant=False) if self.again else f(h))


@pytest.mark.parametrize("kind", [Normed, Hard])
def test_a_checkpointed_function_has_the_derivatives_that_it_has_without(kind):
    ours, truth = (Problem(made(kind, again), "ce", DIGITS) for again in (True, False))
    theta, v = truth.theta0 + .05 * draw(truth.p), draw(truth.p, 2, name="v")
    torch.testing.assert_close(ours.grad_and_loss(theta), truth.grad_and_loss(theta))
    torch.testing.assert_close(ours.hvp(theta, v), truth.hvp(theta, v))
    beside = [ours.grad_and_loss(theta + h * v[:, 0])[0] for h in (1e-6, -1e-6)]
    torch.testing.assert_close(ours.hvp(theta, v[:, 0]), (beside[0] - beside[1]) / 2e-6, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.at(theta).ggn(v), truth.at(theta).ggn(v))


def test_where_a_checkpoint_does_not_show_what_it_computes_again_it_is_refused(monkeypatch):
    monkeypatch.setattr(modes, "again", lambda under: None)
    ours = Problem(made(Normed), "ce", DIGITS)
    with pytest.raises(TypeError, match="it is no module that it computes; let torch.utils.checkpoint have the module"): ours.hvp(ours.theta0, ours.theta0)


@pytest.mark.parametrize("kind", [Implicit, Checkpointed])
def test_gradients_that_are_computed_in_a_hook(kind):
    problem, v = Problem(made(kind), "ce", DIGITS), draw(Problem(made(kind), "ce", DIGITS).p, name="v")
    theta = problem.theta0 + .05 * draw(problem.p)
    torch.testing.assert_close(problem.grad_and_loss(theta)[0] @ v, slope(problem, theta, v), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind, says", [
    (Reentrant, "use_reentrant=False"), (ReentrantFirst, "use_reentrant=False"), (Unregistered, r"shape \(12,.*nn.ModuleList"), (Foreign, r"trainable tensor of shape \(12,.*reach it through self"), (Counting, "two answers"), (Owning, "two answers")])
def test_what_is_no_function_of_the_parameters_is_refused_when_the_problem_is_made(kind, says):
    torch_, numpy_ = torch.get_rng_state(), str(np.random.get_state())
    module = made(kind)
    with pytest.raises(TypeError, match=says): Problem(module, "ce", DIGITS)
    assert torch.equal(torch_, torch.get_rng_state()) and numpy_ == str(np.random.get_state())
    assert all(p.grad is None for p in module.parameters()) and module.training


@pytest.mark.parametrize("kind, says", [
    (Detached, r"gradient of '(a|b)\.weight'.* is not the slope"), (Blind, r"gradient of '(a|b)\.weight'"), (Halving, r"gradient of 'a\.weight', 'a\.bias' is not"),
    (ByHand, r"'b\.weight'.* is not the slope.*backward pass written by hand"), (StraightThrough, "straight-through")])
def test_gradients_that_are_no_slopes_are_measured_and_their_curvature_is_refused(kind, says):
    with pytest.warns(UserWarning, match=says): problem = Problem(made(kind), "ce", DIGITS)
    module, theta = made(kind), problem.theta0
    slopes = torch.autograd.grad(F.cross_entropy(module(DIGITS.x.double()), DIGITS.y), list(module.parameters()), materialize_grads=True)
    g = torch.cat([s.reshape(-1) for s in slopes])
    torch.testing.assert_close(problem.grad_and_loss(theta)[0], g, rtol=1e-9, atol=1e-12)
    for look in (lambda: problem.hvp(theta, theta), lambda: problem.at(theta).ggn(theta), lambda: problem.frozen().at(theta).hvp(theta)):
        with pytest.raises(TypeError, match="is not the slope of the loss.*A Hessian is that of a loss"): look()


class Eighth(torch.autograd.Function):
    "Eight bits, and a backward pass that knows nothing of them."
    @staticmethod
    def forward(ctx, x): return (x * (448 / x.abs().max())).to(torch.float8_e4m3fn).float() * (x.abs().max() / 448)
    @staticmethod
    def backward(ctx, g): return g


class Eighths(Base):
    def __init__(self, moving): super().__init__(); self.moving = moving; self.b.weight.requires_grad_(moving)
    def block(self, h): return F.linear(Eighth.apply(h) if self.moving else h, Eighth.apply(self.b.weight), self.b.bias)


def test_stairs_of_eight_bits_have_no_curvature_and_weights_that_lie_still_on_them_are_no_stairs():
    "In float32, where differences over short steps are rounding, and over longer ones as rough as the stairs."
    with pytest.warns(UserWarning, match="'a.weight'.* is not the slope"): problem = Problem(made(Eighths, True).float(), "ce", DIGITS)
    with pytest.raises(TypeError, match="is not the slope of the loss"): problem.hvp(problem.theta0, problem.theta0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = Problem(made(Eighths, False).float(), "ce", DIGITS)
    assert problem.hvp(problem.theta0, problem.theta0).isfinite().all()


@pytest.mark.parametrize("hook, who", [
    (lambda n: n.a.weight.register_hook(lambda g: g * 0), "a.weight"), (lambda n: n.o.bias.register_post_accumulate_grad_hook(lambda p: 1 / 0), "o.bias"),
    (lambda n: n.b.register_full_backward_hook(lambda m, i, o: 1 / 0), "b"), (lambda n: n.register_full_backward_pre_hook(lambda m, g: 1 / 0), "the network")])
def test_hooks_at_gradients_are_left_out(hook, who):
    module, plain = made(Base), Problem(made(Base), "ce", DIGITS)
    handle, v = hook(module), draw(plain.p)
    with pytest.warns(UserWarning, match=f"hooks at the gradients of {who} are left out"): problem = Problem(module, "ce", DIGITS)
    assert torch.equal(problem.grad_and_loss(plain.theta0)[0], plain.grad_and_loss(plain.theta0)[0]) and torch.equal(problem.hvp(plain.theta0, v), plain.hvp(plain.theta0, v))
    handle.remove()
    with warnings.catch_warnings(): warnings.simplefilter("error"); Problem(module, "ce", DIGITS)


def test_hooks_that_only_look_see_no_measurement_and_those_that_change_something_stay():
    seen = []
    def looking(net):
        for m in net.modules(): m.register_forward_hook(lambda m, i, o: seen.append(o))
        net.b.register_forward_pre_hook(lambda m, args, words: seen.append(args), with_kwargs=True)
        return net
    plain = Problem(made(Base), "ce", DIGITS)
    theta, v = plain.theta0 + .1 * draw(plain.p), draw(plain.p)
    layers = len(list(made(Base).modules()))
    problem = Problem(looking(made(Base)), "ce", DIGITS)
    assert len(seen) == 1 + layers                       # they are asked once what they do
    def everything(p): return p.loss(theta), *p.grad_and_loss(theta), p.hvp(theta, v), p.example_grads(theta), p.frozen().loss(theta)
    for got, want in zip(everything(problem), everything(plain)): assert torch.equal(got, want)
    assert len(seen) == 1 + layers
    def answers(net): net.b.register_forward_hook(lambda m, i, o: 2 * o); return net
    def doubles(m, i, o): o.mul_(2)
    def writes(net): net.b.register_forward_hook(doubles); return net
    twice = made(Base)
    twice.b.register_forward_hook(lambda m, i, o: 2 * o)
    for change in (answers, writes):
        with torch.no_grad(): torch.testing.assert_close(Problem(change(made(Base)), "ce", DIGITS).loss(plain.theta0), F.cross_entropy(twice(DIGITS.x.double()), DIGITS.y))
    seen.clear()
    normed = made(Base)
    nn.utils.weight_norm(normed.b)                                                # whose hook writes the weight, and answers nothing
    weighed = Problem(looking(normed), "ce", DIGITS)
    assert len(seen) == 1 + layers
    moved = weighed.theta0 + .1 * draw(weighed.p)
    assert not torch.equal(weighed.loss(moved), weighed.loss(weighed.theta0))


@pytest.mark.parametrize("module, says", [
    (lambda: torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), "compiled by torch.jit"),
    (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "'1.weight' has no shape.*lazy.*call the network once"),
    (lambda: nn.Linear, "the class Linear"), (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 10)), "writes over its inputs")])
@pytest.mark.filterwarnings("ignore")
def test_modules_that_cannot_be_functions_of_their_parameters(module, says):
    with pytest.raises(TypeError, match=says): Problem(module(), "ce", DIGITS)


@pytest.mark.parametrize("start, later", [("train", "eval"), ("eval", "train")])
def test_the_mode_is_that_of_the_moment_when_the_problem_was_made(start, later):
    "0.907 in training mode without noise, 0.985 in evaluation mode, whatever became of the module since: by torch alone."
    module = getattr(network(dropout=.4), start)()
    problem = Problem(module, "ce", DIGITS)
    plain = getattr(network(dropout=0. if start == "train" else .4), start)()
    with torch.no_grad(): truth = F.cross_entropy(plain(DIGITS.x.double()), DIGITS.y)
    getattr(module, later)()
    before, rng = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    for _ in range(2): torch.testing.assert_close(problem.loss(problem.theta0), truth)
    problem.settle(problem.theta0, problem.buffers)
    assert same(before, module.state_dict()) and torch.equal(rng, torch.get_rng_state()) and module.training == (later == "train")
    assert f"in {dict(train='training', eval='evaluation')[start]} mode" in repr(problem)
    with torch.no_grad():
        for p in module.parameters(): p.zero_()
        module[2].running_var.mul_(9)
    torch.testing.assert_close(problem.loss(problem.theta0), truth)


def test_a_layer_of_another_mode_is_named():
    module = network()
    module[2].eval()
    problem = Problem(module, "ce", DIGITS)
    assert "in training mode, evaluation in 2," in repr(problem) and not problem.buffers


def test_a_tensor_left_with_a_graph_survives_the_copy():
    module = made(Base)
    module.left = [module.a.weight.sum()]
    problem = Problem(module, "ce", DIGITS)
    assert module.left[0].requires_grad and problem.p == sum(p.numel() for p in module.parameters())


def test_frozen_is_evaluation_mode_without_dropout_and_statistics_too():
    class Doubling(Base):
        def block(self, h): return (2 if self.training else 1) * self.b(h)
    module = made(Doubling)
    problem, x = Problem(module, "ce", DIGITS), DIGITS.x[:5].double()
    torch.testing.assert_close(problem.outputs(problem.theta0, x), module(x))
    torch.testing.assert_close(problem.frozen().outputs(problem.theta0, x), module.eval()(x))


# --- draws outside of Dropout ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [FunctionDropout, Careless, Reparametrised, Bernoulli, Stochastic, FusedAttention, Encoder, functools.partial(Recurrent, nn.LSTM, .4)])
def test_draws_come_from_the_stream_and_are_torchs_own(kind):
    "The module itself, run with torch's generator at the stream's state, draws the same."
    with drawing(Stream(1), torch.device("cpu")): module = kind().double()
    problem, idx = Problem(module, "ce", DIGITS), torch.arange(30)
    loss = lambda k: problem.loss(problem.theta0, Batch(idx, noise=Stream(k)))
    rng = torch.get_rng_state()
    assert loss(1) == loss(1) and loss(1) != loss(2) and problem.loss(problem.theta0) == problem.loss(problem.theta0)
    assert torch.equal(rng, torch.get_rng_state())
    with drawing(Stream(1) / 0, torch.device("cpu")), torch.no_grad(): truth = F.cross_entropy(module(DIGITS.x[:30].double()), DIGITS.y[:30])
    torch.testing.assert_close(loss(1), truth)
    train_, half = (train(problem, Descent(Momentum(.05, .9), MiniBatch(16)), n, progress=False)[0] for n in (6, 3))
    assert torch.equal(train_.theta, train(problem, Descent(Momentum(.05, .9), MiniBatch(16)), 6, state=half, progress=False)[0].theta)


@pytest.mark.parametrize("kind, calm", [
    (FunctionDropout, lambda m: m.eval()), (Stochastic, lambda m: m.eval()), (FusedAttention, lambda m: m.eval()),
    (Encoder, lambda m: Encoder(0.)), (functools.partial(Recurrent, nn.LSTM, .4), lambda m: Recurrent(nn.LSTM, 0.))])
def test_without_a_stream_nothing_is_dropped(kind, calm):
    with drawing(Stream(1), torch.device("cpu")): module = kind().double()
    problem = Problem(module, "ce", DIGITS)
    other = calm(module).double()
    other.load_state_dict(module.state_dict())
    with torch.no_grad(): torch.testing.assert_close(problem.outputs(problem.theta0, problem.dataset.x), other(problem.dataset.x))


def test_a_variational_draw_is_fixed_without_a_stream_and_gone_where_evaluation_has_none():
    problem = Problem(made(Reparametrised), "ce", DIGITS)
    with pytest.raises(TypeError, match="draws for a whole batch"): problem.example_grads(problem.theta0)
    assert problem.frozen().example_grads(problem.theta0, Batch(torch.arange(3))).shape == (3, problem.p)


def test_a_loss_that_draws_is_refused():
    with pytest.raises(TypeError, match="loss draws random numbers"):
        Problem(made(Base), lambda out, y: F.cross_entropy(out + torch.randn_like(out), y, reduction="none"), DIGITS)


def test_the_last_straw_is_named_by_check_problem():
    class Writing(Problem):
        def grad_and_loss(self, theta, batch=None):
            with torch.no_grad(): self.given.a.bias.add_(1)
            return super().grad_and_loss(theta, batch)
    class Moving(Problem):
        def loss(self, theta, batch=None): torch.rand(1); return super().loss(theta, batch)
    class Forgetful(Problem):
        def grad_and_loss(self, theta, batch=None):
            grad, loss = super().grad_and_loss(theta, batch)
            return grad.where(torch.arange(self.p) >= 30, 0), loss
    for cls, says in ((Writing, "writes into the module it was made of: a.bias"), (Moving, "moves the global generator of torch"),
                      (Forgetful, "do not average to its gradient in 'a.weight'")):
        with pytest.raises(RuntimeError, match=says): check_problem(cls(made(Base), "ce", DIGITS))
    class Scaled(Problem):
        def hvp(self, theta, v, batch=None): return 1.1 * super().hvp(theta, v, batch)
    with pytest.raises(RuntimeError, match="product that is not the slope of its gradient"): check_problem(Scaled(made(Base), "ce", DIGITS))
    with pytest.raises(TypeError, match="no differences of the gradient"): check_problem(made(Implicit), "ce", DIGITS)
    with pytest.raises(TypeError, match="comes with its loss and data"): check_problem(made(Base))


class Pooled(nn.Module):
    def __init__(self, **how): super().__init__(); self.bag, self.o = nn.EmbeddingBag(5, 4, **how), nn.Linear(4, 3)
    def forward(self, x): return self.o(self.bag(x).tanh())


class BiasAlone(Base):
    def __init__(self): super().__init__(); self.shift = nn.Parameter(torch.zeros(12))
    def block(self, h): return F.layer_norm(self.b(h), (12,), weight=None, bias=self.shift)


class Aligned(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.o = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(8, 10)
    def forward(self, x): return self.o(roi_align(self.conv(x), [x.new_tensor([[0., 0., 7., 7.]])] * len(x), 2).flatten(1))


@torch.library.custom_op("gradnb_tests::kernel", mutates_args=())
def kernel(x: torch.Tensor) -> torch.Tensor: return x * x

@torch.library.custom_op("gradnb_tests::kernel_backward", mutates_args=())
def kernel_backward(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor: return 2 * x * g

kernel.register_autograd(lambda ctx, g: kernel_backward(*ctx.saved_tensors, g), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Kernel(Base):
    "An operation of somebody's own, whose backward pass is another."
    def block(self, h): return kernel(self.b(h))


def test_operations_without_second_derivatives_are_named():
    words = torch.randint(5, (20, 6), generator=Stream(3).generator())
    for module, data, says in ((made(Pooled, mode="max"), Dataset(words, words[:, 0] % 3, words, words[:, 0] % 3, 3, words=5), "no second derivative of embedding_bag"),
                               (made(BiasAlone), DIGITS, "add the bias to what it returns"), (made(Aligned), DIGITS, "no second derivative of roi_align"),
                               (made(Kernel), DIGITS, "no second derivative of gradnb_tests.kernel_backward, .* register_autograd")):
        problem = Problem(module, "ce", data)
        assert problem.grad_and_loss(problem.theta0)[0].isfinite().all()
        with pytest.raises(TypeError, match=says): problem.hvp(problem.theta0, problem.theta0)


def test_hard_sigmoids_and_weight_norm_have_products_and_training_keeps_what_is_fused():
    class Hard(Base):
        def block(self, h): return F.hardsigmoid(self.b(h)) * torch._weight_norm(h, h[:, :1], 0)
    class Heard(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None): names.append(func); return func(*args, **(kwargs or {}))
    problem, v, names = Problem(made(Hard), "ce", DIGITS), draw(Problem(made(Base), "ce", DIGITS).p), []
    theta, eps = problem.theta0 + .05 * draw(problem.p, name="theta"), 1e-6
    slope = (problem.grad_and_loss(theta + eps * v)[0] - problem.grad_and_loss(theta - eps * v)[0]) / (2 * eps)
    torch.testing.assert_close(problem.hvp(theta, v), slope, rtol=1e-5, atol=1e-6)
    out = problem.outputs(theta, DIGITS.x[:5].double())
    rows = torch.autograd.functional.jacobian(lambda t: problem.outputs(t, DIGITS.x[:5].double()), theta) @ v
    torch.testing.assert_close(problem.at(theta, Batch(torch.arange(5))).ggn(v) @ v, (rows * (out.softmax(1) * (rows - (out.softmax(1) * rows).sum(1, True)))).sum() / 5)
    with Heard(): problem.grad_and_loss(theta)
    assert F.hardsigmoid in names and torch._weight_norm in names and F.relu6 not in names and problem.kinks == ("Hardsigmoid",)


@pytest.mark.parametrize("how", [dict(mode="mean"), dict(mode="sum", padding_idx=2), dict(mode="mean", padding_idx=-1)])
@pytest.mark.parametrize("offsets", [False, True])
def test_bags_of_embeddings_have_products(how, offsets):
    "With offsets, every other bag empty, and without, and with weights where there is a sum: the fused operation's values and gradients; products are differences of gradients."
    words, y = torch.randint(5, (12, 3), generator=Stream(3).generator()), torch.arange(12) % 3
    class Bags(nn.Module):
        def __init__(self): super().__init__(); self.table = nn.Parameter(draw(5, 4))
        def forward(self, x):
            starts = 3 * torch.arange(len(x)).repeat_interleave(2) + torch.tensor([0, 3]).repeat(len(x)) if offsets else None
            share = 1 + x.to(self.table) / 7 if how["mode"] == "sum" else None
            bag = F.embedding_bag(x.reshape(-1) if offsets else x, self.table, starts, per_sample_weights=share.reshape(-1) if offsets and share is not None else share, **how)
            return (bag.view(len(x), -1, 4).sum(1).sin() @ self.table.T)[:, :3]
    problem, v = Problem(Bags(), "ce", Dataset(words, y, words, y, 3, words=5)), draw(20)
    theta, eps = problem.theta0 + .1 * draw(20, name="theta"), 1e-5
    slope = (problem.grad_and_loss(theta + eps * v)[0] - problem.grad_and_loss(theta - eps * v)[0]) / (2 * eps)
    torch.testing.assert_close(problem.hvp(theta, v), slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("frozen", [False, True])
def test_cudnn_is_left_out_of_the_products_of_recurrent_layers_and_stands_as_it_was(monkeypatch, frozen):
    if frozen: monkeypatch.setattr(torch.backends, "__allow_nonbracketed_mutation_flag", False)      # as torch.testing and disable_global_flags leave it
    class Heard(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.gru: on.append(torch.backends.cudnn.enabled)
            return func(*args, **(kwargs or {}))
    class Last(nn.GRU):
        def forward(self, x): return super().forward(x.squeeze(1))[0][:, -1]
    problem, on = Problem(Last(8, 10, batch_first=True).double(), "ce", DIGITS), []
    with Heard(): problem.grad_and_loss(problem.theta0)
    assert on == [True]
    with Heard(): problem.hvp(problem.theta0, problem.theta0)
    assert len(on) > 1 and not any(on[1:]) and torch.backends.cudnn.enabled


class Packed(nn.Module):
    "Numbers of words and floats in one tensor."
    def __init__(self, batchnorm=False):
        super().__init__()
        self.e, self.norm, self.o = nn.Embedding(5, 4), nn.BatchNorm1d(7) if batchnorm else nn.Identity(), nn.Linear(7, 3)
    def forward(self, x): return self.o(self.norm(torch.cat([self.e(x[:, 0].long()), x[:, 1:]], 1)))


@pytest.mark.parametrize("batchnorm", [False, True])
def test_numbers_of_words_among_floats_stay_what_they_are(batchnorm):
    x = torch.cat([torch.arange(20)[:, None] % 5, draw(20, 3)], 1)
    problem = Problem(made(Packed, batchnorm), "ce", Dataset(x, torch.arange(20) % 3, x, torch.arange(20) % 3, 3))
    assert problem.coupled == batchnorm
    if not batchnorm: torch.testing.assert_close(problem.example_grads(problem.theta0).mean(0), problem.grad_and_loss(problem.theta0)[0])


@pytest.mark.parametrize("batch", [torch.arange(3), [0, 1], range(3), 5])
@pytest.mark.parametrize("ask", ["grad_and_loss", "loss", "example_grads"])
def test_a_batch_is_a_batch(ask, batch):
    problem = Problem(made(Base), "ce", DIGITS)
    with pytest.raises(TypeError, match=rf"got {type(batch).__name__}; write Batch"): getattr(problem, ask)(problem.theta0, batch)


@pytest.mark.parametrize("ask, says", [
    (lambda m: sharpness(m, "ce", DIGITS), r"takes a Problem and θ, got Base; write p = Problem\("),
    (lambda m: grad_variance([torch.ones(3), torch.zeros(3)]), r"got a list; write torch.stack")])
def test_what_is_asked_of_the_wrong_thing_says_how_to_ask(ask, says):
    with pytest.raises(TypeError, match=says): ask(made(Base))


@pytest.mark.parametrize("ask", [
    lambda m: noise_scale(m, "ce", DIGITS), lambda m: noise_scale(Problem(m, "ce", DIGITS), None), lambda m: spectrum(m, torch.zeros(3)),
    lambda m: spectrum(Problem(m, "ce", DIGITS), 3), lambda m: xtrace(m, 3), lambda m: lanczos(m, torch.zeros(3)), lambda m: train(m, Descent(GD(.1)), 1),
    lambda m: next(trajectory(m, Descent(GD(.1)))), lambda m: measure_flatness(m, torch.zeros(3)), lambda m: Spread.at(m, torch.zeros(3)),
    lambda m: Moments.at(m, torch.zeros(3)), lambda m: gsnr(m), lambda m: sharpness(nn.CrossEntropyLoss(), DIGITS), lambda m: exact_variance(DIGITS, m, None)])
def test_a_network_where_something_else_is_meant_says_what_to_write(ask):
    with pytest.raises(TypeError, match=r"takes .*, got \w+; write .*(p\.example_grads|\.hvp|p = Problem\(net, loss, data\) and )"): ask(made(Base))


class Centred(nn.Module):
    "A loss that learns."
    def __init__(self, trainable=True):
        super().__init__()
        self.centre = nn.Parameter(torch.ones(10), requires_grad=trainable)
    def forward(self, outputs, targets): return F.cross_entropy(outputs + self.centre, targets, reduction="none")


def test_a_loss_that_learns_is_refused_by_name():
    net, loss = made(Base), Centred()
    for it in (loss, lambda outputs, targets: loss(outputs, targets), lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none") + loss.centre.sum()):
        with pytest.raises(TypeError, match="'centre' of Centred.*part of the network"): Problem(net, it, DIGITS)
    weight = next(net.parameters())
    with pytest.raises(TypeError, match="of Base"): Problem(net, lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none") + weight.square().sum(), DIGITS)
    with pytest.raises(TypeError, match=r"of shape \(10,\)"): Problem(net, functools.partial(lambda c, o, t: F.cross_entropy(o + c, t, reduction="none"), loss.centre), DIGITS)
    still = Problem(net, Centred(False), DIGITS)
    plain = Problem(net, lambda o, t: F.cross_entropy(o + 1, t, reduction="none"), DIGITS)
    torch.testing.assert_close(still.grad_and_loss(still.theta0), plain.grad_and_loss(plain.theta0))
    assert loss.centre.grad is None and weight.grad is None


def test_inference_mode_is_told_and_its_tensors_are_taken():
    problem = Problem(made(Base), "ce", DIGITS)
    want = problem.grad_and_loss(problem.theta0)
    with torch.inference_mode():
        theta = problem.theta0.clone()
        assert torch.equal(problem.loss(theta), want[1])
        for ask in (problem.grad_and_loss, lambda t: problem.at(t).hvp(t), problem.example_grads, lambda t: sharpness(problem, t), lambda t: Spread.at(problem, t),
                    lambda t: Problem(made(Base), "ce", DIGITS)):
            with pytest.raises(RuntimeError, match=r"inference_mode\(\) keeps no graph"): ask(theta)
    assert all(map(torch.equal, problem.grad_and_loss(theta), want))
    assert torch.equal(problem.at(theta).grad, problem.at(problem.theta0).grad)
    with torch.no_grad(): assert all(map(torch.equal, problem.grad_and_loss(problem.theta0), want))


@pytest.mark.parametrize("change", [lambda m: m.eval(), lambda m: m[2].eval(), lambda m: m[4].train()])
def test_the_mode_of_the_copy_is_fixed(change):
    problem = Problem(network(), "ce", DIGITS)
    frozen = problem.frozen()
    before = frozen.loss(problem.theta0)
    change(problem.module)
    with pytest.raises(RuntimeError, match=r"train\(\) or eval\(\) on problem.module"): problem.loss(problem.theta0)
    assert torch.equal(frozen.loss(problem.theta0), before)


def test_third_derivatives_of_batch_statistics():
    "Refused with the layers' names; with running statistics they are differences of products."
    problem = Problem(network(dropout=0.), "ce", DIGITS)
    u, v = draw(problem.p).double(), draw(problem.p).double() / 7
    with pytest.raises(TypeError, match=r"third derivatives of batch statistics, which '2' .*frozen"): problem.curvature_grad(problem.theta0, u, v)
    still, h = problem.frozen(), 1e-4
    slope = u @ (still.hvp(problem.theta0 + h * v, v) - still.hvp(problem.theta0 - h * v, v)) / (2 * h)
    torch.testing.assert_close(still.curvature_grad(problem.theta0, u, v) @ v, slope, rtol=1e-5, atol=1e-8)
