"Losses: two dtypes, many classes, both orders of autograd, vmap over single examples, and what must not pass."
import itertools
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jvp, vmap
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
    for wrong in (None, 3, torch.nn.MSELoss, torch.nn.MSELoss()):
        with pytest.raises(TypeError): resolve_loss(wrong)
    with pytest.raises(ValueError, match="ce, linear_hinge, mse"): resolve_loss("nll")


def test_accuracy():
    f, y = batch(50, 4, torch.float32)
    got = accuracy(f, y)
    assert got.shape == () and got.dtype == torch.float32
    assert got.item() == pytest.approx(sum(int(max(range(4), key=lambda c: r[c])) == int(t) for r, t in zip(f, y)) / 50)
    assert accuracy(torch.zeros(3, 2), torch.zeros(3, 2)) is None
    with pytest.raises(ValueError, match="accuracy"): accuracy(f, y[:, None])
