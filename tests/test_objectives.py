"Problems of loaders, batches of any make, and objectives; the oracle is torch's own Hessian of the same line of code, called through `functional_call`."
import random
from collections import UserDict
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler
from torchvision.models.resnet import BasicBlock, ResNet

from gradnb import GD, Batch, Dataset, Descent, MiniBatch, Problem, Stream, check_problem, sharpness, train
from gradnb.measure.noise.spread import Spread
from gradnb.problem.seconds import central

F64, OWN = torch.float64, random.Random(0)
GEN = torch.Generator().manual_seed(0)
def normal(*shape): return torch.randn(*shape, generator=GEN, dtype=F64)


def brute(net, loss, names=None):
    "Loss, gradient and dense Hessian of loss(model), in the parameters of these names."
    named = {k: v.detach() for k, v in net.named_parameters() if (v.requires_grad if names is None else k in names)}
    sizes = [v.numel() for v in named.values()]
    def f(theta):
        blocks = {k: t.view_as(v) for (k, v), t in zip(named.items(), theta.split(sizes))}
        return loss(lambda *args, **words: torch.func.functional_call(net, blocks, args, words))
    theta = torch.cat([v.reshape(-1) for v in named.values()]).requires_grad_()
    return f(theta).detach(), torch.autograd.grad(f(theta), theta)[0], torch.autograd.functional.hessian(f, theta.detach())


def agrees(problem, truth, close=1e-10):
    value, grad, H = truth
    theta, v = problem.theta0, normal(problem.p).to(problem.dtype)
    torch.testing.assert_close(problem.loss(theta), value, rtol=close, atol=close)
    torch.testing.assert_close(problem.grad_and_loss(theta)[0], grad, rtol=close, atol=close)
    torch.testing.assert_close(problem.hvp(theta, v), H @ v, rtol=close, atol=close)
    found, top = sharpness(problem, theta), torch.linalg.eigvalsh(H)[-1]
    assert abs(found.values[0] - top) <= found.errors[0] + 1e-12


X, Y = normal(23, 4), torch.randint(3, (23,), generator=GEN)
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
def each(model, batch): return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
def mean(model, batch): return F.cross_entropy(model(batch[0]), batch[1])
def penalised(model, batch): return mean(model, batch) + .01 * sum(p.square().sum() for p in model.parameters())

DATA = {"a data set": TensorDataset(X, Y), "a shuffled loader": DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True),
        "a loader without collating": DataLoader(TensorDataset(X, Y), batch_size=None, sampler=BatchSampler(range(23), 6, False)),
        "a list of unequal batches": [(X[:3], Y[:3]), (X[3:20], Y[3:20]), (X[20:], Y[20:])]}

@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("loss", ["ce", each, mean, nn.CrossEntropyLoss(), F.cross_entropy, nn.CrossEntropyLoss(weight=torch.tensor([1., 2., 5.], dtype=F64))])
def test_whatever_the_examples_come_in_the_loss_is_that_of_all(data, loss):
    known = loss if isinstance(loss, nn.Module) else F.cross_entropy
    agrees(Problem(NET, loss, DATA[data]), brute(NET, lambda model: known(model(X), Y)))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("loss", [each, mean, nn.CrossEntropyLoss(weight=torch.tensor([1., 2., 5.]))])
def test_the_laws_of_problems_hold(data, loss):
    single = deepcopy(NET).float()
    change = lambda batch: (batch[0].float(), batch[1])
    rows = DATA[data]
    rows = [change(batch) for batch in rows] if isinstance(rows, list) else TensorDataset(X.float(), Y) if isinstance(rows, TensorDataset) else DataLoader(
        TensorDataset(X.float(), Y), batch_size=rows.batch_size, sampler=rows.sampler)
    check_problem(single, loss, rows)


def test_a_stream_is_kept_as_far_as_was_said():
    class Flowing(IterableDataset):
        def __iter__(self): yield from zip(X, Y)
    whole = brute(NET, lambda model: F.cross_entropy(model(X[:14]), Y[:14]))
    agrees(Problem(NET, mean, DataLoader(Flowing(), batch_size=7), batches=2), whole)
    agrees(Problem(NET, mean, ((X[i:i + 7], Y[i:i + 7]) for i in (0, 7, 14)), batches=2), whole)
    with pytest.raises(ValueError, match="batches=16"): Problem(NET, mean, DataLoader(Flowing(), batch_size=7))


@pytest.mark.parametrize("form", [dict, UserDict, lambda d: list(d.values()), lambda d: (d["x"], {"deep": d["y"]})])
def test_batches_of_any_form(form):
    def objective(model, batch):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, (dict, UserDict)) else batch
        if isinstance(batch, dict): batch.pop("y")                   # in a dictionary of its own
        return F.cross_entropy(model(x), y["deep"] if isinstance(y, dict) else y)
    data = [form({"x": X[:9], "y": Y[:9]}), form({"x": X[9:], "y": Y[9:]})]
    agrees(Problem(NET, objective, data), brute(NET, lambda model: F.cross_entropy(model(X), Y)))


def test_losses_of_examples_have_gradients_of_examples():
    problem, known = Problem(NET, each, DATA["a shuffled loader"]), Problem(NET, "ce", Dataset(X, Y, X, Y, 3))
    some = Batch(torch.tensor([22, 0, 5, 5]))
    torch.testing.assert_close(problem.example_grads(problem.theta0, some), known.example_grads(known.theta0, some))
    state, _ = train(problem, Descent(GD(.1), MiniBatch(8)), 5, progress=False)
    same, _ = train(known, Descent(GD(.1), MiniBatch(8)), 5, progress=False)
    torch.testing.assert_close(state.theta, same.theta)
    with pytest.raises(TypeError, match="return losses"): Problem(NET, mean, DATA["a shuffled loader"]).example_grads(problem.theta0)
    with pytest.raises(TypeError, match="keeps the network's outputs to itself"): problem.at(problem.theta0).ggn(problem.theta0)


