"Losses: two dtypes, many classes, both orders of autograd, vmap over single examples, and what must not pass."
import itertools
from functools import partial
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jvp, vmap
from gradnb import Batch, Dataset, Problem, Stream
from gradnb.measure.noise.spread import Spread, noise_scale
from gradnb.move.estimators.importance import ImportanceSampling
from gradnb.models.losses import LOSSES, accuracy, ce, linear_hinge, mse, resolve_loss, unit_mse


def batch(b, o, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, o, dtype=dtype, generator=g), torch.randint(o, (b,), generator=g)


def by_hand(name, f, y):
    "One example, Python floats: f a list of outputs, y its class."
    if name == "ce": return torch.tensor(f, dtype=torch.float64).logsumexp(0).item() - f[y]
    if name == "mse": return sum((v - (c == y)) ** 2 for c, v in enumerate(f)) / 2
    if name == "unit_mse": return sum((v - (c == y) * len(f) ** 0.5) ** 2 for c, v in enumerate(f)) / len(f)
    return sum(max(0.0, 1 - v if c == y else 1 + v) for c, v in enumerate(f)) / len(f)


@pytest.mark.parametrize("name, o, dtype", list(itertools.product(LOSSES, (1, 2, 10), (torch.float32, torch.float64))))
def test_per_example_values(name, o, dtype):
    f, y = batch(7, o, dtype)
    got = LOSSES[name](f, y)
    want = torch.tensor([by_hand(name, row.tolist(), int(t)) for row, t in zip(f, y)], dtype=dtype)
    assert got.shape == (7,) and got.dtype == dtype
    torch.testing.assert_close(got, want)


def test_torch_agrees():
    f, y = batch(9, 5)
    torch.testing.assert_close(ce(f, y).mean(), F.cross_entropy(f, y))
    torch.testing.assert_close(mse(f, y).mean(), 0.5 * 5 * F.mse_loss(f, F.one_hot(y, 5).double()))
    torch.testing.assert_close(mse(f, f.flip(0)).mean(), 0.5 * 5 * F.mse_loss(f, f.flip(0)))
    torch.testing.assert_close(unit_mse(f, f.flip(0)).mean(), F.mse_loss(f, 5 ** .5 * f.flip(0)))


def test_large_logits_stay_finite():
    f = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert torch.equal(ce(f, torch.tensor([0, 0])), torch.tensor([0.0, 2e4]))


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_and_products(name):
    f, y = batch(3, 4)
    dense = hessian(lambda f: LOSSES[name](f, y).sum())(f).reshape(12, 12)
    if name in ("mse", "unit_mse"): want = torch.eye(12, dtype=f.dtype) * (1 if name == "mse" else 2 / 4)
    elif name == "linear_hinge": want = torch.zeros(12, 12, dtype=f.dtype)
    else:
        p = f.softmax(1)
        want = torch.block_diag(*(row.diag() - row.outer(row) for row in p))
    torch.testing.assert_close(dense, want)
    f.requires_grad_()
    g, = torch.autograd.grad(LOSSES[name](f, y).sum(), f, create_graph=True)
    v = torch.ones_like(f)
    if g.requires_grad:      # the hinge's gradient is piecewise constant
        hv, = torch.autograd.grad(g, f, v, materialize_grads=True)
        torch.testing.assert_close(hv.flatten(), want.sum(1))
    forward = jvp(grad(lambda f: LOSSES[name](f, y).sum()), (f.detach(),), (v,))[1]
    torch.testing.assert_close(forward.flatten(), want.sum(1))


@pytest.mark.parametrize("name, randomness", list(itertools.product(LOSSES, ("error", "different"))))
def test_example_gradients_through_a_network(name, randomness):
    x, y = batch(6, 4)
    net = torch.nn.Linear(4, 4, dtype=torch.float64)
    theta = {k: torch.full_like(p, 0.3) for k, p in net.named_parameters()}
    cost = lambda th, a, t: LOSSES[name](functional_call(net, th, a[None]), t[None]).sum()
    rows = vmap(grad(cost), (None, 0, 0), randomness=randomness, chunk_size=4)(theta, x, y)
    for i in range(6):
        alone = grad(cost)(theta, x[i], y[i])
        for k in theta: torch.testing.assert_close(rows[k][i], alone[k])


