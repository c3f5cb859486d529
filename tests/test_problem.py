"Derivatives of every model and loss against the dense Hessian and finite differences; chunks, weights, dtypes, devices."
import subprocess
import sys
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from gradnb import GD, Batch, Dataset, Descent, FullBatch, Problem, Stream, audit_operator, build_model, load_dataset, sharpness, train
from gradnb.linalg import lanczos
from gradnb.problem.audit import slopes
from gradnb.ground.memory import free_memory
from gradnb.problem.likelihood import sample_targets
from gradnb.problem import modes
from gradnb.problem.modes import Defaults, drawing
from gradnb.measure.probes.view import PROBES
from gradnb.runs.foreign.glance import untouched

weight_norm = torch.nn.utils.weight_norm      # by a hook, in a plain Linear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
CASES = [("fc-tanh:width=6,depth=2", "mse"), ("fc-softplus:width=6,depth=1", "ce"), ("fc-elu:width=6,depth=1", "ce"),
         ("fc-relu:width=6,depth=2", "ce"), ("fc-hardtanh:width=6,depth=1", "mse"), ("fc:width=6,depth=3", "linear_hinge")]


def make(model="fc-tanh:width=6,depth=1", loss="mse", dtype=torch.float64, chunk=None, device="cpu", data="digits-60"):
    dataset = load_dataset(data)
    return Problem(build_model(model, dataset).to(device, dtype), loss, dataset, chunk)


def draw(*shape, name="test", like=None):
    v = torch.randn(*shape, generator=Stream(0, (name,)).generator(), dtype=torch.float64)
    return v if like is None else v.to(like)


def dense(problem, theta):
    chunk, = problem.chunks()
    return torch.autograd.functional.hessian(lambda t: problem.piece(t, *chunk), theta)