def test_the_mean_over_tokens_is_not_the_mean_of_means():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).double()
    texts = [(torch.randint(9, (b, t), generator=GEN), torch.randint(9, (b, t), generator=GEN).where(torch.rand(b, t, generator=GEN) < .7, -100))
             for b, t in ((2, 5), (3, 9), (1, 4))]
    x, y = (torch.cat([batch[i].reshape(-1) for batch in texts]) for i in (0, 1))
    truth = brute(net, lambda model: F.cross_entropy(model(x), y, ignore_index=-100))
    tokens = lambda batch: (batch[1] != -100).sum()
    def whole(model, batch): return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
    def parts(model, batch): return F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none").sum(1), (batch[1] != -100).sum(1)
    agrees(Problem(net, whole, texts, size=tokens), truth)
    agrees(Problem(net, parts, texts), truth)
    assert abs(Problem(net, whole, texts).loss(Problem(net, whole, texts).theta0) - truth[0]) > 1e-4


def test_what_an_objective_draws_from_python_and_numpy_is_the_streams():
    "Mixup as people write it: its mean over streams is that of its two kinds of draws, counted; the generators stand where they stood."
    pick = torch.tensor([4, 7, 1, 20])
    def mixed(model, batch):
        share, other = .25 + .5 * np.random.randint(2), torch.roll(torch.arange(len(batch[0])), random.choice([1, 2]))
        out = model(share * batch[0] + (1 - share) * batch[0][other])
        return share * F.cross_entropy(out, batch[1]) + (1 - share) * F.cross_entropy(out, batch[1][other])
    def told(share, by):
        out = NET(share * X[pick] + (1 - share) * X[pick].roll(by, 0))
        return share * F.cross_entropy(out, Y[pick]) + (1 - share) * F.cross_entropy(out, Y[pick].roll(by))
    random.seed(3), np.random.seed(3)
    stands = random.getstate(), str(np.random.get_state())
    problem = Problem(NET, mixed, [(X[pick], Y[pick])])
    all_of_them = sorted(told(share, by).item() for share in (.25, .75) for by in (1, 2))
    found = [problem.loss(problem.theta0, Batch(torch.tensor([0]), noise=Stream(k))).item() for k in range(60)]
    assert problem.noisy and {round(v, 9) for v in found} == {round(v, 9) for v in all_of_them}
    assert found[:5] == [problem.loss(problem.theta0, Batch(torch.tensor([0]), noise=Stream(k))).item() for k in range(5)]
    assert problem.loss(problem.theta0) == problem.loss(problem.theta0) and round(problem.loss(problem.theta0).item(), 9) in {round(v, 9) for v in all_of_them}
    assert stands == (random.getstate(), str(np.random.get_state()))


def test_another_network_in_an_objective_is_held_as_it_stands():
    torch.manual_seed(1)
    critic = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Softplus(), nn.Linear(4, 1)).double()
    def fooling(model, batch): return F.softplus(-critic(model(batch[0]))).mean()
    batches = [(X[:12],), (X[12:],)]
    with pytest.warns(UserWarning, match=r"depends on 6 trainable tensors that are none of the model's parameters, of shape \(.*held still"):
        problem = Problem(NET, fooling, batches)
    for _ in range(2):
        held = deepcopy(critic).requires_grad_(False)
        agrees(problem, brute(NET, lambda model: sum(len(x) * F.softplus(-held(model(x))).mean() for x, in batches) / 23))
        assert all(p.grad is None for p in critic.parameters()) and critic[1].num_batches_tracked == 0
        with torch.no_grad(): critic[0].weight.mul_(2)                # it has been trained meanwhile
    with pytest.raises(TypeError, match="reads parameter '0.weight' of the module itself, not of a copy"):
        Problem(NET, lambda model, batch: mean(model, batch) + sum(p.square().sum() for p in NET.parameters()), TensorDataset(X, Y))


def test_a_target_by_the_model_itself_without_a_gradient():
    "Temporal differences: gradients of examples are those of autograd, and curvature is refused."
    line = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    def difference(model, batch):
        with torch.no_grad(): target = 1 + .9 * model(batch[0].roll(1, 1))
        return (model(batch[0]) - target).square().squeeze(1)
    with pytest.warns(UserWarning, match="curvature is refused"): problem = Problem(line, difference, TensorDataset(X, Y))
    rows = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(difference(line, (X[i:i + 1],)).sum(), list(line.parameters()))]) for i in range(len(X))])
    torch.testing.assert_close(problem.example_grads(problem.theta0), rows)
    torch.testing.assert_close(torch.cat([io.sq_norms() for io in problem.layer_io(problem.theta0)]), rows.square().sum(1))
    with pytest.raises(TypeError, match="is not the slope"): sharpness(problem, problem.theta0)