@pytest.mark.parametrize("name", LOSSES)
def test_texts_are_means_over_their_positions_with_a_target(name):
    f, y = batch(6 * 5, 4)
    f, y = f.reshape(6, 5, 4), y.reshape(6, 5)
    y[torch.arange(4), torch.arange(4)] = -1
    y[1] = -1; y[1, 2] = 3
    want = torch.stack([LOSSES[name](a[t >= 0], t[t >= 0]).mean() for a, t in zip(f, y)])
    torch.testing.assert_close(LOSSES[name](f, y), want)
    rows = vmap(grad(lambda a, t: LOSSES[name](a[None], t[None]).sum()))(f, y)
    f.requires_grad_()
    torch.testing.assert_close(rows, torch.autograd.grad(LOSSES[name](f, y).sum(), f)[0])
    assert not rows[y < 0].any()


def test_accuracy_of_texts():
    f, y = batch(6 * 5, 4)
    f, y = f.reshape(6, 5, 4), y.reshape(6, 5)
    y[0, :4] = -1
    want = [(a.argmax(1) == t)[t >= 0].double().mean() for a, t in zip(f, y)]
    torch.testing.assert_close(accuracy(f, y), torch.stack(want).mean())
    with pytest.raises(ValueError, match="accuracies got outputs"): accuracy(f, y[:, 0])


def test_float_targets_under_vmap():
    f, t = batch(5, 3)[0], batch(5, 3, seed=1)[0]
    rows = vmap(grad(lambda a, b: mse(a[None], b[None]).sum()))(f, t)
    torch.testing.assert_close(rows, f - t)


def zeros(*shape): return torch.zeros(shape, dtype=torch.int64)


bad = [
    ("ce", (4, 3), zeros(4, 1)), ("ce", (4, 3), zeros(5)), ("ce", (4,), zeros(4)), ("ce", (4, 3, 2), zeros(4, 2)),
    ("mse", (4, 1), torch.zeros(4)), ("mse", (4, 3), torch.zeros(4, 1)), ("mse", (4, 3), torch.zeros(3)),
    ("mse", (4,), torch.zeros(4)), ("mse", (4, 3, 2), torch.zeros(4, 3, 2)), ("mse", (4, 3), zeros(4, 3)),
    ("unit_mse", (4, 3), zeros(4, 3)), ("unit_mse", (4,), zeros(4)), ("unit_mse", (4, 3), torch.zeros(4)), ("linear_hinge", (4, 3), zeros(1)), ("linear_hinge", (4, 3), zeros(4, 3)), ("linear_hinge", (3,), zeros(3)),
]


@pytest.mark.parametrize("name, shape, targets", bad, ids=str)
def test_wrong_shapes_name_both(name, shape, targets):
    with pytest.raises(ValueError) as e: LOSSES[name](torch.zeros(shape), targets)
    assert name in str(e.value) and str(tuple(shape)) in str(e.value) and str(tuple(targets.shape)) in str(e.value)


@pytest.mark.parametrize("name, dtype", [("ce", torch.float32), ("unit_mse", torch.int32), ("linear_hinge", torch.float64), ("ce", torch.int32),
                                         ("mse", torch.uint8), ("mse", torch.bool), ("linear_hinge", torch.int32)])