@pytest.mark.parametrize("model, loss", CASES)
def test_hvp_is_the_dense_hessian(model, loss):
    problem = make(model, loss)
    H, V = dense(problem, problem.theta0), draw(problem.p, 3)
    torch.testing.assert_close(problem.hvp(problem.theta0, V), H @ V, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(problem.hvp(problem.theta0, V[:, 0]), H @ V[:, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model, loss", [c for c in CASES if "relu" not in c[0] and "hardtanh" not in c[0] and c[1] != "linear_hinge"])
def test_hvp_is_a_difference_of_gradients(model, loss):
    problem = make(model, loss)
    v, eps = draw(problem.p), 1e-5
    g = [problem.grad_and_loss(problem.theta0 + s * eps * v)[0] for s in (1, -1)]
    torch.testing.assert_close(problem.hvp(problem.theta0, v), (g[0] - g[1]) / (2 * eps), rtol=1e-5, atol=1e-7)


class Attention(torch.nn.Module):
    "torch's own layer, whose fused kernel has no second derivative."
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0., activation="gelu", batch_first=True)
        self.out = torch.nn.Linear(64, 10)

    def forward(self, x): return self.out(self.layer(x.view(-1, 8, 8)).flatten(1))


def test_torchs_own_attention():
    with drawing(Stream(0), torch.device("cpu")): problem = Problem(Attention().double(), "ce", load_dataset("digits-60"))
    v, eps = draw(problem.p), 1e-5
    g = [problem.grad_and_loss(problem.theta0 + s * eps * v)[0] for s in (1, -1)]
    point = problem.at(problem.theta0)
    torch.testing.assert_close(point.hvp(v), (g[0] - g[1]) / (2 * eps), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(point.quadratic(v), v @ point.hvp(v), rtol=1e-10, atol=0)
    J = torch.func.jacrev(lambda t: problem.outputs(t, problem.dataset.x[:3]))(problem.theta0)
    q = torch.softmax(problem.outputs(problem.theta0, problem.dataset.x[:3]), 1)
    moved = J @ v
    truth = torch.einsum("bcp,bc->p", J, q * moved - q * (q * moved).sum(1, keepdim=True)) / 3
    torch.testing.assert_close(problem.at(problem.theta0, Batch(torch.arange(3))).ggn(v), truth, rtol=1e-9, atol=1e-12)
    assert sharpness(problem, problem.theta0).converged


def test_regression_network():
    problem = make("regression", data="chebyshev-3-20")
    eigs = sharpness(problem, problem.theta0, k=2, tol=1e-8)
    truth = torch.linalg.eigvalsh(dense(problem, problem.theta0)).flip(0)[:2]
    torch.testing.assert_close(eigs.values, truth, rtol=1e-8, atol=0)


@settings(max_examples=25, deadline=None)
@given(chunk=st.integers(1, 70), rows=st.lists(st.integers(0, 59), min_size=1, max_size=40), weighted=st.booleans())
def test_chunks_change_only_rounding(chunk, rows, weighted):
    whole, parts = make(), make(chunk=chunk)
    batch = Batch(torch.tensor(rows), draw(len(rows)).abs() if weighted else None)
    theta, V = whole.theta0, draw(whole.p, 2)
    for b in (None, batch):
        for f in ("loss", "grad_and_loss"):
            torch.testing.assert_close(getattr(parts, f)(theta, b), getattr(whole, f)(theta, b), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(parts.hvp(theta, V, b), whole.hvp(theta, V, b), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(parts.example_grads(theta, b), whole.example_grads(theta, b), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(parts.evaluate(theta), whole.evaluate(theta), rtol=1e-11, atol=0)


def test_weights_are_a_weighted_mean():
    problem = make()
    batch = Batch(torch.tensor([3, 3, 7]), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64))
    g = problem.example_grads(problem.theta0, batch)
    torch.testing.assert_close(problem.grad_and_loss(problem.theta0, batch)[0], (batch.weight @ g) / 3, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_device_and_dtype_follow_the_module(dtype, device):
    problem, reference = make(dtype=dtype, device=device), make()
    v = draw(problem.p, like=problem.theta0)
    grad, loss = problem.grad_and_loss(problem.theta0)
    assert {t.dtype for t in (grad, loss, problem.hvp(problem.theta0, v))} == {dtype}
    assert grad.device.type == device
    tol = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad.cpu().double(), reference.grad_and_loss(reference.theta0)[0], **tol)
    torch.testing.assert_close(problem.hvp(problem.theta0, v).cpu().double(), reference.hvp(reference.theta0, v.cpu().double()), **tol)


def test_nothing_is_disturbed():
    dataset = load_dataset("digits-60")
    net = build_model("fc-tanh:width=6", dataset)
    before, rng = [p.clone() for p in net.parameters()], torch.get_rng_state()
    problem = Problem(net, "ce", dataset)
    problem.hvp(problem.theta0, problem.theta0)
    problem.example_grads(problem.theta0)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, net.parameters()))
    assert net.training and torch.equal(rng, torch.get_rng_state())


def test_frozen_parameters_stay_out():
    dataset = load_dataset("digits-60")
    net = build_model("fc-tanh:width=6,depth=1", dataset)
    net.fc1.requires_grad_(False)
    assert Problem(net, "ce", dataset).p == 6 * 10 + 10


def test_a_piecewise_linear_loss_has_no_curvature():
    dataset = load_dataset("digits-60")
    problem = Problem(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), "linear_hinge", dataset)
    assert problem.hvp(problem.theta0, torch.ones_like(problem.theta0)).abs().max() == 0


def test_a_tied_parameter_moves_everywhere_at_once():
    a, b = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
    b.weight = a.weight
    net, dataset = torch.nn.Sequential(torch.nn.Flatten(), a, torch.nn.Tanh(), b).double(), load_dataset("digits-60").to(dtype=torch.float64)
    problem = Problem(net, "ce", dataset)
    assert problem.p == 64 * 64
    W = draw(64, 64) / 10
    x = dataset.x.flatten(1)
    torch.testing.assert_close(problem.outputs(W.reshape(-1), dataset.x), (x @ W.T).tanh() @ W.T, rtol=1e-12, atol=1e-12)


# --- Gauss–Newton and Fisher -------------------------------------------------------------------------------------

def pieces_by_hand(problem, theta, batch=None):
    "Gauss–Newton and empirical Fisher matrices from a dense Jacobian and Hessians of single examples' losses."
    (x, y, weight, n, _), = problem.chunks(batch)
    J = torch.func.jacrev(lambda t: problem.outputs(t, x))(theta).flatten(1, -2) if problem.outputs(theta, x).ndim > 1 \
        else torch.func.jacrev(lambda t: problem.outputs(t, x))(theta)[:, None]                    # (b, outputs, p)
    out = problem.outputs(theta, x)
    one = lambda o, y: problem.per_example(o[None], y[None])[0]
    M = torch.func.vmap(torch.func.hessian(one))(out, y).reshape(len(x), J.shape[1], J.shape[1])
    d = torch.func.vmap(torch.func.grad(one))(out, y).flatten(1)
    w = torch.ones(len(x), dtype=theta.dtype) if weight is None else weight
    G, g = torch.einsum("bip,bij,bjq->pq", J * w[:, None, None], M, J) / n, torch.einsum("bi,bip->bp", d, J)
    return G, (g * w[:, None]).T @ g / n


FAMILIES = [("fc-tanh:width=6,depth=2", "ce"), ("fc-relu:width=5,depth=2", "mse"), ("fc-tanh:width=5,depth=1", "unit_mse"),
            ("fc:width=4,depth=2", "linear_hinge"), ("cnn-tanh:width=3", "ce"), ("cnn-avgpool-elu:width=2", "mse"),
            ("deeplinear:width=6,depth=3", "mse"), ("resnet:width=2,blocks=1", "ce"), ("vit:width=4,layers=1,heads=1,head=4,hidden=6,init_scale=1", "ce"),
            ("lstm:width=4,layers=1", "ce"), ("mamba:width=4,layers=1", "mse"), ("gpt:width=4,layers=1,heads=1,dropout=0", "ce"), ("transformer:width=4,layers=1,heads=1,init_scale=1", "ce")]


def family(name, loss, chunk=None):
    "A small network of its kind: on digits, or on texts of seven tokens."
    if name.split(":")[0] in ("lstm", "mamba", "gpt", "transformer", "transformer-eos"):
        x = torch.randint(5, (20, 7), generator=Stream(3).generator())
        data = Dataset(x, (x + 1) % 5, x, (x + 1) % 5, 5, "counting", words=5)
    else: data = load_dataset("digits-20")
    return Problem(build_model(name, data).double(), loss, data, chunk)


@pytest.mark.parametrize("model, loss", FAMILIES)
def test_hessian_products_of_every_family_by_forward_over_reverse(model, loss):
    problem = family(model, loss)
    v, (chunk,) = draw(problem.p), problem.chunks()
    truth = torch.func.jvp(torch.func.grad(lambda t: problem.piece(t, *chunk)), (problem.theta0,), (v,))[1]
    torch.testing.assert_close(problem.hvp(problem.theta0, v), truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("model, loss", FAMILIES)
def test_gauss_newton_and_fisher_are_the_dense_ones(model, loss, weighted):
    problem = family(model, loss)
    assert problem.p <= 2000
    batch = Batch(torch.tensor([3, 3, 7, 11, 19]), draw(5).abs()) if weighted else None
    G, F = pieces_by_hand(problem, problem.theta0, batch)
    V, tol = draw(problem.p, 3), dict(rtol=1e-9, atol=1e-11)
    for chunk in (None, 2):
        point = family(model, loss, chunk).at(problem.theta0, batch)
        for product, truth in ((point.ggn, G), (lambda v: point.fisher(v, "data"), F)):
            torch.testing.assert_close(product(V), truth @ V, **tol)
            torch.testing.assert_close(product(V[:, 0]), truth @ V[:, 0], **tol)


# --- quadratic forms -----------------------------------------------------------------------------------------------

NORMED = [("fc-bn-tanh:width=5", "mse"), ("cnn-bn-tanh:width=2", "ce"), ("resnet32:width=2,blocks=1", "ce"),
          ("resnet32:width=2,blocks=1,norm=group", "mse"), ("resnet32:width=2,blocks=1,norm=free", "ce"), ("preact-resnet18:width=1", "ce"),
          ("cnn:width=2", "mse"), ("transformer-eos:width=4,layers=1,heads=1", "ce")]


def forms(V, product): return (V * product).sum(0)


@pytest.mark.parametrize("model, loss", FAMILIES + NORMED)
def test_quadratic_forms_of_every_family_are_products_and_dots(model, loss):
    some = Batch(torch.tensor([3, 3, 7, 11, 19, 0]), draw(6).abs())
    for problem, batch in ((family(model, loss), None), (family(model, loss, chunk=3), some)):
        theta = problem.theta0 + 0.1 * draw(problem.p, name="theta")
        V, point = draw(problem.p, 3), problem.at(theta, batch)
        HV = point.hvp(V)
        close = dict(rtol=1e-10, atol=1e-13 * float((V.norm(dim=0) * HV.norm(dim=0)).max()))
        torch.testing.assert_close(point.quadratic(V), forms(V, HV), **close)
        torch.testing.assert_close(point.quadratic(V[:, 1]), V[:, 1] @ HV[:, 1], **close)
    tied = ["out"] if model.startswith("gpt") else []
    layers = [k for k, m in problem.module.named_modules() if type(m) in (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d) and k not in tied]
    assert layers and problem.cuts == set(layers)


@pytest.mark.parametrize("model, loss", CASES + [("fc-bn-tanh:width=3,depth=1", "ce")])
def test_quadratic_forms_are_the_dense_hessians(model, loss):
    problem = make(model, loss)
    V = draw(problem.p, 3)
    truth = forms(V, dense(problem, problem.theta0) @ V)
    torch.testing.assert_close(problem.at(problem.theta0).quadratic(V), truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model, loss", FAMILIES)
def test_quadratic_forms_in_single_precision(model, loss, device):
    exact = family(model, loss)
    problem = Problem(deepcopy(exact.module).to(device, torch.float32), loss, exact.dataset)
    v = draw(problem.p)
    found = problem.at(problem.theta0).quadratic(v.to(problem.theta0))
    assert problem.cuts == exact.cuts and found.dtype == torch.float32 and found.device.type == device
    Hv = exact.hvp(exact.theta0, v)
    assert abs(found.item() - v @ Hv) <= 1e-5 * v.norm() * Hv.norm()


def hooked(module, hook): module.register_forward_hook(hook); return module


class Shared(torch.nn.Linear):
    def forward(self, x): return super().forward(x).tanh() @ self.weight                               # used twice in a module


class Borrowing(torch.nn.Sequential):
    def forward(self, x): return self[1](self[0](x)) + x.flatten(1) @ self[1].weight.T                  # used outside of its own


class Attending(torch.nn.Module):
    def __init__(self): super().__init__(); self.mix = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    def forward(self, x): return self.mix(*[x.reshape(len(x), 8, 8)] * 3)[0].flatten(1)


@pytest.mark.parametrize("odd", [lambda: Shared(64, 4), lambda: torch.nn.PReLU(64), Attending, lambda: Borrowing(torch.nn.Flatten(), torch.nn.Linear(64, 3)),
                                 lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(64, 3)), lambda: torch.nn.Bilinear(64, 64, 2), lambda: torch.nn.GRUCell(64, 3),
                                 lambda: weight_norm(torch.nn.Linear(64, 3)), lambda: hooked(torch.nn.Linear(64, 3), lambda m, _, y: y.square())])
def test_quadratic_forms_of_other_modules(odd):
    class Odd(torch.nn.Module):
        def __init__(self): super().__init__(); self.odd = odd(); self.out = torch.nn.LazyLinear(10)
        def forward(self, x):
            x = x.flatten(1)
            return self.out((self.odd(x, x) if isinstance(self.odd, torch.nn.Bilinear) else self.odd(x)).tanh())
    net, data = Odd(), load_dataset("digits-20")
    net(data.x)
    for p in net.parameters(): p.data = 0.1 * draw(*p.shape, name=str(p.shape))
    problem = Problem(net, "ce", data)
    v, theta = draw(problem.p), problem.theta0
    torch.testing.assert_close(problem.at(theta).quadratic(v), v @ problem.hvp(theta, v), rtol=1e-10, atol=0)
    assert problem.cuts == {"out"}


def test_forms_in_evaluation_mode_and_under_noise():
    problem = Problem(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.ReLU(inplace=True), torch.nn.BatchNorm1d(6), torch.nn.Tanh(),
                                          torch.nn.Dropout(0.4), torch.nn.Linear(6, 10)).double(), "ce", load_dataset("digits-60"))
    v, theta = draw(problem.p), problem.theta0
    shifted = {k: b + 2 for k, b in problem.buffers.items()}
    noisy = Batch(torch.arange(30), noise=Stream(4, ("noise",)))
    values = [point.quadratic(v) for point in (problem.at(theta), problem.frozen(shifted).at(theta), problem.at(theta, noisy))]
    products = [v @ p.hvp(theta, v, b) for p, b in ((problem, None), (problem.frozen(shifted), None), (problem, noisy))]
    torch.testing.assert_close(values, products, rtol=1e-10, atol=0)
    assert len({round(float(value), 6) for value in values}) == 3 and problem.cuts == problem.frozen(shifted).cuts == {"1", "6"}


def test_a_form_refuses_what_is_no_direction():
    problem = make()
    with pytest.raises(ValueError, match="a direction must have shape"): problem.at(problem.theta0).quadratic(torch.zeros(3).double())


def test_a_column_of_a_matrix_is_a_theta_like_any_other():
    problem = family("fc-bn-tanh:width=5", "mse")
    theta = (problem.theta0[:, None] + 0.1 * draw(problem.p, 3))[:, 1]
    torch.testing.assert_close(problem.grad_and_loss(theta), problem.grad_and_loss(theta.contiguous()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_a_network_without_hidden_layers_has_no_other_curvature(loss):
    dataset = load_dataset("digits-60")
    point = Problem(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double(), loss, dataset)
    point, v = point.at(point.theta0), draw(650)
    torch.testing.assert_close(point.ggn(v), point.hvp(v), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model, loss", [("fc-tanh:width=4,depth=1", "ce"), ("fc-tanh:width=4,depth=1", "mse"), ("gpt:width=4,layers=1,heads=1,dropout=0", "ce")])
def test_targets_of_the_model_give_the_fisher_matrix(model, loss):
    problem = family(model, loss)
    (x, y, _, n, _), = problem.chunks()
    v, out = draw(problem.p), problem.outputs(problem.theta0, x)
    slope = torch.func.vmap(torch.func.grad(lambda o, y: problem.per_example(o[None], y[None])[0]))
    Jv = torch.func.jvp(lambda t: problem.outputs(t, x), (problem.theta0,), (v,))[1]
    def form(stream):
        s = slope(out, sample_targets(problem.per_example, out, stream.generator()))
        return (s * Jv).flatten(1).sum(1).square().mean()
    forms = torch.stack([form(Stream(i, ("labels",))) for i in range(400)])
    truth = v @ problem.at(problem.theta0).fisher(v)
    assert abs(forms.mean() - truth) < 4 * forms.std() / 20 < .3 * truth


def test_batch_statistics_are_differentiated():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 10))
    problem = Problem(net.double(), "ce", load_dataset("digits-60"))
    (x, y, _, _, _), = problem.chunks()
    J = torch.func.jacrev(lambda t: problem.outputs(t, x))(problem.theta0)                          # (b, 10, p)
    P, v = problem.outputs(problem.theta0, x).softmax(1), draw(problem.p)
    s = torch.einsum("bij,bj->bi", torch.diag_embed(P) - P[:, :, None] * P[:, None], J @ v) / len(x)
    torch.testing.assert_close(problem.at(problem.theta0).ggn(v), torch.einsum("bi,bip->p", s, J), rtol=1e-8, atol=1e-10)


def test_memory_that_will_not_fit_is_refused_with_the_chunk_that_does(monkeypatch):
    problem = make(chunk=None)
    held = problem.graph_bytes
    assert held > 8 * (64 + 6 + 10)                              # at least the inputs and every layer's output, in float64
    for place in ("ground.memory", "problem.derivatives"): monkeypatch.setattr(f"gradnb.{place}.free_memory", lambda device: 30 * held)
    monkeypatch.setattr("gradnb.problem.derivatives.LITTLE", 0)
    with pytest.raises(MemoryError, match=r"60 examples.*chunk_size=24 or fewer"): problem.at(problem.theta0).grad
    assert make(chunk=24).at(problem.theta0).grad.isfinite().all()


@pytest.mark.parametrize("model, kinks", [("fc-tanh:width=6", ()), ("fc-relu:width=6", ("Relu",)), ("fc-hardtanh:width=6", ("Hardtanh",))])
def test_operations_without_a_second_derivative_are_named(model, kinks):
    problem = make(model)
    assert problem.kinks == kinks


def test_an_operation_of_ones_own_may_be_called_as_torchs():
    class AbsRoot(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): ctx.save_for_backward(x); return (x * x + 1).sqrt()
        @staticmethod
        def backward(ctx, g): x, = ctx.saved_tensors; return g * x / (x * x + 1).sqrt()
    net, data = torch.nn.Linear(64, 10), load_dataset("digits-20")
    problem, plain = (Problem(net, lambda m, b, f=f: F.cross_entropy(f(m(b[0].flatten(1))), b[1], reduction="none"), (data.x, data.y)) for f in (AbsRoot.apply, lambda x: (x * x + 1).sqrt()))
    assert problem.kinks == ("AbsRoot",) and plain.kinks == ()         # a kink for all that its name says
    torch.testing.assert_close(problem.hvp(problem.theta0, torch.ones(problem.p)), plain.hvp(plain.theta0, torch.ones(problem.p)))


def test_a_run_on_kinks_is_told_so_once():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        train(make("fc-relu:width=6"), Descent(GD(.1)), 4, [PROBES.build("sharpness:every=1")], progress=False)
    told = [str(w.message) for w in heard if issubclass(w.category, UserWarning)]
    assert len(told) == 1 and "kinks (Relu)" in told[0] and "smooth piece" in told[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharpness(make("fc-tanh:width=6"), make("fc-tanh:width=6").theta0)


def test_the_layer_whose_gradient_is_not_finite_is_named():
    "The root's slope at zero is infinite, and zero times that is nan; the layer behind it is not to blame."
    class Root(torch.nn.Module):
        def forward(self, x): return (0 * x).sqrt()
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4), Root(), torch.nn.Linear(4, 10))
    problem = Problem(module, "mse", load_dataset("digits-60"))
    assert problem.loss(problem.theta0).isfinite()
    with pytest.raises(ValueError, match=r"gradient is not finite in 1\.weight, 1\.bias;"): sharpness(problem, problem.theta0)
    theta = problem.theta0.clone()
    theta[-1] = torch.inf
    with pytest.raises(ValueError, match=r"theta is not finite in 3\.bias;"): sharpness(problem, theta)


# --- products that torch has wrong -----------------------------------------------------------------------------------

class Hidden(torch.autograd.Function):
    "A sine whose backward keeps its cosine out of torch's sight."
    @staticmethod
    def forward(ctx, x): ctx.slope = x.detach().cos(); return x.sin()
    @staticmethod
    def backward(ctx, g): return g * ctx.slope


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x.sin()
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return g * ctx.saved_tensors[0].cos()


class Open(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x.sin()
    @staticmethod
    def backward(ctx, g): return g * ctx.saved_tensors[0].cos()


class Through(torch.nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)


def between(f, norm=lambda m: m):
    with drawing(Stream(7), torch.device("cpu")):
        return torch.nn.Sequential(torch.nn.Flatten(), norm(torch.nn.Linear(64, 4)), Through(f), norm(torch.nn.Linear(4, 10)))


def differences(problem, theta, v, h=1e-5):
    g = lambda t: problem.grad_and_loss(t)[0]
    return (g(theta + h * v) - g(theta - h * v)) / (2 * h)


WEIGHT_NORMS = [weight_norm, torch.nn.utils.parametrizations.weight_norm, lambda m: torch.nn.utils.parametrizations.weight_norm(m, dim=1),
                lambda m: torch.nn.utils.parametrizations.weight_norm(m, dim=None)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("norm", WEIGHT_NORMS)
def test_weight_normalised_layers_have_their_second_derivatives(norm, frozen):
    net = torch.nn.Sequential(between(torch.tanh, norm), torch.nn.BatchNorm1d(10)).double()
    problem = Problem(net, "ce", load_dataset("digits-60"))
    if frozen: problem = problem.frozen()
    theta = problem.theta0 + 0.1 * draw(problem.p)
    V = draw(problem.p, 2)
    want = torch.stack([differences(problem, theta, v) for v in V.T], 1)
    assert (problem.hvp(theta, V) - want).norm() <= 1e-6 * want.norm()
    torch.testing.assert_close(problem.at(theta).quadratic(V[:, 0]), V[:, 0] @ problem.hvp(theta, V[:, 0]), rtol=1e-10, atol=0)
    if not frozen: return                                      # torch's batch_norm is differentiated twice
    third = (problem.hvp(theta + 1e-5 * V[:, 1], V[:, 0]) - problem.hvp(theta - 1e-5 * V[:, 1], V[:, 0])) / 2e-5
    torch.testing.assert_close(problem.curvature_grad(theta, V[:, 1], V[:, 0]) @ V[:, 0], third @ V[:, 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("f, linear", [(Once.apply, True), (Hidden.apply, False)])
def test_functions_whose_second_derivative_is_wrong_are_named_with_their_blocks(f, linear, dtype):
    problem = Problem(between(f).to(dtype), "ce", load_dataset("digits-60"))
    point, v = problem.at(problem.theta0), draw(problem.p, like=problem.theta0)
    for product in (point.hvp, point.quadratic, lambda v: point.curvature_grad(v, v), lambda v: sharpness(point), lambda v: problem.frozen().hvp(problem.theta0, v)):
        with pytest.raises(TypeError, match=f"'1.weight' .*{'Once' if linear else 'Hidden'}"): product(v)
    if linear:
        with pytest.raises(TypeError, match="Jacobian.*Once"): point.ggn(v)
    else: assert torch.isfinite(point.ggn(v)).all()            # which needs the first derivative alone
    assert torch.isfinite(point.grad).all()


class Implicit(torch.nn.Module):
    "A fixed point z = tanh(Wz + Ux), whose gradient a hook completes, as deep equilibrium networks do."
    def __init__(self, within):
        super().__init__()
        self.W, self.U, self.out, self.within = torch.nn.Linear(6, 6), torch.nn.Linear(64, 6), torch.nn.Linear(6, 10), within

    def forward(self, x):
        x, f = x.flatten(1), lambda z, x: self.within(torch.tanh(self.W(z.to(x)) + self.U(x)))
        with torch.no_grad():
            z = torch.zeros(len(x), 6)
            for _ in range(60): z = f(z, x)
        z = f(z, x)
        z0 = z.detach().requires_grad_()
        f0 = f(z0, x)
        def solve(g):
            v = g
            for _ in range(60): v = torch.autograd.grad(f0, z0, v, retain_graph=True)[0] + g
            return v
        if z.requires_grad: z.register_hook(solve)
        return self.out(z.to(x))


@pytest.mark.parametrize("within", [lambda t: t, torch.Tensor.float])
def test_a_network_with_tensors_in_float32_of_its_own_is_not_taken_at_its_word(within):
    net = Implicit(within)
    torch.nn.init.orthogonal_(net.W.weight, .7, generator=torch.Generator().manual_seed(0))
    problem = Problem(net, "ce", load_dataset("digits-60"))
    v = draw(problem.p, like=problem.theta0)
    with pytest.raises(TypeError, match="no differences of the gradient in 'W.weight'"): problem.hvp(problem.theta0, v)
    for f in (torch.tanh, torch.relu):
        right = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), Through(lambda x: f(x.float())), torch.nn.Linear(8, 10))
        Problem(right, "ce", load_dataset("digits-60")).check_products()


def test_tensors_that_a_network_makes_are_in_the_precision_of_its_copy():
    class Begun(torch.nn.Module):
        def __init__(self): super().__init__(); self.cell, self.out, self.said = torch.nn.GRUCell(8, 6), torch.nn.Linear(6, 10), {}
        def forward(self, x):
            h = torch.zeros(len(x), 6, out=x.new_empty(len(x), 6)) + torch.zeros(len(x), 6, **self.said) + torch.linspace(0, 1, 6, **self.said) + torch.tensor(.1, **self.said) * torch.arange(6., **self.said)
            for row in x.flatten(1, -2).unbind(1): h = self.cell(row, h)
            return self.out(h)
    net = Begun()
    problem = Problem(net, "ce", load_dataset("digits-60"))
    theta, x = problem.layout.named(problem.theta0), problem.dataset.x[:5]
    out = problem.network.to(torch.float64)({k: b.double() for k, b in theta.items()}, x.double())
    net.double().said["dtype"] = torch.float64
    torch.testing.assert_close(out, net(x.double()), rtol=1e-14, atol=1e-14)
    assert Defaults in problem.network.met and torch.zeros(1).dtype == problem.network(theta, x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("f", [Open.apply, torch.relu, torch.nn.functional.hardtanh, torch.abs, torch.sign, torch.nn.functional.gelu])
def test_right_ones_are_not_accused(f, dtype):
    problem = Problem(between(f).to(dtype), "ce", load_dataset("digits-60"))
    for p in (problem, problem.frozen()): p.check_products(), p.check_products(linear=True)


def test_the_check_is_made_once_for_each_mode_and_is_not_counted():
    problem = Problem(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 10)), "ce", load_dataset("digits-60"))
    asked, wrong = [], type(problem)._wrong_products
    class Watched(type(problem)):
        def _wrong_products(self, linear): asked.append((linear, self.network.is_frozen)); return wrong(self, linear)
    problem.__class__ = Watched
    counted = sharpness(problem, problem.theta0, max_matvecs=5)
    for _ in range(3): problem.frozen().hvp(problem.theta0, problem.theta0); problem.hvp(problem.theta0, problem.theta0)
    assert asked == [(False, False), (False, True)] and counted.matvecs <= 5


def test_a_network_that_computes_in_single_precision_alone_is_held_to_that():
    class Single(torch.nn.Module):
        def __init__(self, f): super().__init__(); self.net = between(f)
        def forward(self, x): return self.net(x.float())
    def fits(f): return Problem(Single(f), "ce", load_dataset("digits-60"))
    fits(torch.tanh).check_products(), fits(torch.relu).check_products()
    with pytest.raises(TypeError, match="no differences.*Once"): fits(Once.apply).check_products()


@pytest.mark.parametrize("seed", [1, 2])
def test_deep_networks_whose_statistics_bend_them_are_not_refused(seed):
    "Three examples through 24 layers of BatchNorm: float64, and curved at a hundred-thousandth of a step."
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers = [m for i in range(24) for m in (torch.nn.Linear(12 if i else 64, 12), torch.nn.BatchNorm1d(12), torch.nn.ReLU())]
        net = torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(12, 10))
    problem = Problem(net, "ce", load_dataset("digits-60"))
    net = net.double()
    out = net(problem.dataset.x.double())
    F.cross_entropy(out, problem.dataset.y).backward()
    exact = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert (problem.grad_and_loss(problem.theta0)[0] - exact).norm() < 1e-2 * exact.norm()


def test_measuring_rounds_no_product_and_leaves_to_training_what_torch_was_told():
    seen = []
    class Noting(torch.nn.Module):
        def __init__(self): super().__init__(); self.net = between(torch.tanh)
        def forward(self, x):
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return self.net(x)
    def during(f):
        seen.clear()
        f()
        return {*seen}
    problem, before = Problem(Noting(), "ce", load_dataset("digits-20")), torch.get_float32_matmul_precision()
    theta, v = problem.theta0, draw(problem.p).float()
    try:
        torch.set_float32_matmul_precision("medium")
        assert during(lambda: problem.grad_and_loss(theta)) == {"bf16"}
        assert not problem.coupled and problem.kinks == ()          # looked for once, in whatever precision
        for f in (lambda: problem.hvp(theta, v), lambda: problem.example_grads(theta), lambda: problem.at(theta).ggn(v)): assert during(f) == {"ieee"}
        assert during(lambda: train(problem, Descent(GD(.1), FullBatch()), 2, progress=False)) == {"bf16"}
        assert during(lambda: train(problem, Descent(GD(.1), FullBatch()), 2, "train:every=1", progress=False)) == {"bf16", "ieee"}
        with untouched(torch.device("cpu")): assert during(lambda: problem.loss(theta)) == {"ieee"}      # a look at somebody's loop
        def failing(v): raise RuntimeError(torch.backends.mkldnn.matmul.fp32_precision)
        with pytest.raises(RuntimeError, match="ieee"): lanczos(failing, v)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16" and torch.get_float32_matmul_precision() == "medium"
    finally: torch.set_float32_matmul_precision(before)


# --- whoever calls, and whatever is called -----------------------------------------------------------------------------

def test_products_do_not_ask_for_grad_mode():
    problem = make()
    theta, v = problem.theta0, draw(problem.p)
    products = ("hvp", "ggn", "fisher", "quadratic")
    want = [getattr(problem.at(theta), name)(v) for name in products]
    with torch.no_grad():
        point = problem.at(theta)
        for _ in range(3):
            for name, w in zip(products, want):
                got = getattr(point, name)(v)
                assert torch.equal(got, w) and not got.requires_grad and not torch.is_grad_enabled()
        assert torch.equal(point.curvature_grad(v, v), problem.curvature_grad(theta, v, v))


@pytest.mark.parametrize("how", ["whole", "layer", "in place", "function", "loss"])
def test_what_is_compiled_has_all_derivatives_and_is_not_compiled_again(how):
    net, loss, made = between(torch.tanh).double(), "ce", []
    plain, compiled = Problem(net, "ce", load_dataset("digits-20")), deepcopy(net)
    backend = lambda graph, inputs: made.append(graph) or graph.forward
    fast = partial(torch.compile, backend=backend)
    if how == "whole": compiled = fast(compiled)
    elif how == "layer": compiled[1] = fast(compiled[1])
    elif how == "function": compiled[2].forward = fast(lambda x: x.tanh())
    elif how == "loss": loss = fast(lambda out, y: F.cross_entropy(out, y, reduction="none"))
    else: compiled.compile(backend=backend)
    problem, theta, v = Problem(compiled, loss, load_dataset("digits-20")), plain.theta0, draw(plain.p)
    assert torch.equal(problem.theta0, theta)
    for q in (lambda p: p.hvp(theta, v), lambda p: p.at(theta).ggn(v), lambda p: p.example_grads(theta), lambda p: p.curvature_grad(theta, v, v),
              lambda p: next(p.layer_io(theta)).sq_norms(), lambda p: p.frozen().hvp(theta, v)):
        torch.testing.assert_close(q(problem), q(plain), rtol=1e-12, atol=1e-14)
    assert not made


class Mixed(torch.nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16): return self.net(x).float()


class Again(torch.nn.Module):
    "Has a module, or a function of it, computed again while gradients flow back."
    def __init__(self, net, inner=None): super().__init__(); self.net, self.inner = net, inner
    def forward(self, x): return checkpoint(self.net if self.inner is None else lambda x: self.net(self.inner(x)), x, use_reentrant=False)


class Dropping(torch.nn.Module):
    def forward(self, x): return F.dropout(x, .5, self.training)


def everything(problem, theta, v):
    "A problem's loss and derivatives."
    return (problem.loss(theta), problem.grad_and_loss(theta)[0], problem.hvp(theta, v), problem.at(theta).ggn(v), problem.curvature_grad(theta, v, v),
            problem.example_grads(theta), next(problem.layer_io(theta)).sq_norms(), problem.frozen().hvp(theta, v))


@pytest.mark.filterwarnings("ignore:gradients of single examples are taken one by one")
@pytest.mark.parametrize("where", ["network", "objective", "around a checkpoint", "inside of one"])
def test_autocast_that_is_turned_on_inside_is_left_off(where):
    net, data = between(torch.tanh), load_dataset("digits-20")
    def outputs(model, batch):
        with torch.autocast("cpu", torch.bfloat16): return model(batch[0]).float()
    objective = outputs, lambda outputs, batch: F.cross_entropy(outputs, batch[1], reduction="none")
    module = {"network": Mixed(net), "objective": net, "around a checkpoint": Mixed(Again(net)), "inside of one": Again(Mixed(net))}[where]
    with pytest.warns(UserWarning, match="turns torch.autocast on.*computed in torch.float32"):
        problem = Problem(module, *(objective, TensorDataset(data.x, data.y)) if module is net else ("ce", data))
    plain = Problem(net, "ce", data)
    theta, v = plain.theta0, draw(plain.p).float()
    for got, want in zip(everything(problem, theta, v), everything(plain, theta, v)): torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for outer in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=outer == torch.bfloat16):
            assert problem.loss(theta).dtype == torch.float32 and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == outer
    assert (Mixed(net)(data.x) - net(data.x)).abs().max() > 1e-3      # it would have been seen


@pytest.mark.filterwarnings("ignore:gradients of single examples are taken one by one")
def test_functions_of_dropout_that_a_checkpoint_computes_again_are_left_out(monkeypatch):
    net, data = between(torch.tanh).double(), load_dataset("digits-20")
    problem, plain = Problem(Again(torch.nn.Sequential(net, Dropping())), "ce", data), Problem(net, "ce", data)
    theta, v = plain.theta0, draw(plain.p)
    for got, want in zip(everything(problem, theta, v), everything(plain, theta, v)): torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    some = Batch(torch.arange(20), noise=Stream(3))
    once = Problem(torch.nn.Sequential(net, Dropping()), "ce", data)
    assert torch.equal(problem.grad_and_loss(theta, some)[0], once.grad_and_loss(theta, some)[0]) and not torch.equal(problem.loss(theta, some), plain.loss(theta))
    problem, once = Problem(Again(net, lambda x: F.dropout(x, .5)), "ce", data), Problem(torch.nn.Sequential(torch.nn.Dropout(.5), net), "ce", data)
    for got, want in zip(everything(problem, theta, v), everything(plain, theta, v)): torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert torch.equal(problem.grad_and_loss(theta, some)[0], once.grad_and_loss(theta, some)[0]) and not torch.equal(problem.loss(theta, some), plain.loss(theta))
    monkeypatch.setattr(modes, "again", lambda under: None)         # a checkpoint that does not show what it computes again
    with pytest.raises(TypeError, match="inside of what torch.utils.checkpoint computes again.*have the module|is not the slope of the loss"):
        Problem(Again(net, lambda x: F.dropout(x, .5)), "ce", data)


class Physics(torch.nn.Module):
    "u and its Laplacian in the inputs, by torch.func in the forward pass."
    def __init__(self): super().__init__(); self.net = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    def forward(self, x):
        u = lambda z: self.net(z).squeeze(-1)
        return torch.stack([torch.func.vmap(lambda z: torch.func.hessian(u)(z).trace())(x), u(x)], 1)


def test_networks_that_differentiate_in_their_forward_pass():
    x, y = draw(12, 2), draw(12, 2, name="y")
    with drawing(Stream(1), torch.device("cpu")): net = Physics().double()
    problem = Problem(net, "mse", Dataset(x, y, x, y))
    theta, v = problem.theta0, draw(problem.p)
    (a, b), (c, d) = ((m.weight.detach(), m.bias.detach()) for m in (net.net[0], net.net[2]))
    t = (x @ a.T + b).tanh()
    laplacian = (-2 * t * (1 - t.square()) * a.square().sum(1)) @ c[0]             # tanh'' = −2 tanh (1 − tanh²)
    torch.testing.assert_close(problem.outputs(theta, x), torch.stack([laplacian, t @ c[0] + d], 1), rtol=1e-10, atol=1e-12)
    want = differences(problem, theta, v)
    assert (problem.hvp(theta, v) - want).norm() <= 1e-6 * want.norm() and problem.graph_bytes > 0
    torch.testing.assert_close(problem.example_grads(theta).mean(0), problem.grad_and_loss(theta)[0])


def system(tmp_path, groups="0::/job/step", files=(), address="unlimited"):
    "A file system that tells of 64 GB free, and of what else is given."
    for name, text in {"proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable: 67108864 kB\n", "proc/self/cgroup": groups + "\n",
                       "proc/self/status": "Name:\tpython\nVmSize:\t 2097152 kB\nVmRSS:\t 1048576 kB\n",
                       "proc/self/limits": f"Limit  Soft Limit  Hard Limit  Units\nMax address space         {address}   unlimited  bytes\n", **dict(files)}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


G = 2**30
V2 = lambda place, most, now, cache=0: {f"sys/fs/cgroup/{place}memory.max": str(most), f"sys/fs/cgroup/{place}memory.current": str(now),
                                        f"sys/fs/cgroup/{place}memory.stat": f"anon 5\ninactive_file {cache}\n"}
V1 = lambda place, most, now: {f"sys/fs/cgroup/memory/{place}memory.limit_in_bytes": str(most), f"sys/fs/cgroup/memory/{place}memory.usage_in_bytes": str(now)}


@pytest.mark.parametrize("groups, files, address, slurm, free", [
    ("0::/", {}, "unlimited", {}, 64),                                                    # the machine alone
    ("0::/job/step", V2("job/step/", 8 * G, 3 * G), "unlimited", {}, 5),
    ("0::/job/step", V2("job/step/", 8 * G, 3 * G, 2 * G), "unlimited", {}, 7),           # of which 2 GB are pages that can go
    ("0::/job/step", V2("job/step/", "max", 3 * G) | V2("job/", 6 * G, 4 * G), "unlimited", {}, 2),     # the group above
    ("0::/elsewhere", V2("", 4 * G, 1 * G), "unlimited", {}, 3),                          # a container sees its own group as the top
    ("5:cpu:/x\n4:memory:/slurm/job_7\n0::/", V1("slurm/job_7/", 2**63 - 4096, G) | V1("slurm/", 9 * G, 5 * G), "unlimited", {}, 4),
    ("4:cpu,memory:/docker/a", V1("", 3 * G, G), "unlimited", {}, 2),
    ("0::/", {}, str(12 * G), {}, 10),                                                    # ulimit -v, of which 2 GB are mapped
    ("0::/", {}, "unlimited", {"SLURM_MEM_PER_NODE": "8192"}, 7), ("0::/", {}, "unlimited", {"SLURM_MEM_PER_NODE": "0"}, 64),
    ("0::/", {}, "unlimited", {"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "4"}, 7),
    ("0::/job/step", V2("job/step/", 2 * G, 3 * G), "unlimited", {}, 0)])
def test_memory_that_is_free_is_what_the_tightest_limit_leaves(tmp_path, monkeypatch, groups, files, address, slurm, free):
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"): monkeypatch.delenv(name, raising=False)
    for name, value in slurm.items(): monkeypatch.setenv(name, value)
    assert free_memory(torch.device("cpu"), system(tmp_path, groups, files, address)) == free * G


@pytest.mark.slow
def test_a_limit_of_this_process_is_seen():
    code = ("import resource, torch; from gradnb.ground.memory import free_memory, fields, Path\n"
            "used = 1024 * fields(Path('/'), 'proc/self/status')['VmSize']; resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))\n"
            "print(free_memory(torch.device('cpu')))")
    free = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 2**27 < free <= 2**28


def test_nothing_that_tells_means_that_nothing_is_known(tmp_path, monkeypatch):
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"): monkeypatch.delenv(name, raising=False)
    assert free_memory(torch.device("cpu"), tmp_path) == float("inf")


# --- an operator of somebody's ------------------------------------------------------------------------------------

@pytest.mark.parametrize("model, loss, dtype", [("fc-tanh:width=6,depth=1", "ce", torch.float64), ("fc-softplus:width=6,depth=1", "mse", torch.float32), ("fc-elu:width=6,depth=2", "ce", torch.float64), ("fc-relu:width=6,depth=2", "ce", torch.float64)])
def test_right_operators_pass_the_audit(model, loss, dtype):
    "Ours, and torch's own double backward of a loss written out here; with a chunk size, and at a θ far from the start."
    problem = make(model, loss, dtype, 25)
    for theta in (problem.theta0, 2 * problem.theta0):
        found = audit_operator(problem.hvp, problem, theta)
        assert found.holds and len(found.laws) == 6 and str(found).count("✓") == 6, str(found)
    problem = make(model, loss, dtype)
    chunk, = problem.chunks()
    whole = lambda theta: problem.piece(theta, *chunk)
    theirs = lambda theta, v: torch.autograd.functional.hvp(whole, theta, v)[1]
    assert audit_operator(theirs, torch.func.grad(whole), problem.theta0).holds
    assert audit_operator(lambda v: theirs(problem.theta0, v), problem, problem.theta0, stream=Stream(5)).holds


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault, broken", [
    ("Gauss-Newton", {"differences"}), ("other θ", {"differences", "depends on θ"}), ("drift", {"differences"}), ("skew", {"symmetric", "differences"}),
    ("random", {"deterministic", "linear", "symmetric", "differences"}), ("batch", {"deterministic", "linear", "symmetric", "differences"}),
    ("|v|", {"linear", "symmetric", "differences"}), ("twice", {"differences"}), ("writes", {"pure"}), ("half of it", {"differences"}), ("a little off", {"differences"})])
def test_wrong_operators_are_caught(fault, broken, seed):
    "Each fault breaks the laws that it must break, whatever the directions."
    problem, gen = make(loss="ce"), torch.Generator().manual_seed(seed)
    H, p, theta = problem.hvp, problem.p, problem.theta0
    S, other = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((p, p), (p,)))
    def writes(theta, v):
        out = H(theta, v)
        v /= v.norm()
        return out
    wrong = {"Gauss-Newton": lambda theta, v: problem.at(theta).ggn(v), "other θ": lambda theta, v: H(.3 * other, v), "drift": lambda theta, v: H(1.01 * theta, v),
             "skew": lambda theta, v: H(theta, v) + 1e-4 * S @ v, "random": lambda theta, v: H(theta, v) * (1 + .01 * torch.randn((), generator=gen)),
             "batch": lambda theta, v: H(theta, v, Batch(torch.randint(problem.n, (20,), generator=gen))), "|v|": lambda theta, v: H(theta, v) * v.norm(),
             "twice": lambda theta, v: 2 * H(theta, v), "writes": writes, "half of it": lambda theta, v: torch.cat([H(theta, v)[:p // 2], torch.zeros(p - p // 2).double()]),
             "a little off": lambda theta, v: H(theta, v) + 1e-6 * v}[fault]
    found = audit_operator(wrong, problem, theta, stream=Stream(seed))
    assert broken <= set(found.broken) and not found.holds and not found.open, str(found)
    assert fault in ("random", "batch", "|v|", "skew", "half of it") or set(found.broken) == broken, str(found)


def test_an_audit_says_what_its_differences_cannot_tell():
    "Beside a gradient that is noise, nothing is said of a product; one of single precision is allowed its rounding."
    problem, gen = make(), torch.Generator().manual_seed(0)
    noisy = lambda theta: problem.grad_and_loss(theta)[0] + torch.randn(problem.p, generator=gen, dtype=torch.float64)
    assert {"differences"} <= set(audit_operator(problem.hvp, noisy, problem.theta0).open)
    single = lambda theta, v: make(dtype=torch.float32).hvp(theta.float(), v.float())
    assert audit_operator(single, problem, problem.theta0).broken and audit_operator(single, problem, problem.theta0, tol=1e-4).holds
    assert audit_operator(lambda v: 0 * v, lambda theta: torch.ones_like(theta), problem.theta0).open == ("differences",)      # zero beside zero
    assert audit_operator(lambda v: 1e-9 * v, lambda theta: torch.ones_like(theta), problem.theta0).broken == ("differences",)
    for wrong in (lambda v: v[:3], lambda v: v * float("nan")):
        with pytest.raises(ValueError, match="shape|finite"): audit_operator(wrong, problem, problem.theta0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_of_differences_covers_them(dtype):
    "Slopes of cos, sinh and cubes are known; of 200 stated errors none is smaller than the true one, and most are of use."
    gen, small = torch.Generator().manual_seed(1), 0
    for i in range(200):
        theta, V = (torch.randn(30, *s, generator=gen, dtype=torch.float64).mul(10. ** (i % 5 - 2)).to(dtype) for s in ((), (3,)))
        f, slope = ((torch.cos, lambda t: -t.sin()), (torch.tanh, lambda t: 1 / t.cosh()**2), (lambda t: t**3, lambda t: 3 * t**2))[i % 3]
        D, error = slopes(f, theta, V)
        true = slope(theta.double())[:, None] * V.double()
        assert (D - true).norm() <= 3 * error
        small += error < .01 * true.norm()
    assert small > 180


@pytest.mark.parametrize("move, words", [(lambda net: net[2].to("meta"), r"on cpu '0\.weight', '0\.bias'; on meta '2\.weight', '2\.bias'; give those on meta their values"),
                                         (lambda net: setattr(net[0], "bias", None) or net[0].to("meta"), r"on meta '0\.weight'; on cpu '2\.weight', '2\.bias'")])
def test_a_model_that_is_partly_elsewhere_is_told_which_part(move, words):
    net, x = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)), torch.zeros(4, 2)
    move(net)
    with pytest.raises(TypeError, match=words): Problem(net, "mse", Dataset(x, x, x, x))