@pytest.mark.parametrize("data", [lambda x, f: TensorDataset(x, f), lambda x, f: [(x[:4], f[:4]), (x[4:], f[4:])]])
def test_a_loss_of_forces_and_a_penalty_of_gradients(data):
    "Derivatives are taken inside by torch.autograd, of the batch's own tensor, also where losses are asked for without a gradient."
    x, forces = normal(12, 2), normal(12, 2)
    energy = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    def matching(model, batch):
        place, force = batch
        place.requires_grad_()
        pull, = torch.autograd.grad(model(place).sum(), place, create_graph=True)
        return (force + pull).square().sum(1) + 10 * (pull.norm(dim=1) - 1).square()
    problem = Problem(energy, matching, data(x.clone(), forces))
    agrees(problem, brute(energy, lambda model: matching(model, (x.clone(), forces)).mean()))
    with torch.no_grad(): assert not problem.loss(problem.theta0).requires_grad
    assert not problem.loss(problem.theta0 + 0).requires_grad and all(p.grad is None for p in energy.parameters())
    if problem.n == 12:
        rows = problem.example_grads(problem.theta0)
        torch.testing.assert_close(rows[3], brute(energy, lambda model: matching(model, (x[3:4].clone(), forces[3:4])).mean())[1])


def test_a_loss_behind_a_step_of_learning():
    "MAML of a linear model: w − a∇L(w) is linear in w, and so H = mean 2 JᵀBᵀBJ / m with J = I − 2a AᵀA / n."
    x, y, a = normal(8, 9, 3), normal(8, 9, 1), .1
    line = nn.Linear(3, 1, bias=False).double()
    def adapted(model, batch):
        losses, start = [], dict(model.named_parameters())
        for inputs, targets in zip(*batch):
            fit = (torch.func.functional_call(model, start, inputs[:5]) - targets[:5]).square().mean()
            slopes = torch.autograd.grad(fit, list(start.values()), create_graph=True)
            there = {k: w - a * g for (k, w), g in zip(start.items(), slopes)}
            losses.append((torch.func.functional_call(model, there, inputs[5:]) - targets[5:]).square().mean())
        return torch.stack(losses)
    w, A, B = line.weight.detach().T, x[:, :5], x[:, 5:]
    J = torch.eye(3, dtype=F64) - 2 * a * A.mT @ A / 5
    off = B @ (J @ w + 2 * a * A.mT @ y[:, :5] / 5) - y[:, 5:]
    agrees(Problem(line, adapted, TensorDataset(x, y)), (off.square().mean((1, 2)).mean(), (2 * (B @ J).mT @ off / 4).mean(0).squeeze(1), (2 * (B @ J).mT @ (B @ J) / 4).mean(0)))


def test_embeddings_with_sparse_gradients_and_buffers_of_complex_numbers():
    class Rotating(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.words, self.read = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 3)
            self.register_buffer("turn", torch.polar(torch.ones(5, 2, dtype=torch.float64), torch.arange(10, dtype=torch.float64).view(5, 2)))
        def forward(self, x):
            pairs = torch.view_as_complex(self.words(x).unflatten(-1, (2, 2)))
            return self.read((torch.view_as_real(pairs * self.turn).flatten(2) ** 2).mean(1))
    words = torch.randint(9, (23, 5), generator=GEN)
    torch.manual_seed(0)
    net = Rotating(True).double()
    net.turn = Rotating(True).turn                                      # torch's own double() has dropped the imaginary part
    dense = Rotating(False)._apply(lambda t: t)
    dense.load_state_dict(net.state_dict()), [m.double() for m in (dense.words, dense.read)]
    agrees(Problem(net, each, TensorDataset(words, Y)), brute(dense, lambda model: F.cross_entropy(model(words), Y)))
    assert net.words.sparse
    small = Rotating(False)
    small.load_state_dict(net.state_dict()), small.words.to(torch.bfloat16)
    problem = Problem(small, each, TensorDataset(words, Y))              # in float32, and so is a copy in float64 that checks it
    torch.testing.assert_close(problem.loss(problem.theta0).double(), brute(dense, lambda model: F.cross_entropy(model(words), Y))[0], rtol=.02, atol=.02)


def test_an_objective_that_clears_gradients_clears_none_of_ours():
    "Of several batches the gradient was the last one's, where the same line as in the loop stands in the objective."
    def clearing(model, batch):
        model.zero_grad(set_to_none=False)
        return F.cross_entropy(model(batch[0]), batch[1])
    batches = DATA["a list of unequal batches"]
    problem, plain = (Problem(NET, f, batches) for f in (clearing, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])))
    torch.testing.assert_close(problem.grad_and_loss(problem.theta0), plain.grad_and_loss(plain.theta0), rtol=0, atol=0)


def test_what_is_written_into_a_batch_though_it_stands_there_loses_no_graph():
    "Labels whose padding is filled in place, where none is padded, as FSMT does it: a kept graph stands while another forward pass goes by."
    def filling(model, batch): return F.cross_entropy(model(batch[0]), batch[1].masked_fill_(batch[1] == -100, 0))
    batch = X.clone(), Y.clone()
    problem, plain = Problem(NET, filling, [batch]), Problem(NET, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), [batch])
    point, v = problem.at(), normal(problem.p)
    first = point.hvp(v)
    problem.loss(problem.theta0)
    torch.testing.assert_close([first, point.hvp(v)], [plain.at().hvp(v)] * 2)


class Pair:
    def __init__(self, x, y): self.x, self.y = x, y

torch.utils._pytree.register_pytree_node(Pair, lambda pair: ([pair.x, pair.y], None), lambda parts, _: Pair(*parts))


def test_batches_of_a_class_that_torch_was_told_of():
    own, plain = (lambda model, batch: F.cross_entropy(model(batch.x), batch.y)), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    problem, truth = Problem(NET, own, [Pair(X, Y)]), Problem(NET, plain, [(X, Y)])
    torch.testing.assert_close(problem.grad_and_loss(problem.theta0), truth.grad_and_loss(truth.theta0))


