"A network with complex parameters is measured as the same network written with real pairs, and as torch says."
from itertools import count
from math import sin

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import gradnb
from gradnb import Batch, Dataset, Descent, FromTorch, MiniBatch, Problem, generalized_sharpness, measure_weights, optim, sharpness, train
from gradnb.ground.roles import RULES
from gradnb.problem.sharded import Shard
from gradnb.runs.foreign.glance import InUse, in_use

gen = lambda seed=0: torch.Generator().manual_seed(seed)
whole = lambda w: torch.complex(w[..., 0], w[..., 1])           # view_as_complex, from any place in memory


class Waves(nn.Module):
    "The spectral convolution of a Fourier neural operator (Li et al. 2021); `pairs`: of real parameters."
    def __init__(self, seed, pairs):
        super().__init__()
        w = .3 * torch.randn(3, 3, 4, generator=gen(seed), dtype=torch.complex64)
        self.weight, self.pairs = nn.Parameter(torch.view_as_real(w).clone() if pairs else w), pairs

    def forward(self, x):
        z = torch.einsum("bik,iok->bok", torch.fft.rfft(x)[..., :4], whole(self.weight) if self.pairs else self.weight)
        return torch.fft.irfft(F.pad(z, (0, x.shape[-1] // 2 - 3)), n=x.shape[-1])


class Operator(nn.Module):
    def __init__(self, pairs=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up, self.skip, self.down = nn.Conv1d(1, 3, 1), nn.Conv1d(3, 3, 1), nn.Conv1d(3, 1, 1)
        self.first, self.second, self.gain = Waves(1, pairs), Waves(2, pairs), nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = self.up(x)
        return self.down(self.second(F.gelu(self.first(x) + self.skip(x)))) * self.gain


class Phasors(nn.Module):
    "Complex layers, which begin at an odd place of θ and give complex outputs."
    def __init__(self, pairs=False):
        super().__init__()
        self.gain, self.pairs = nn.Parameter(torch.tensor([.7])), pairs
        draw = lambda *shape: .5 * torch.randn(shape, generator=gen(len(shape)), dtype=torch.complex64)
        self.one, self.two = nn.Linear(3, 4, dtype=torch.complex64), nn.Linear(4, 2, dtype=torch.complex64)
        for m in (self.one, self.two):
            for k, p in [*m.named_parameters()]:
                w = draw(*p.shape)
                setattr(m, k, nn.Parameter(torch.view_as_real(w).clone() if pairs else w))

    def layer(self, m, z): return F.linear(z, whole(m.weight), whole(m.bias)) if self.pairs else m(z)

    def forward(self, x):
        z = self.layer(self.one, torch.complex(x[:, :3], x[:, 3:]))
        return self.layer(self.two, torch.complex(z.real.tanh(), z.imag.tanh()) * self.gain)


series = torch.randn(24, 1, 12, generator=gen()).cumsum(-1)
waves = series, series.roll(3, -1).tanh()
phases = torch.randn(24, 6, generator=gen(1)), torch.randn(24, 2, generator=gen(2), dtype=torch.complex64)
def error(model, batch): return (model(batch[0]) - batch[1]).square().flatten(1).mean(1)
distance = (lambda model, batch: model(batch[0])), (lambda out, batch: (out - batch[1]).abs().square().sum(1))
double = lambda m: m._apply(lambda t: t.to(torch.complex128 if t.is_complex() else torch.float64))
both = lambda kind, *about: [Problem(kind(pairs), *about) for pairs in (False, True)]
flat = lambda module: torch.cat([torch.view_as_real(p).flatten() if p.is_complex() else p.flatten() for p in module.parameters()]).detach()


@pytest.fixture(scope="module", params=["operator", "phasors"])
def pair(request): return both(Operator, error, waves) if request.param == "operator" else both(Phasors, distance, phases)


def test_a_complex_parameter_is_its_real_pairs(pair):
    ours, theirs = pair
    assert ours.p == theirs.p == sum(p.numel() * (2 if p.is_complex() else 1) for p in ours.given.parameters())
    torch.testing.assert_close(ours.theta0, flat(ours.given), rtol=0, atol=0)
    v, some = torch.randn(ours.p, 2, generator=gen()), Batch(torch.arange(7))
    for of in (lambda p: p.grad_and_loss(p.theta0, some), lambda p: p.hvp(p.theta0, v), lambda p: p.example_grads(p.theta0), lambda p: p.at().quadratic(v),
               lambda p: torch.cat([io.moments() for io in p.layer_io(p.theta0)]), lambda p: p.curvature_grad(p.theta0, v[:, 0], v[:, 1])):
        torch.testing.assert_close(of(ours), of(theirs))


def test_gradients_and_products_are_torchs(pair):
    ours, _ = pair
    net = ours.given
    loss = ours.per_example.fn(net, waves if isinstance(net, Operator) else phases).mean()
    found = ours.layout.named(ours.grad_and_loss(ours.theta0)[0])
    for (name, p), g in zip(net.named_parameters(), torch.autograd.grad(loss, list(net.parameters()))):
        assert found[name].dtype == p.dtype
        torch.testing.assert_close(found[name], g)


def test_sharpness_is_that_of_the_dense_hessian_of_the_pairs():
    net, data = double(Phasors()), (phases[0].double(), phases[1].to(torch.complex128))
    problem = Problem(net, distance, data)
    assert problem.dtype == torch.float64
    def loss(theta):                        # by hand, of θ as it lies
        gain, *w = theta.split([1, 24, 8, 16, 4])
        one, a, two, b = (whole(t.view(*s, 2)) for t, s in zip(w, ((4, 3), (4,), (2, 4), (2,))))
        z = torch.complex(data[0][:, :3], data[0][:, 3:]) @ one.T + a
        return ((torch.complex(z.real.tanh(), z.imag.tanh()) * gain) @ two.T + b - data[1]).abs().square().sum(1).mean()
    theta = problem.theta0
    h = 1e-5 * torch.eye(problem.p, dtype=torch.float64)
    slopes = torch.stack([(loss(theta + e) - loss(theta - e)) / 2e-5 for e in h])
    torch.testing.assert_close(problem.grad_and_loss(theta)[0], slopes, rtol=1e-6, atol=1e-8)
    H = torch.autograd.functional.hessian(loss, theta)
    torch.testing.assert_close(problem.hvp(theta, torch.eye(problem.p, dtype=torch.float64)), H)
    eigs, (values, vectors) = sharpness(problem.at(), k=3, tol=1e-6), torch.linalg.eigh(H)
    torch.testing.assert_close(eigs.values, values[-3:].flip(0), rtol=1e-5, atol=0)
    top = eigs.named(problem)["one.weight"][0]
    assert top.shape == (4, 3) and top.dtype == torch.complex128
    true = whole(vectors[1:25, -1].view(4, 3, 2))
    assert min((top - true).abs().max(), (top + true).abs().max()) < 1e-2


def test_gauss_newton_and_fisher_of_complex_outputs():
    problem = Problem(double(Phasors()), distance, (phases[0].double(), phases[1].to(torch.complex128)))
    v = torch.randn(problem.p, generator=gen(), dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda theta: torch.view_as_real(problem.before_loss(theta, problem.dataset.x)).flatten(), problem.theta0)
    torch.testing.assert_close(problem.at().ggn(v), 2 * J.T @ (J @ v) / 24)
    rows = problem.example_grads(problem.theta0)
    torch.testing.assert_close(problem.at().fisher(v, "data"), rows.T @ (rows @ v) / 24)


def test_a_float32_spectral_layer_as_it_is_usually_written():
    "It makes room of complex64 whatever its inputs are, and is looked at in float32."
    class Usual(Waves):
        def forward(self, x):
            z = torch.zeros(*x.shape[:-1], x.shape[-1] // 2 + 1, dtype=torch.cfloat)
            z[..., :4] = torch.einsum("bik,iok->bok", torch.fft.rfft(x)[..., :4], self.weight)
            return torch.fft.irfft(z, n=x.shape[-1])
    series = torch.randn(8, 3, 12, generator=gen())
    a, b = (Problem(kind(0, False), error, (series, series.tanh())) for kind in (Usual, Waves))
    with pytest.warns(UserWarning, match="one by one"): rows = a.example_grads(a.theta0)
    torch.testing.assert_close(rows, b.example_grads(b.theta0))
    torch.testing.assert_close(sharpness(a.at()).values, sharpness(b.at()).values, rtol=1e-4, atol=0)


def loop(net, make, probes=None, steps=3):
    opt, watch = make(net.parameters()), None
    if probes: watch = gradnb.watch(net, error, waves, probes, opt, batch_size=8)
    for k in range(steps):
        i = torch.arange(8 * k, 8 * k + 8) % 24
        loss = error(net, (waves[0][i], waves[1][i])).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if watch: watch.step(loss)
    if watch: watch.close()
    return watch, flat(net)


PROBES = [f"{word}{',' if ':' in word else ':'}every=2" for word in ("sharpness", "preconditioned_sharpness", "grad_variance", "noise_scale", "tail_index:draws=80", "update_norms")]


def test_watching_is_not_felt_and_says_what_it_says_of_pairs():
    make = lambda params: torch.optim.Adam(params, 1e-2)
    (ours, end), (theirs, _), (_, alone) = loop(Operator(), make, PROBES), loop(Operator(True), make, PROBES), loop(Operator(), make)
    assert torch.equal(end, alone) and not ours.failures
    for name, trace in theirs.traces.items():
        for column in trace.columns.keys() - {"seconds"}:
            assert ours.traces[name].columns[column] == pytest.approx(trace.columns[column], rel=1e-3, nan_ok=True), (name, column)


OPTIMIZERS = {"sgd": lambda p: torch.optim.SGD(p, .05, momentum=.9, nesterov=True, weight_decay=.01), "adam": lambda p: torch.optim.Adam(p, .01, amsgrad=True),
              "adamw": lambda p: torch.optim.AdamW(p, .01, foreach=True), "rmsprop": lambda p: torch.optim.RMSprop(p, .01, centered=True, momentum=.5),
              "adagrad": lambda p: torch.optim.Adagrad(p, .01), "nadam": lambda p: torch.optim.NAdam(p, .01), "ours": lambda p: optim.Adam(p, .01), "lion": lambda p: optim.Lion(p, .001)}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=[*OPTIMIZERS])
def test_live_optimizers_are_seen_as_they_step(make):
    net = Operator()
    opt = make(net.parameters())
    for k in range(3):
        opt.zero_grad()
        error(net, waves).mean().backward()
        opt.step()
    problem, params = Problem(net, error, waves), dict(net.named_parameters())
    rule, remembered = in_use([opt], params)
    grad = problem.grad_and_loss(problem.theta0)[0]
    blocks, _ = rule.step(remembered(torch.float32), problem.layout.blocks(problem.theta0), problem.layout.blocks(grad))
    for p, g in zip(net.parameters(), problem.layout.named(grad).values()): p.grad = g.clone()
    opt.step()
    torch.testing.assert_close(problem.layout.join(blocks[n] for n in problem.layout.names), flat(net), rtol=1e-5, atol=1e-7)


def test_rules_of_numbers_move_pairs_and_rules_of_matrices_refuse_them():
    real = Dataset(phases[0], phases[1].abs(), phases[0], phases[1].abs(), None, "phases")
    problem = Problem(Phasors(), lambda out, y: (out.abs() - y).square().sum(1), real)
    go = lambda rule: train(problem, Descent(rule, MiniBatch(8)), 3, progress=False)[0].theta
    theirs, ours = Phasors(), FromTorch(torch.optim.AdamW, lr=.01)
    opt = torch.optim.AdamW(theirs.parameters(), .01)
    for _ in range(3):
        opt.zero_grad()
        (theirs(real.x).abs() - real.y).square().sum(1).mean().backward()
        opt.step()
    torch.testing.assert_close(train(problem, Descent(ours), 3, progress=False)[0].theta, flat(theirs), rtol=1e-5, atol=1e-6)
    for word in ("adam:lr=.01", "lamb:lr=.01", "sophia:lr=.01", "groups:complex=adam,*=[soap:lr=.01]"):
        assert not torch.equal(go(RULES.build(word)), problem.theta0)
    for word in ("muon:lr=.01", "shampoo:lr=.01", "soap:lr=.01", "kfac:lr=.01", "agd:vectors=True", "steepestdescent:lr=.01", "lars:lr=.1,adapt=matrices", "groups:*=[muon:lr=.1]"):
        with pytest.raises(TypeError, match="no meaning for complex parameters, and 'one.weight' is one"): go(RULES.build(word))
    for cls in (torch.optim.Muon, torch.optim.Adafactor):
        with pytest.raises(TypeError, match=f"{cls.__name__} does not move 'two.weight', which is complex"): go(FromTorch(cls, lr=.01))
    with pytest.raises(TypeError, match="Muon does not move 'two.weight', which is complex"):
        InUse(torch.optim.Muon([problem.given.one.weight, problem.given.two.weight]), dict(problem.given.named_parameters()))
    with pytest.raises(TypeError, match="'one.weight' is complex; take norm=l2"): generalized_sharpness(problem.at(), "spectral")
    assert problem.kinks == ()


def test_blocks_are_chosen_by_the_role():
    problem = Problem(Operator(), error, waves)
    assert problem.only("complex").layout.names == Problem(Operator(), error, waves, params="complex").layout.names == ("first.weight", "second.weight")
    part, v = problem.only("second"), torch.randn(72, generator=gen())
    at = torch.cat([torch.full((b.numel(),), n == "second.weight") for n, b in problem.layout.blocks(problem.theta0).items()])
    torch.testing.assert_close(part.hvp(part.theta0, v), problem.hvp(problem.theta0, torch.zeros(problem.p).masked_scatter(at, v))[at])


def test_checkpoints_hold_complex_tensors(tmp_path):
    net = Operator()
    torch.save(net.state_dict(), tmp_path / "step1.pt")
    save_file(net.state_dict(), tmp_path / "step2.safetensors")
    problem = Problem(net, error, waves)
    found = measure_weights(problem, [tmp_path / "step1.pt", tmp_path / "step2.safetensors"], ["grad_norm"])["grad_norm"].values
    assert found.tolist() == pytest.approx(2 * [float(problem.grad_and_loss(problem.theta0)[0].norm())], rel=1e-6)
    with pytest.raises(ValueError, match="real for complex or complex for real, first.weight"): measure_weights(problem, {k: v.real for k, v in net.state_dict().items()}, ["grad_norm"])


def test_a_forward_pass_that_writes_over_complex_weights_is_refused():
    class Shrinking(Waves):
        def forward(self, x):
            with torch.no_grad(): self.weight.mul_(.9)
            return super().forward(x)
    series = torch.randn(8, 3, 12, generator=gen())
    with pytest.raises(TypeError, match="writes over its parameters"): Problem(Shrinking(0, False), error, (series, series))


def test_complex_outputs_may_differ_in_their_last_bits():
    "As those of atomic sums do on a GPU."
    calls = count()
    class Loose(Phasors):
        def forward(self, x): return super().forward(x) * (1 + 1e-6 * sin(next(calls) ** 2))
    given = phases[0], phases[1].abs()
    Problem(Loose(), lambda out, y: (out.abs() - y).square().sum(1), Dataset(*given, *given, None, "phases"))


def test_complex_inputs_are_of_the_problems_precision_as_real_ones_are():
    net, x, y = nn.Linear(3, 2, dtype=torch.complex64), phases[1], phases[1].flip(1)
    x = torch.cat([x, x[:, :1]], 1)
    losses = [Problem(double(nn.Linear(3, 2, dtype=torch.complex64)) if wide else net, distance, (x, y)) for wide in (False, True)]
    theta, truth = losses[0].theta0, (F.linear(x, net.weight, net.bias) - y).abs().square().sum(1).mean()
    torch.testing.assert_close(losses[0].loss(theta), truth.detach())
    torch.testing.assert_close(losses[1].loss(theta.double()), truth.detach().double(), rtol=1e-5, atol=0)


def test_shards_are_real():
    with pytest.raises(TypeError, match="'first.weight' is torch.complex64, and shards are real"): Shard('first.weight', Operator().first.weight)


def test_real_pairs_that_a_network_views_as_complex_may_lie_anywhere_in_theta():
    class Viewing(Phasors):
        def layer(self, m, z): return F.linear(z, torch.view_as_complex(m.weight), torch.view_as_complex(m.bias))
    ours, theirs, v = Problem(Viewing(True), distance, phases), Problem(Phasors(), distance, phases), torch.randn(53, 2, generator=gen())
    for of in (lambda p: p.loss(p.theta0), lambda p: p.grad_and_loss(p.theta0)[0], lambda p: p.hvp(p.theta0, v), lambda p: p.example_grads(p.theta0), lambda p: p.at().ggn(v)):
        torch.testing.assert_close(of(ours), of(theirs))
