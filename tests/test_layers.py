"Layers against one gradient at a time: every kind, shape and setting, in float64."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradnb.data import Dataset
from gradnb.measure.noise.spread import Spread, grad_variance, noise_scale
from gradnb.problem.modes import drawing
from gradnb.problem.layers import Convolution, Layer, Linear
from gradnb.models import build_model
from gradnb.problem import Problem, Quadratic
from gradnb.ground.roles import Batch
from gradnb.ground.streams import Stream


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=Stream(seed).generator(), dtype=torch.float64)


class Tokens(nn.Module):
    "Floating inputs read as tokens, so that a data set can hold them."
    def forward(self, x):
        return (x.abs() * 3).long() % 7


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        return self.out((x + self.mix(x, x, x, need_weights=False)[0]).mean(1))


class Loop(nn.Module):
    "A recurrent network by hand: the same layers at every position."
    def __init__(self):
        super().__init__()
        self.step, self.norm, self.out = nn.Linear(11, 5), nn.LayerNorm(5), nn.Linear(5, 4)

    def forward(self, x):
        h = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            h = self.norm(torch.tanh(self.step(torch.cat([x[:, t], h], 1))))
        return self.out(h)


class Skips(nn.Module):
    "A layer that is never called, and one whose output counts for nothing."
    def __init__(self):
        super().__init__()
        self.idle, self.lost, self.out = nn.Linear(6, 2), nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, x):
        self.lost(x)
        return self.out(x) + self.lost(x).detach().sum(1, keepdim=True)


class Direct(nn.Module):
    "A parameter of its own above other layers: the whole is one layer."
    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(6)), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(x * self.scale)


def frozen(net, *names):
    for name in names:
        net.get_parameter(name).requires_grad_(False)
    return net


def conv(dim, *args, **kwargs):
    return nn.Sequential(getattr(nn, f"Conv{dim}d")(*args, **kwargs), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4))


NETS = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear, no bias": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(inplace=True), nn.Linear(5, 4)), (6,)),
    "positions, few": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Flatten(), nn.Linear(18, 4)), (2, 6)),
    "positions, many": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(60, 4)), (4, 5, 2)),
    "conv": (lambda: conv(2, 3, 4, 3), (3, 7, 6)),
    "stride, padding, dilation": (lambda: conv(2, 3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)), (3, 7, 6)),
    "groups": (lambda: conv(2, 4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "depthwise, no bias": (lambda: conv(2, 4, 8, 3, groups=4, stride=2, bias=False), (4, 7, 7)),
    "same": (lambda: conv(2, 2, 3, 4, padding="same"), (2, 5, 6)),
    "circular": (lambda: conv(2, 2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 6)),
    "1-d": (lambda: conv(1, 2, 3, 3, stride=2, padding=1), (2, 9)),
    "3-d": (lambda: conv(3, 2, 3, 2), (2, 3, 4, 3)),
    "transposed conv": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Flatten(), nn.LazyLinear(4)), (2, 3, 3)),
    "batch norm, evaluating": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
                                                     nn.Flatten(), nn.LazyLinear(4)).eval(), (2, 5, 5)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.LazyLinear(4)), (2, 5, 5)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4)), (6,)),
    "embedding": (lambda: nn.Sequential(Tokens(), nn.Embedding(7, 3), nn.Flatten(), nn.LazyLinear(4)), (5,)),
    "attention": (Attention, (3, 6)),
    "used again and again": (Loop, (4, 6)),
    "unused": (Skips, (6,)),
    "a parameter on top": (Direct, (6,)),
    "frozen weight": (lambda: frozen(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), "0.weight"), (6,)),
    "frozen bias": (lambda: frozen(conv(2, 2, 3, 3), "0.bias"), (2, 5, 5)),
}


def problem(name, n=7, loss="ce"):
    make, shape = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().double()
        net(draw(2, *shape))                                     # lazy layers learn their size
    x = draw(n, *shape)
    return Problem(net, loss, Dataset(x, torch.arange(n) % 4, x, torch.arange(n) % 4, 4))


def whole(parts, what):
    "One quantity over all parts."
    return torch.cat([getattr(io, what)() for io in parts])