def test_losses_that_people_have():
    pairs = TensorDataset(normal(12, 4), normal(12, 4))
    def contrastive(model, batch):
        u, v = (F.normalize(model(t), dim=1) for t in batch)
        return F.cross_entropy(u @ v.T / .5, torch.arange(len(u)), reduction="none")
    problem = Problem(NET, contrastive, DataLoader(pairs, batch_size=4))
    assert problem.n == 3                                              # batches: their examples see each other
    a, b = pairs.tensors
    agrees(problem, brute(NET, lambda model: sum(contrastive(model, (a[i:i + 4], b[i:i + 4])).mean() for i in (0, 4, 8)) / 3))

    where = TensorDataset(torch.linspace(0, 1, 10, dtype=F64)[:, None])
    field = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    def residual(model, batch):                                        # u″ = −u, with derivatives of the inputs inside
        t = batch[0].clone().requires_grad_()
        u = model(t)
        slope, = torch.autograd.grad(u.sum(), t, create_graph=True)
        bend, = torch.autograd.grad(slope.sum(), t, create_graph=True)
        return (bend + u).square().squeeze(1)
    agrees(Problem(field, residual, where), brute(field, lambda model: residual(model, where.tensors).mean()))

    def steep(model, batch):                                           # u² + u′², the derivative forward
        u, slope = torch.func.jvp(model, (batch[0],), (torch.ones_like(batch[0]),))
        return (u.square() + slope.square()).squeeze(1)
    agrees(Problem(field, steep, where), brute(field, lambda model: steep(model, where.tensors).mean()))

    value, grad, H = brute(NET, lambda model: F.cross_entropy(model(X), Y))
    theta = torch.cat([p.detach().reshape(-1) for p in NET.parameters()])
    agrees(Problem(NET, penalised, DATA["a list of unequal batches"]), (value + .01 * theta.square().sum(), grad + .02 * theta, H + .02 * torch.eye(len(theta), dtype=F64)))

    speech, lengths = normal(6, 8, 4), torch.full((6,), 8)
    targets = torch.randint(1, 3, (6, 2), generator=GEN)
    def ctc(model, batch):
        x, t = batch
        return F.ctc_loss(model(x.transpose(0, 1)).log_softmax(-1), t, lengths[:len(x)], torch.full((len(x),), 2), reduction="none")
    problem = Problem(NET, ctc, TensorDataset(speech, targets))
    theta, v = problem.theta0, torch.cat([p.detach().reshape(-1) for p in NET.parameters()]).roll(7)
    def slope(theta):                                                  # by torch's own kernel
        twin = deepcopy(NET)
        nn.utils.vector_to_parameters(theta, twin.parameters())
        ctc(twin, (speech, targets)).mean().backward()
        return torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    torch.testing.assert_close(problem.grad_and_loss(theta)[0], slope(theta))
    torch.testing.assert_close(problem.hvp(theta, v), central(slope, theta, v, 1e-5), rtol=1e-6, atol=1e-8)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(2, 4)
    def forward(self, x):
        mu, logvar = self.encode(x).chunk(2, 1)
        z = mu + torch.randn_like(mu) * (logvar / 2).exp()
        return (self.decode(z) - x).square().sum(1) + (mu.square() + logvar.exp() - logvar - 1).sum(1) / 2

def test_draws_in_a_forward_pass_are_the_streams_own():
    net = VAE().double()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    problem = Problem(net, lambda model, batch: model(batch[0]).mean(), DataLoader(TensorDataset(X), batch_size=8))
    assert problem.loss(problem.theta0) == problem.loss(problem.theta0)
    H = torch.stack([problem.hvp(problem.theta0, v) for v in torch.eye(problem.p, dtype=F64)])
    torch.testing.assert_close(H, H.T)
    found = sharpness(problem, problem.theta0)
    assert abs(found.values[0] - torch.linalg.eigvalsh(H)[-1]) <= found.errors[0]
    assert torch.equal(before, torch.get_rng_state())


def test_parameters_are_chosen_by_name_role_or_pattern():
    for which, names in (("2", ["2.weight", "2.bias"]), ("*.bias", ["0.bias", "2.bias"]), ("matrix", ["0.weight", "2.weight"]),
                         (["0.weight", "vector"], ["0.weight", "0.bias", "2.bias"]), (lambda name, p: p.numel() == 15, ["2.weight"])):
        problem = Problem(NET, mean, DATA["a shuffled loader"], params=which)
        assert list(problem.layout.names) == names
        agrees(problem, brute(NET, lambda model: F.cross_entropy(model(X), Y), names))
    with pytest.raises(ValueError, match="no parameter '3'"): Problem(NET, mean, DATA["a shuffled loader"], params="3")
    with pytest.raises(ValueError, match="chooses none"): Problem(NET, mean, DATA["a shuffled loader"], params=lambda name, p: False)
    assert all(p.requires_grad for p in NET.parameters())
    data = Dataset(X, Y, X, Y, 3)
    agrees(Problem(NET, "ce", data, params="2"), brute(NET, lambda model: F.cross_entropy(model(X), Y), ["2.weight", "2.bias"]))


def test_wrapped_and_parametrised_modules():
    truth = brute(NET, lambda model: F.cross_entropy(model(X), Y))
    for wrapped in (nn.DataParallel(NET), torch.compile(NET, backend="eager")):
        problem = Problem(wrapped, mean, DATA["a shuffled loader"])
        agrees(problem, truth)
        assert problem.given is NET and problem.layout.names[0] == "0.weight"
    class Positive(nn.Module):
        def forward(self, w): return w.exp()
    net = deepcopy(NET)
    nn.utils.parametrize.register_parametrization(net[0], "weight", Positive())
    agrees(Problem(net, mean, DATA["a shuffled loader"]), brute(net, lambda model: F.cross_entropy(model(X), Y)))