def test_wrong_targets_name_the_dtype(name, dtype):
    with pytest.raises(TypeError, match=str(dtype)): LOSSES[name](torch.zeros(4, 3), torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize("name, label", list(itertools.product(LOSSES, (-100, -1, 3))))
def test_labels_out_of_range_never_pass_silently(name, label):
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        LOSSES[name](torch.zeros(2, 3), torch.tensor([0, label]))


def test_shapes_are_checked_inside_vmap():
    with pytest.raises(ValueError, match="floating targets"):
        vmap(lambda a, b: mse(a[None], b))(torch.zeros(4, 1), torch.zeros(4, 1))


def test_resolve():
    mine = lambda f, y: f.square().sum(1)
    assert [resolve_loss(n) for n in ("ce", "mse", "linear_hinge")] == [ce, mse, linear_hinge]
    assert resolve_loss(mine) is mine
    for wrong in (None, 3, torch.nn.MSELoss):
        with pytest.raises(TypeError): resolve_loss(wrong)
    with pytest.raises(ValueError, match="ce, linear_hinge, mse"): resolve_loss("nll")


def test_accuracy():
    f, y = batch(50, 4, torch.float32)
    got = accuracy(f, y)
    assert got.shape == () and got.dtype == torch.float32
    assert got.item() == pytest.approx(sum(int(max(range(4), key=lambda c: r[c])) == int(t) for r, t in zip(f, y)) / 50)
    assert accuracy(torch.zeros(3, 2), torch.zeros(3, 2)) is None
    with pytest.raises(ValueError, match="accuracy"): accuracy(f, y[:, None])


# Weighted means: torch's own number is the oracle, with its own gradients, on data whose weights are uneven

class Rows(torch.nn.CrossEntropyLoss):
    "Texts (b, T, classes), position by position."
    def forward(self, outputs, targets): return super().forward(outputs.flatten(0, 1), targets.flatten())


class Reader(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5)

    def forward(self, x): return self.out(self.words(x).cumsum(1).tanh())


W = torch.tensor([1., 2, 5])
nn = torch.nn
CLASSES = [nn.CrossEntropyLoss(weight=W), nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=1), nn.CrossEntropyLoss(label_smoothing=0.1),
           nn.CrossEntropyLoss(weight=W, ignore_index=0, label_smoothing=0.2), nn.MultiMarginLoss(weight=W), F.cross_entropy,
           partial(F.cross_entropy, weight=W.double(), ignore_index=2)]
NUMBERS = [nn.CrossEntropyLoss(weight=W), nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(), nn.BCEWithLogitsLoss(pos_weight=W), nn.BCEWithLogitsLoss(weight=W),
           nn.PoissonNLLLoss(), nn.KLDivLoss(), nn.KLDivLoss(reduction="batchmean"), nn.MultiLabelSoftMarginLoss(), F.mse_loss]
TEXTS = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=-1), Rows(ignore_index=-1), nn.CrossEntropyLoss(ignore_index=3),
         lambda f, y: ((ce_of(f, y) * (y >= 0)).sum(1), (y >= 0).sum(1).to(f))]


def ce_of(f, y): return F.cross_entropy(f.mT, y.clamp(min=0), reduction="none")


def weighted_case(kind):
    "A network, its data, and torch's value of a loss on outputs and targets."
    gen = torch.Generator().manual_seed(5)
    if kind == "texts":
        x, y = torch.randint(5, (2, 30, 6), generator=gen)
        for i in range(30): y[i, 1 + i % 6:] = -1                   # one target to six
        return Reader().double(), Dataset(x, y, x[:7], y[:7], classes=5, words=5)
    x = torch.randn(30, 4, generator=gen, dtype=torch.float64)
    y = torch.randint(3, (30,), generator=gen) if kind == "classes" else torch.rand(30, 3, generator=gen, dtype=torch.float64)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double(), Dataset(x, y, x[:7], y[:7], classes=3 if kind == "classes" else None)


def torchs(loss, outputs, targets):
    if outputs.ndim == 2: return (loss.to(outputs) if isinstance(loss, nn.Module) else loss)(outputs, targets)
    there = targets >= 0 if getattr(loss, "ignore_index", -1) < 0 else (targets >= 0) & (targets != loss.ignore_index)
    return F.cross_entropy(outputs[there], targets[there])          # the mean over all tokens