@pytest.mark.parametrize("rows", (None, 3))
@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_layer_equals_brute_force(name, rows):
    prob = problem(name)
    theta = prob.theta0 + 0.1 * draw(prob.p, seed=1)
    g = prob.example_grads(theta)
    parts = list(prob.layer_io(theta, rows=rows))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()))
    close(whole(parts, "example_grads"), g)
    close(whole(parts, "sq_norms"), g.square().sum(1))
    for ours, theirs in zip(map(sum, zip(*(io.moments() for io in parts))), (g.sum(0), g.square().sum(0))):
        close(ours, theirs)
    v, w = draw(prob.p, 3, seed=2), draw(2, 7, seed=3)
    w[0, ::2] = 0
    close(torch.cat([io.dots(v) for io in parts]), g @ v)
    close(torch.cat([io.dots(v[:, 0]) for io in parts]), g @ v[:, 0])
    size = parts[0].n
    close(sum(io.combine(u) for io, u in zip(parts, w.split(size, 1))), w @ g)
    close(torch.cat([torch.cat([a.gram(b) for b in parts], 1) for a in parts]), g @ g.T)
    close(torch.cat([io.neighbours() for io in parts]), torch.cat([(x[1:] * x[:-1]).sum(1) for x in g.split([io.n for io in parts])]))
    for io, h in zip(parts, g.split(size)):
        for part in (slice(0, io.n), slice(io.n - 1, io.n), slice(io.n // 3, io.n)):
            close(io.total(part), h[part].sum(0))
            close(io.total_sq(part), h[part].sum(0).square().sum())
    there = theta + 0.1 * draw(prob.p, seed=4)
    pairs = zip(parts, prob.layer_io(there, rows=rows))
    close(torch.cat([io.paired(other) for io, other in pairs]), (g * prob.example_grads(there)).sum(1))
    close(torch.cat([io.losses for io in parts]).mean(), prob.loss(theta))
    close(sum(io.moments()[0] for io in parts) / prob.n, prob.grad_and_loss(theta)[0])


@pytest.mark.parametrize("name, kinds", [("positions, many", [Linear, Linear]), ("groups", [Convolution, Linear]),
                                         ("group norm", [Convolution, Layer, Linear]), ("frozen weight", [Layer, Linear]),
                                         ("a parameter on top", [Layer])])
def test_a_layer_is_taken_by_the_rule_it_has(name, kinds):
    prob = problem(name)
    io, = prob.layer_io(prob.theta0)
    assert [type(layer) for layer in io.layers] == kinds
    assert [layer.span.start for layer in io.layers[1:]] == [layer.span.stop for layer in io.layers[:-1]]


@pytest.mark.parametrize("name", ("linear", "positions, few", "groups", "layer norm", "used again and again"))
def test_a_sketch_is_linear_and_unbiased(name):
    prob = problem(name)
    io, = prob.layer_io(prob.theta0)
    g = prob.example_grads(prob.theta0)
    parts = torch.cat([part.sketch(32, Stream(5)) for part in prob.layer_io(prob.theta0, rows=4)])
    torch.testing.assert_close(parts, io.sketch(32, Stream(5)), rtol=1e-10, atol=1e-12)       # one map for every part
    grams = torch.stack([(s := io.sketch(32, Stream(6) / k)) @ s.T for k in range(400)])
    z = (grams.mean(0) - g @ g.T) / (grams.std(0) / 400**0.5).clamp_min(1e-12)
    assert z.abs().max() < 4.5, z


def test_a_batch_names_its_examples_and_its_weights_are_ignored():
    prob = problem("linear")
    idx = torch.tensor([5, 1, 1])
    io, = prob.layer_io(prob.theta0, Batch(idx, torch.full((3,), 9.)))
    torch.testing.assert_close(io.example_grads(), prob.example_grads(prob.theta0)[idx])


def test_a_quadratic_has_layers_too():
    bowl = Quadratic(torch.diag(torch.arange(1., 5., dtype=torch.float64)), draw(9, 4))
    io, = bowl.layer_io(bowl.theta0)
    torch.testing.assert_close(io.example_grads(), bowl.H @ bowl.theta0 + bowl.noise)


def test_nothing_is_left_behind():
    prob = problem("conv")
    before = torch.get_rng_state()
    io, = prob.layer_io(prob.theta0)
    io.moments(), io.gram()
    assert not any(m._forward_hooks for m in prob.module.modules())
    assert all(p.grad is None for p in prob.module.parameters()) and torch.equal(before, torch.get_rng_state())
    assert not any(t.requires_grad for layer in io.layers for c in layer.calls for t in (*c.args, *c.grads))


@pytest.mark.parametrize("model", ("fc-tanh", "fc-relu"))
def test_single_precision(model):
    x = draw(50, 1, 8, 8).float()
    data = Dataset(x, torch.arange(50) % 10, x, torch.arange(50) % 10, 10)
    prob = Problem(build_model(model, data, width=20), "mse", data)
    io, = prob.layer_io(prob.theta0)
    torch.testing.assert_close(io.sq_norms(), prob.example_grads(prob.theta0).square().sum(1), rtol=1e-5, atol=1e-6)
    assert io.sketch(16, Stream()).dtype == torch.float32


class Overwrites(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        h = x * 1
        out = self.fc(h)
        h.zero_()
        return out


class Behind(Overwrites):
    def forward(self, x):
        return self.fc(x) + F.linear(x, self.fc.weight)


class Sideways(Overwrites):
    def forward(self, x):
        return self.fc(x.movedim(0, 1)).mean(0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 6), nn.Linear(6, 4)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(self.b(self.a(x)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.words, self.cell, self.out = nn.Embedding(7, 4), kind(4, 3, batch_first=True), nn.Linear(3, 4)

    def forward(self, x):
        return self.out(self.cell(self.words((6.99 * x.sigmoid()).long()))[0][:, -1])


class TiedWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(self.words((6.99 * x.sigmoid()).long()).mean(1).tanh())


def statistics(): return nn.Sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(18, 4))


@pytest.mark.parametrize("net, shape, says", [
    (Behind, (6,), "part of the gradient of 'fc.weight'"), (Sideways, (3, 6), "layer 'fc' was given"), (Tied, (6,), "'b.weight' is tied"),
    (lambda: Recurrent(nn.LSTM), (6,), "layer 'cell' was given"), (lambda: Recurrent(nn.GRU), (6,), "layer 'cell' was given"),
    (TiedWords, (6,), "'out.weight' is tied"), (statistics, (3, 6), "running_mean")])
def test_where_layers_do_not_work_by_example_gradients_are_taken_one_by_one_and_that_is_said_once(net, shape, says):
    with drawing(Stream(2), torch.device("cpu")): net = net().double()
    x = draw(9, *shape)
    prob = Problem(net, "ce", Dataset(x, torch.arange(9) % 4, x, torch.arange(9) % 4, 4))
    theta = prob.theta0
    G = torch.stack([prob.grad_and_loss(theta, Batch(torch.tensor([i])))[0] for i in range(9)])
    with pytest.warns(UserWarning, match=says) as said:
        for _ in range(2): parts = list(prob.layer_io(theta, rows=4))
        spread, rows = Spread.at(prob, theta), prob.example_grads(theta)
    assert len([w for w in said if "one by one" in str(w.message)]) == 1
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    close(rows, G)
    for got, want in ((whole(parts, "sq_norms"), G.square().sum(1)), (whole(parts, "example_grads"), G), (sum(io.moments() for io in parts), torch.stack([G.sum(0), G.square().sum(0)])),
                      (torch.cat([io.dots(theta) for io in parts]), G @ theta), (parts[0].combine(torch.ones(4).double()), G[:4].sum(0)), (parts[0].gram(parts[1]), G[:4] @ G[4:8].T),
                      (parts[0].paired(parts[1]), (G[:4] * G[4:8]).sum(1)), (parts[0].neighbours(), (G[1:4] * G[:3]).sum(1)), (torch.cat([io.losses for io in parts]).mean(), prob.loss(theta))): close(got, want)
    assert grad_variance(spread).value == pytest.approx(float(G.var(0).sum()), rel=1e-9)
    assert noise_scale(spread) == pytest.approx(noise_scale(G), rel=1e-6)


@pytest.mark.parametrize("net, shape, error, says", [
    (Overwrites, (6,), TypeError, "no gradient of this network.*inplace"),
    (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)), (6,), TypeError, "GroupNorm"),
])
def test_refusals_name_the_layer_and_the_remedy(net, shape, error, says):
    x = draw(7, *shape)
    with pytest.raises(error, match=says):
        prob = Problem(net().double(), "ce", Dataset(x, torch.arange(7) % 4, x, torch.arange(7) % 4, 4))
        next(prob.layer_io(prob.theta0))


@pytest.mark.parametrize("name", ("linear, no bias", "conv", "stride, padding, dilation"))    # its norms with groups differ from vmap
def test_backpack_agrees(name):
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchL2Grad, SumGradSquared
    prob = problem(name)
    if name == "linear, no bias":
        prob = Problem(nn.Sequential(nn.Linear(6, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 4)).double(), "ce", prob.dataset)
    io, = prob.layer_io(prob.theta0)
    net, loss = backpack.extend(prob.module), backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack.backpack(BatchL2Grad(), SumGradSquared()):
        loss(net(prob.dataset.x), prob.dataset.y).backward()
    params = list(net.parameters())
    torch.testing.assert_close(io.sq_norms(), sum(p.batch_l2 for p in params), rtol=1e-12, atol=0)
    torch.testing.assert_close(io.moments()[1], prob.layout.join(p.sum_grad_squared for p in params), rtol=1e-11, atol=1e-14)


def test_a_part_of_a_deep_network_holds_what_all_its_layers_hold():
    n = 7000
    net = nn.Sequential(*(layer for _ in range(40) for layer in (nn.Linear(64, 64), nn.Tanh())))
    problem = Problem(net, nn.MSELoss(), (torch.randn(n, 64), torch.zeros(n, 64)))
    parts = [(len(io.losses), sum(t.untyped_storage().nbytes() for l in io.layers for c in l.calls for t in (*c.args, *c.grads)))
             for io in problem.layer_io(problem.theta0)]
    assert len(parts) == 3 and sum(m for m, _ in parts) == n and max(size for _, size in parts) < 2**26
    assert parts[0][1] / parts[0][0] == pytest.approx(2 * 40 * 64 * 4, rel=.05)