def test_mixed_and_half_precision_is_measured_in_single():
    net = deepcopy(NET).bfloat16()
    rounded = deepcopy(net).float()
    def objective(model, batch): return F.cross_entropy(model(batch[0]).float(), batch[1])
    data = [(X.bfloat16(), Y)]
    problem = Problem(net, objective, data)
    assert problem.dtype == torch.float32 and next(net.parameters()).dtype == torch.bfloat16
    truth = brute(rounded.double(), lambda model: F.cross_entropy(model(X.bfloat16().double()), Y))
    torch.testing.assert_close(problem.grad_and_loss(problem.theta0)[0].double(), truth[1], rtol=1e-4, atol=1e-6)
    mixed = deepcopy(NET).float()
    mixed[2].bfloat16()
    assert Problem(mixed, objective, [(X.float(), Y)]).dtype == torch.float32


class Upcast(nn.Module):
    "As many language models do it: a normalisation in single precision, whatever comes in."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
    def forward(self, x):
        h = self.a(x)
        h = (h.float() * (h.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)
        return self.b(h).float()

def test_a_network_that_rounds_within_is_no_false_alarm():
    net = Upcast()
    problem = Problem(net, mean, TensorDataset(X.float(), Y))
    agrees(problem, brute(net, lambda model: F.cross_entropy(model(X.float()), Y)), 1e-4)


class Drawing(torch.utils.data.Dataset):
    "Augments from all three generators."
    def __len__(self): return len(X)
    def __getitem__(self, i): return X[i] + random.gauss(0, .1) + np.random.randn() * .1 + torch.randn(4, dtype=F64) * .1, Y[i]

def test_nothing_global_moves_and_an_example_is_one_example():
    loader = DataLoader(Drawing(), batch_size=5, shuffle=True)
    ahead = iter(loader)
    next(ahead)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    weights = [p.clone() for p in NET.parameters()]
    problem = Problem(NET, each, loader)
    assert problem.loss(problem.theta0) == problem.loss(problem.theta0)
    sharpness(problem, problem.theta0)
    assert before[0] == random.getstate() and (before[1] == np.random.get_state()[1]).all() and torch.equal(before[2], torch.get_rng_state())
    assert all(map(torch.equal, weights, NET.parameters())) and all(p.grad is None for p in NET.parameters())
    one, four = (problem.loss(problem.theta0, Batch(torch.tensor([4] * n))) for n in (1, 4))
    torch.testing.assert_close(one, four)


@pytest.mark.parametrize("loss", [each, mean])
def test_processes_that_read_ahead_read_the_same(loss, monkeypatch):
    alone, many = (Problem(NET, loss, DataLoader(Drawing(), batch_size=5, num_workers=n)) for n in (0, 2))
    many.dataset.shelf.room = 0
    many.dataset.shelf.kept.clear()
    monkeypatch.setattr(type(many.dataset.shelf), "__call__", lambda *_: pytest.fail("the process itself read"))
    before = random.getstate(), torch.get_rng_state()
    found = many.loss(many.theta0)
    monkeypatch.undo()
    assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())
    assert found == alone.loss(alone.theta0)


def test_a_sampler_of_the_owners_is_asked_once_and_said():
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, sampler=WeightedRandomSampler(torch.arange(1., 24), 10))
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="WeightedRandomSampler"): problem = Problem(NET, mean, loader)
    assert problem.n == 2 and torch.equal(before, torch.get_rng_state())


def test_batch_norm_in_training_mode_has_batches():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    problem = Problem(net, each, DataLoader(TensorDataset(X, Y), batch_size=6))
    assert problem.n == 4
    parts = list(zip(X.split(6), Y.split(6)))
    agrees(problem, brute(deepcopy(net), lambda model: sum(F.cross_entropy(model(x), y, reduction="sum") for x, y in parts) / 23))
    assert Problem(net.eval(), each, DataLoader(TensorDataset(X, Y), batch_size=6)).n == 23


@pytest.mark.parametrize("loss, data, error, says", [
    (mean, X, TypeError, r"\[batch\]"),
    (mean, [], ValueError, "gave no batch"),
    (mean, ["words"], TypeError, "without a tensor"),
    (mean, TensorDataset(X[:0], Y[:0]), ValueError, "is empty"),
    (lambda m, b: m(b[0]), TensorDataset(X, Y), TypeError, "shape"),
    (lambda m, b: {"loss": mean(m, b)}, TensorDataset(X, Y), TypeError, "gave a dict"),
    (lambda m, b: mean(m, b).item(), TensorDataset(X, Y), TypeError, "gave a float"),
    (lambda m, b: mean(NET, b), TensorDataset(X, Y), TypeError, "the model that it is given"),
    (lambda m, b: mean(m, b) * OWN.random(), TensorDataset(X, Y), TypeError, "two answers"),
    ("ce", [{"x": X, "y": Y}], TypeError, r"objective\(model, batch\)"),
    (lambda m, b: mean(m, (b[0], b[1])), [(X, Y[:3])], ValueError, ""),
], ids=["tensor", "empty", "words", "no examples", "outputs", "dictionary", "number", "another model", "random", "no pair", "unequal"])
def test_bad_input_is_named(loss, data, error, says):
    with pytest.raises(error, match=says): Problem(NET, loss, data)


def test_sizes_must_weigh_something():
    with pytest.raises(ValueError, match="sizes of the batches"): Problem(NET, mean, [(X, Y)], size=lambda batch: 0)
    with pytest.raises(ValueError, match="a Dataset has examples"): Problem(NET, "ce", Dataset(X, Y, X, Y, 3), size=len)
    with pytest.raises(ValueError, match="batches is how many"): Problem(NET, mean, TensorDataset(X, Y), batches=0)