@pytest.mark.parametrize("kind, loss", [(k, l) for k, ls in (("classes", CLASSES), ("numbers", NUMBERS), ("texts", TEXTS)) for l in ls])
def test_a_mean_of_torchs_is_torchs_number_with_all_that_follows(kind, loss):
    net, data = weighted_case(kind)
    whole, parts = Problem(net, loss, data), Problem(net, loss, data, chunk_size=7)
    theta, v = whole.theta0, torch.randn(whole.p, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    params = list(net.parameters())
    flat = lambda ts: torch.cat([t.flatten() for t in ts])
    want = torchs(loss, net(data.x), data.y)
    g = flat(torch.autograd.grad(want, params, create_graph=True))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for problem in (whole, parts):
        close(problem.loss(theta), want.detach())
        close(problem.grad_and_loss(theta)[0], g.detach())
        close(problem.example_grads(theta).mean(0), g.detach())
        close(sum(io.moments()[0] for io in problem.layer_io(theta, rows=7)) / 30, g.detach())
        close(sum(io.losses.sum() for io in problem.layer_io(theta, rows=7)) / 30, want.detach())
        if not isinstance(loss, nn.MultiMarginLoss):                # which torch differentiates once
            close(problem.hvp(theta, v), flat(torch.autograd.grad(g @ v, params, retain_graph=True, materialize_grads=True)))
    assert whole.evaluate(theta).loss == pytest.approx(want.item(), rel=1e-12)
    with torch.no_grad(): assert whole.evaluate(theta, "test").loss == pytest.approx(float(torchs(loss, net(data.x_test), data.y_test)), rel=1e-12)
    shares = torch.stack([whole.loss(theta, Batch(i)) for i in torch.arange(30).split(5)])
    close(shares.mean(), want.detach())                             # a batch is an unbiased share
    assert not whole.coupled


def test_gauss_newton_of_a_weighted_mean_is_brute_force_and_what_is_no_likelihood_is_refused():
    net, data = weighted_case("classes")
    problem = Problem(net, nn.CrossEntropyLoss(weight=W), data, chunk_size=11)
    theta, w, total = problem.theta0, W.double()[data.y], torch.zeros(problem.p, problem.p, dtype=torch.float64)
    J = torch.func.jacrev(lambda t: problem.outputs(t, data.x))(theta)
    for j, f, c in zip(J, problem.outputs(theta, data.x), w):
        p = f.softmax(0)
        total += c * j.T @ (p.diag() - p.outer(p)) @ j
    torch.testing.assert_close(problem.at(theta).ggn(torch.eye(problem.p, dtype=torch.float64)), total / w.sum())
    G = problem.example_grads(theta)
    torch.testing.assert_close(problem.at(theta).fisher(theta, "data"), G.T @ (G @ theta) / 30)
    with pytest.raises(ValueError, match="CrossEntropyLoss.*no negative log-likelihood"): problem.at(theta).fisher(theta)
    plain = Problem(net, nn.CrossEntropyLoss(), data)
    assert torch.equal(plain.at(theta).fisher(theta), Problem(net, "ce", data).at(theta).fisher(theta))


def test_importance_sampling_of_a_weighted_mean_is_unbiased_and_as_noisy_as_its_draws():
    net, data = weighted_case("classes")
    problem = Problem(net, nn.CrossEntropyLoss(weight=W), data)
    theta = problem.theta0
    estimator = ImportanceSampling(4, floor=0.5)
    state = estimator.refresh(estimator.init(problem, theta), problem, theta, 0, Stream())
    G, q = problem.example_grads(theta), state.q
    want = torch.autograd.grad(torchs(nn.CrossEntropyLoss(weight=W), net(data.x), data.y), list(net.parameters()))
    torch.testing.assert_close((q[:, None] * (G / (30 * q[:, None]))).sum(0), torch.cat([t.flatten() for t in want]))
    batch = estimator.sample(state, problem, Stream(3))
    torch.testing.assert_close(problem.grad_and_loss(theta, batch)[0], (G[batch.idx] / (30 * q[batch.idx, None])).mean(0))


def normal(f): return F.normalize(f, dim=1)


COUPLED = {"InfoNCE": lambda f, y: F.cross_entropy(normal(f) @ normal(f).T / 0.1, torch.arange(len(f)), reduction="none"),
           "mean inside": lambda f, y: ce(f, y) / ce(f, y).mean(), "classes of the batch": lambda f, y: ce(f, y) / y.bincount(minlength=3)[y],
           "batch-normalised": lambda f, y: F.batch_norm(f, None, None, training=True).square().sum(1), "to be added up": lambda f, y: ce(f, y) / len(f),
           "a pair": lambda f, y: (ce(f, y) - ce(f, y).mean() + f[:, 0].square(), torch.ones(len(f), dtype=f.dtype))}


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_sees_its_company_is_right_on_the_whole_and_has_no_examples(name):
    net, data = weighted_case("classes")
    loss = COUPLED[name]
    mean = lambda out: (loss(out, data.y)[0] if name == "a pair" else loss(out, data.y)).mean()
    problem = Problem(net, loss, data)
    theta, v, params = problem.theta0, problem.theta0.flip(0), list(net.parameters())
    g = torch.cat([t.flatten() for t in torch.autograd.grad(mean(net(data.x)), params, create_graph=True)])
    hv = torch.cat([t.flatten() for t in torch.autograd.grad(g @ v, params)])
    for got, want in ((problem.loss(theta), mean(net(data.x))), (problem.grad_and_loss(theta)[0], g), (problem.hvp(theta, v), hv)):
        torch.testing.assert_close(got, want.detach(), atol=1e-12, rtol=1e-10)
    for refused in (lambda: problem.example_grads(theta), lambda: next(problem.layer_io(theta)), lambda: noise_scale(Spread.at(problem, theta)),
                    lambda: problem.at(theta).fisher(theta, "data"), lambda: ImportanceSampling(4, by="loss").refresh(
                        ImportanceSampling(4).init(problem, theta), problem, theta, 0, Stream())):
        with pytest.raises(TypeError, match="depends on the others in its batch"): refused()
    with pytest.raises(ValueError, match="chunk_size=7 would change this loss"): Problem(net, loss, data, chunk_size=7)
    Problem(net, loss, data, chunk_size=30)


def test_single_examples_may_fail_a_loss_of_few():
    net, data = weighted_case("classes")
    few = Dataset(data.x[:2], data.y[:2], data.x[:2], data.y[:2], classes=3)
    assert Problem(net, COUPLED["InfoNCE"], few).coupled and not Problem(net, "ce", few).coupled


@pytest.mark.parametrize("loss, error, says", [
    (lambda f, y: F.cross_entropy(f, y, weight=W.double()), TypeError, "the pair \\(sums, weights\\)"),
    (nn.CrossEntropyLoss(reduction="sum"), TypeError, "reduction='mean'"),
    (lambda f, y: (ce(f, y), f.square().sum(1)), TypeError, "depend on the outputs"),
    (lambda f, y: (ce(f, y), 0 * y.to(f)), ValueError, "add up to 0"),
    (nn.NLLLoss(weight=torch.zeros(3)), ValueError, "add up to 0")])
def test_a_mean_that_is_not_understood_is_refused_without_another_objective(loss, error, says):
    net, data = weighted_case("classes")
    with pytest.raises(error, match=says) as e: Problem(net, loss, data)
    assert "reduction='none'" not in str(e.value)


def test_a_module_that_averages_in_its_own_way_is_compared_with_itself():
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.reduction = "mean"
        def forward(self, f, y):
            rows = ce(f, y)
            return rows if self.reduction == "none" else (rows * W.double()[y]).sum() / W.double()[y].sum()
    net, data = weighted_case("classes")
    with pytest.raises(TypeError, match="averages in a way that is not known"): Problem(net, Odd(), data)
    numbers = weighted_case("numbers")[1]
    with pytest.raises(ValueError, match="give them one shape"): Problem(nn.Linear(4, 1).double(), nn.MSELoss(), numbers)