def transformers_of(kind):
    module = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        return module.GPT2LMHeadModel(module.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)).eval()
    return module.BertForSequenceClassification(module.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                                                  vocab_size=50, max_position_embeddings=32)).eval()


def test_a_language_model_with_padding():
    model = transformers_of("gpt2")
    from transformers import BatchEncoding
    def batch(b, t):
        ids, length = torch.randint(1, 50, (b, t), generator=GEN), torch.randint(3, t + 1, (b, 1), generator=GEN)
        mask = (torch.arange(t) < length).long()
        return BatchEncoding(dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)))
    data = [batch(3, 9), batch(5, 12), batch(2, 7)]
    problem = Problem(model, lambda model, batch: model(**batch).loss, data, size=lambda batch: (batch["labels"][:, 1:] != -100).sum())
    double, total, count = deepcopy(model).double(), 0, 0
    for b in data:
        with sdpa_kernel(SDPBackend.MATH): logits = double(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, :-1]
        total = total + F.cross_entropy(logits.flatten(0, 1), b["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")
        count += (b["labels"][:, 1:] != -100).sum()
    value, params = total / count, [p for p in double.parameters()]
    grads = torch.autograd.grad(value, params, create_graph=True)
    v = torch.randn(problem.p, generator=GEN)
    product = torch.autograd.grad(sum((g * b).sum() for g, b in zip(grads, problem.layout.split(v.double()))), params)
    torch.testing.assert_close(problem.loss(problem.theta0).double(), value.detach(), rtol=1e-5, atol=1e-6)
    flat = lambda blocks: torch.cat([b.reshape(-1) for b in blocks]).float()
    torch.testing.assert_close(problem.grad_and_loss(problem.theta0)[0], flat(grads).detach(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(problem.hvp(problem.theta0, v), flat(product), rtol=1e-3, atol=2e-4)


def test_one_batch_of_parts_of_several_lengths_needs_no_size():
    points, edge, net = normal(6, 2), normal(3, 2), nn.Linear(2, 1).double()
    objective = lambda model, batch: model(batch[0]).square().mean() + model(batch[1]).square().mean()
    problem = Problem(net, objective, [(points, edge)])
    torch.testing.assert_close(problem.at(problem.theta0).loss, objective(net, (points, edge)).detach())
    with pytest.raises(ValueError, match="say size="): Problem(net, objective, [(points, edge)] * 2)


def test_a_batch_that_the_loader_drops_is_none_and_its_examples_are_some():
    x, y = normal(9, 3), torch.arange(9) % 2
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    loader = DataLoader(TensorDataset(x, y), batch_size=4, drop_last=True, shuffle=True)
    mean = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    problem = Problem(net, mean, loader)
    want = (mean(net, (x[:4], y[:4])) + mean(net, (x[4:8], y[4:8]))) / 2
    assert problem.n == 2
    torch.testing.assert_close(problem.at(problem.theta0).loss, want.detach())
    each = Problem(net.eval(), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), loader)
    assert each.n == 9
    torch.testing.assert_close(each.at(each.theta0).loss, mean(net, (x, y)).detach())


@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_curvlinops_on_the_same_model_loss_and_loader(kind):
    "Version 3.0.1 is off by up to 1e-2 in the weights of LayerNorm (by double backward ours are right to 1e-15); they are left out."
    lib = pytest.importorskip("curvlinops")
    if kind == "bert":
        net = transformers_of("bert").double()
        inputs = [{"input_ids": torch.randint(1, 50, (b, 10), generator=GEN), "attention_mask": torch.ones(b, 10)} for b in (5, 5, 2)]
        class Logits(nn.Module):
            def __init__(self): super().__init__(); self.net = net
            def forward(self, x): return self.net(**x).logits
        model, size = Logits(), {"batch_size_fn": lambda x: len(x["input_ids"])}
    else:
        torch.manual_seed(0)
        model, size = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2).double().eval(), {}
        inputs = [normal(b, 3, 16, 16) for b in (5, 5, 2)]
    loader = [(x, torch.arange(b) % 2) for x, b in zip(inputs, (5, 5, 2))]
    problem = Problem(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), loader, size=lambda batch: len(batch[1]))
    with sdpa_kernel(SDPBackend.MATH):
        theirs = lib.HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), loader, check_deterministic=False, **size)
        v = normal(problem.p)
        for name, a, b in zip(problem.layout.names, problem.layout.split(problem.hvp(problem.theta0, v)), problem.layout.split(theirs @ v)):
            if not name.endswith("LayerNorm.weight"): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_classifier_of_texts_layer_by_layer():
    model = transformers_of("bert")
    ids, labels = torch.randint(1, 50, (12, 10), generator=GEN), torch.arange(12) % 2
    class Texts(torch.utils.data.Dataset):
        def __len__(self): return 12
        def __getitem__(self, i): return dict(input_ids=ids[i], labels=labels[i])
    def objective(model, batch): return F.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"], reduction="none")
    problem = Problem(model, objective, DataLoader(Texts(), batch_size=5))
    rows = problem.example_grads(problem.theta0, Batch(torch.tensor([3, 11])))
    for row, i in zip(rows, (3, 11)):
        model.zero_grad()
        model(input_ids=ids[i:i + 1], labels=labels[i:i + 1]).loss.backward()
        torch.testing.assert_close(row, torch.cat([p.grad.reshape(-1) for p in model.parameters()]), rtol=1e-3, atol=1e-6)
    model.zero_grad()
    layer = Problem(model, objective, DataLoader(Texts(), batch_size=5), params="bert.encoder.layer.0")
    assert layer.p == sum(p.numel() for p in model.bert.encoder.layer[0].parameters())
    part = torch.cat([torch.full((b.numel(),), k in layer.layout.names) for k, b in problem.layout.named(problem.theta0).items()])
    v = torch.randn(layer.p, generator=GEN)
    torch.testing.assert_close(layer.hvp(layer.theta0, v), problem.hvp(problem.theta0, torch.zeros(problem.p).masked_scatter(part, v))[part], rtol=1e-3, atol=1e-4)


def test_the_noise_scale_of_means_of_batches_counts_examples():
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 3, generator=gen, dtype=F64) + 1
    net = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad(): net.weight.fill_(.5)
    def outputs(model, batch): return model(batch[0]).squeeze(1)                # gradients xᵢ: covariance 1, mean (1, 1, 1)
    problem = Problem(net, lambda model, batch: outputs(model, batch).mean(), DataLoader(TensorDataset(x), batch_size=25))
    stepper = Descent(GD(1e-9), MiniBatch(1))
    _, traces = train(problem, stepper, 0, ["noise_scale:every=1"], progress=False)
    row = {k: float(v[0]) for k, v in traces["noise_scale"].columns.items()}
    assert row["low"] <= 1 <= row["high"] and row["high"] < 2 * row["low"]
    assert row["variance"] == pytest.approx(3, rel=.3) and row["norm_sq"] == pytest.approx(3, rel=.1)


def gauss_newton(net, logits, loss):
    "JᵀHJ from torch's dense Jacobian of all outputs and the Hessian of the loss in them."
    named = {k: v.detach() for k, v in net.named_parameters()}
    def f(theta):
        parts = theta.split([v.numel() for v in named.values()])
        return logits(lambda *args, **words: torch.func.functional_call(net, {k: t.view_as(v) for (k, v), t in zip(named.items(), parts)}, args, words))
    theta = torch.cat([v.reshape(-1) for v in named.values()])
    J, out = torch.autograd.functional.jacobian(f, theta), f(theta)
    H = torch.autograd.functional.hessian(loss, out).view(out.numel(), out.numel())
    return J.view(out.numel(), -1).T @ H @ J.view(out.numel(), -1)


def of_logits(out, batch): return F.cross_entropy(out, batch[1])
def of_each(out, batch): return F.cross_entropy(out, batch[1], reduction="none")
WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1., 2., 5.], dtype=F64))

@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("loss", ["ce", F.cross_entropy, WEIGHTED, of_logits, of_each], ids=["name", "function", "weighted", "mean", "each"])
def test_gauss_newton_where_outputs_and_loss_are_known_apart(data, loss):
    parts = (lambda model, batch: model(batch[0]), loss) if loss in (of_logits, of_each) else loss
    problem = Problem(NET, parts, DATA[data])
    agrees(problem, brute(NET, lambda model: (WEIGHTED if loss is WEIGHTED else F.cross_entropy)(model(X), Y)))
    truth = gauss_newton(NET, lambda model: model(X), lambda out: (WEIGHTED if loss is WEIGHTED else F.cross_entropy)(out, Y))
    v = normal(problem.p, 2)
    torch.testing.assert_close(problem.at().ggn(v), truth @ v, rtol=1e-9, atol=1e-12)
    if problem.dataset.whole:
        with pytest.raises(TypeError, match="only the mean of a batch"): problem.at().fisher(v, "data")
    elif loss is not WEIGHTED:
        g = torch.stack([torch.cat([t.flatten() for t in torch.autograd.grad(F.cross_entropy(NET(X[i:i + 1]), Y[i:i + 1]), NET.parameters())]) for i in range(len(X))])
        torch.testing.assert_close(problem.at().fisher(v, "data"), g.T @ (g @ v) / len(X), rtol=1e-9, atol=1e-12)


def test_gauss_newton_of_a_language_model_with_padding():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=5, n_positions=4, bos_token_id=0, eos_token_id=0)).double().eval()
    ids, labels = torch.randint(5, (6, 4)), torch.randint(5, (6, 4))
    labels[::2, 2:] = -100
    batches = [dict(input_ids=ids[i:j], labels=labels[i:j]) for i, j in ((0, 1), (1, 6))]
    def logits(model, batch): return model(input_ids=batch["input_ids"]).logits[:, :-1]
    def loss(out, batch):
        target = batch["labels"][:, 1:]
        return F.cross_entropy(out.transpose(1, 2), target, reduction="none", ignore_index=-100).sum(1), (target != -100).sum(1)
    problem = Problem(model, (logits, loss), batches)
    with sdpa_kernel(SDPBackend.MATH):
        truth = gauss_newton(model, lambda model: model(input_ids=ids).logits[:, :-1], lambda out: F.cross_entropy(out.transpose(1, 2), labels[:, 1:], ignore_index=-100))
    v = normal(problem.p)
    torch.testing.assert_close(problem.at().ggn(v), truth @ v, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="no negative log-likelihood known|labels='data'"): Problem(model, (logits, lambda out, b: loss(out, b)[0]), torch.utils.data.DataLoader(batches_of(ids, labels))).at().fisher(v)
    whole = Problem(model, lambda model, batch: model(**batch).loss, batches)
    with pytest.raises(TypeError, match=r"Problem\(model, \(outputs, loss\), data\)"): whole.at().ggn(v)
    with pytest.raises(TypeError, match="return its .logits"): Problem(model, (lambda model, batch: model(**batch), lambda out, batch: out.loss), batches).at().ggn(v)


def batches_of(ids, labels): return [dict(input_ids=i, labels=l) for i, l in zip(ids, labels)]


def test_an_objective_may_read_what_a_network_returns_in_training_only():
    class Detector(torch.nn.Module):
        def __init__(self): super().__init__(); self.layer = torch.nn.Linear(3, 2)
        def forward(self, x, y=None): return {"error": (self.layer(x) - y).square().mean()} if self.training else [*self.layer(x)]
    x, y = torch.linspace(-1, 1, 12).view(4, 3), torch.linspace(0, 1, 8).view(4, 2)
    problem = Problem(net := Detector(), lambda model, batch: sum(model(*batch).values()), [(x, y)])
    weight, bias = net.layer.weight.detach(), net.layer.bias.detach()
    torch.testing.assert_close(float(problem.at(problem.theta0).loss), float((x @ weight.T + bias - y).square().mean()))
    with pytest.raises(AttributeError, match="values"): problem.frozen().at(problem.theta0).loss


@pytest.mark.parametrize("fixed", [True, False])
def test_a_network_is_tried_on_a_part_of_a_batch_unless_it_insists_on_the_whole(fixed):
    torch.manual_seed(0)
    seen = []
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.lin, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        def forward(self, x): seen.append(len(x)); return self.norm(self.lin(x.view(16, 4) if fixed else x))
    net, x, y = Net().double(), normal(32, 4), torch.randint(3, (32,))
    problem = Problem(net, mean, DataLoader(TensorDataset(x, y), batch_size=16))
    assert problem.dataset.whole and (16 in seen) == fixed
    still = deepcopy(net)
    agrees(problem, brute(still, lambda model: (F.cross_entropy(model(x[:16]), y[:16]) + F.cross_entropy(model(x[16:]), y[16:])) / 2))


def test_two_tensors_are_inputs_and_targets_and_what_else_is_meant_is_told_the_way():
    def of_outputs(outputs, targets): return (outputs.square().sum(1) - targets).mean()
    agrees(Problem(NET, "ce", (X, Y)), brute(NET, lambda model: F.cross_entropy(model(X), Y)))
    for data in ((X, Y[:5]), [X, Y]):
        with pytest.raises(TypeError, match=r"^ce is a loss .*\(inputs, targets\) of one length"): Problem(NET, "ce", data)
    with pytest.raises(TypeError, match=r"of_outputs does not read \(model, batch\).*lambda outputs, batch: loss"): Problem(NET, of_outputs, DATA["a data set"])
    pair = lambda model, batch: model(batch[0]), lambda outputs, batch: of_outputs(outputs, batch[1])
    agrees(Problem(NET, pair, TensorDataset(X, Y)), brute(NET, lambda model: of_outputs(model(X), Y)))


def test_targets_that_are_no_class_are_left_out_where_the_loss_says_so_and_else_refused():
    y = Y.where(torch.arange(23) % 5 != 2, -100)
    data = TensorDataset(X, y)
    agrees(Problem(NET, nn.CrossEntropyLoss(), data), brute(NET, lambda model: F.cross_entropy(model(X), y)))
    for loss, says in (("ce", "Target -100 is out of bounds.*ignore_index"), (nn.CrossEntropyLoss(ignore_index=-5), "Target -100 is out of bounds")):
        with pytest.raises(IndexError, match=says): (problem := Problem(NET, loss, data)).loss(problem.theta0)
    with pytest.raises(ValueError, match="targets of ce are inside its batches.*Dataset"): Problem(NET, "ce", TensorDataset(X, Y)).at().fisher(normal(Problem(NET, "ce", TensorDataset(X, Y)).p))


def test_of_data_with_nan_the_example_is_named():
    x, y = normal(20, 4).float(), torch.zeros(20)
    x[3, 2] = float("nan")
    problem = Problem(torch.nn.Linear(4, 1), lambda model, batch: (model(batch[0])[:, 0] - batch[1]).square(), torch.utils.data.TensorDataset(x, y))
    with pytest.raises(ValueError, match="gradient of example 3 is not finite"): Spread.at(problem, problem.theta0)


def test_a_weighted_l1_loss_keeps_its_weight_where_torch_tells_no_mode_of_it():
    "Autocast in the network, which is left off by a mode; tensors that it makes itself, in float64; hard sigmoids, whose second derivatives are another function's."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 2)
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16): return self.two(F.hardsigmoid(self.one(x + torch.zeros(3))))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x, y, w = Net(), torch.randn(12, 3), torch.randn(12, 2), 5 * torch.rand(12, 2)
    with pytest.warns(UserWarning, match="turns torch.autocast on"): problem = Problem(net, lambda model, batch: F.l1_loss(model(batch[0]).to(batch[1]), batch[1], weight=batch[2]), [(x, y, w)])
    def loss(theta):
        a, b, c, d = theta.split([15, 5, 10, 2])
        return ((F.relu6(x.to(theta) @ a.view(5, 3).T + b + 3) / 6 @ c.view(2, 5).T + d - y).abs() * w).sum() / w.sum()
    theta, v = problem.theta0, torch.linspace(-1, 1, 32)
    torch.testing.assert_close(problem.loss(theta), loss(theta))
    torch.testing.assert_close(problem.grad_and_loss(theta)[0], torch.autograd.functional.jacobian(loss, theta))
    with pytest.warns(UserWarning, match="kinks"): eigs = sharpness(problem.at(), tol=1e-5)
    H = torch.autograd.functional.hessian(loss, theta.double())
    torch.testing.assert_close(problem.hvp(theta, v), (H @ v.double()).float(), rtol=1e-4, atol=1e-6)
    assert float(eigs.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-4)
