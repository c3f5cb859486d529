"Eigenvalues and traces against dense eigenvalues, SciPy, a textbook Lanczos and closed forms."
from contextlib import contextmanager
from math import pi, sqrt
from threading import Barrier, Thread
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from gradnb.ground.estimate import Estimate
from gradnb.ground.parts import Parts, parted
from gradnb.linalg import Eigs, hutchinson, lanczos, lobpcg, power_iteration
from gradnb.linalg import scan
from gradnb.linalg.basis import Basis
from gradnb.linalg.vectors import orthonormalise
from gradnb.linalg.unseen import lanczos_bound
from gradnb.linalg.spectra import spectrum
from gradnb.ground.streams import Stream

F64 = torch.float64
SPECTRA = {
    "cluster": lambda n: torch.cat([1 + 2e-4 * torch.arange(5, dtype=F64), torch.linspace(.5, -.5, n, dtype=F64)])[:n],
    "copies": lambda n: torch.cat([torch.ones(3, dtype=F64), torch.linspace(.6, -.7, n, dtype=F64)])[:n],
    "negative": lambda n: -1 - torch.linspace(0, 1, n, dtype=F64).sqrt(),
    "decay": lambda n: 100 / torch.arange(1, n + 1, dtype=F64)**2,
    "identity": lambda n: torch.ones(n, dtype=F64),
    "zero": lambda n: torch.zeros(n, dtype=F64),
}


def randn(seed, *shape, dtype=F64): return torch.randn(*shape, dtype=F64, generator=Stream(seed).generator()).to(dtype)


def symmetric(lam, seed=0, dtype=F64):
    "A dense matrix with these eigenvalues, exactly symmetric, and its eigenvectors."
    U = torch.linalg.qr(randn(seed, len(lam), len(lam)))[0]
    A = ((U * lam) @ U.T).to(dtype)
    return (A + A.T) / 2, U


class Counter:
    "A @ v that counts the columns it multiplies."
    def __init__(self, A): self.A, self.n = A, 0
    def __call__(self, v):
        self.n += 1 if v.ndim == 1 else v.shape[1]
        return self.A @ v


def check(e, A, k, matvec, start, tol):
    "What every answer owes: shapes, true residuals, an eigenvalue in each interval, an honest count."
    assert isinstance(e, Eigs) and isinstance(e.matvecs, int) and isinstance(e.converged, bool)
    assert e.values.shape == e.residuals.shape == (k,) and e.values.dtype == e.residuals.dtype == F64
    assert e.vectors.shape == (len(A), k) and e.vectors.dtype == start.dtype
    assert (e.values.diff() <= 0).all() and e.matvecs == matvec.n
    B, V, eps = A.double(), e.vectors.double(), 100 * torch.finfo(start.dtype).eps
    true = torch.linalg.eigvalsh(B).flip(0)
    scale = true.abs().max()
    torch.testing.assert_close(V.T @ V, torch.eye(k, dtype=F64), atol=eps, rtol=0)
    torch.testing.assert_close((B @ V - V * e.values).norm(dim=0), e.residuals, atol=float(eps * scale), rtol=1e-3)
    assert ((e.values[:, None] - true).abs().min(1).values <= e.residuals + eps * scale).all()
    if e.converged:
        assert (e.errors <= tol * scale + eps * scale).all()
        assert ((true[:k] - e.values).abs() <= e.errors + eps * scale).all(), (e, true[:k])


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 30, 200])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", ["vector", "guarded", "lobpcg"])
def test_top_k_of_known_spectra(method, name, n, dtype):
    A, _ = symmetric(SPECTRA[name](n), seed=n, dtype=dtype)
    for k in range(1, min(n, 5) + 1):
        matvec, tol = Counter(A), 1e-3
        start = randn(k, n, 1 if method == "vector" else min(k + 2, n), dtype=dtype)
        e = lobpcg(matvec, start, k) if method == "lobpcg" else lanczos(matvec, start.squeeze(1), k)
        assert e.converged
        check(e, A, k, matvec, start, tol)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(-1000, 1000).map(lambda i: i / 100), min_size=1, max_size=40, unique=True), st.integers(1, 5), st.integers(0, 10**6))
def test_any_spectrum(lam, k, seed):
    A, _ = symmetric(torch.tensor(lam, dtype=F64), seed)
    k, matvec, start = min(k, len(lam)), Counter(A), randn(seed + 1, len(lam))
    check(lanczos(matvec, start, k, tol=1e-6), A, k, matvec, start, 1e-6)


@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-10, 0])
def test_tolerance_is_reached(tol):
    A, _ = symmetric(SPECTRA["decay"](100))
    matvec, start = Counter(A), randn(1, 100)
    e = lanczos(matvec, start, 3, tol=tol)
    assert e.converged
    check(e, A, 3, matvec, start, max(tol, 3e-15))


def textbook(A, q, m):
    "Lanczos as in the textbooks, with full reorthogonalisation in float64: Ritz values after m products."
    Q, alpha, beta = [q / q.norm()], [], []
    for _ in range(m):
        w = A @ Q[-1]
        alpha.append(w @ Q[-1])
        for _ in range(2): w = w - sum((w @ x) * x for x in Q)
        beta.append(w.norm())
        Q.append(w / w.norm())
    off = torch.stack(beta[:-1]) if m > 1 else torch.zeros(0, dtype=F64)
    return torch.linalg.eigvalsh(torch.stack(alpha).diag() + off.diag(1) + off.diag(-1)).flip(0)


@pytest.mark.parametrize("k", [1, 3])
def test_one_start_vector_is_textbook_lanczos(k):
    lam = torch.cat([torch.tensor([106.7, 101.4, 100.4, 100.2, 97], dtype=F64), 90 / torch.arange(1, 196, dtype=F64)])
    A, _ = symmetric(lam)
    q = randn(1, 200)
    for m in range(k, 21):
        e = lanczos(A.__matmul__, q, k, tol=0, max_matvecs=m, vectors=True)
        assert e.matvecs == m
        torch.testing.assert_close(e.values, textbook(A, q, m)[:k], rtol=1e-9, atol=0)


def test_restarts_change_the_price_and_not_the_answer():
    A, _ = symmetric(torch.linspace(-1, 1, 150, dtype=F64))
    q = randn(1, 150)
    small, large = (lanczos(A.__matmul__, q, 2, tol=1e-8, basis=b, max_matvecs=2000, check=False) for b in (8, 150))
    assert small.converged and large.converged and small.matvecs > large.matvecs
    torch.testing.assert_close(small.values, large.values, atol=1e-8, rtol=0)


@pytest.mark.parametrize("k", [1, 4])
def test_scipy_agrees(k):
    A, _ = symmetric(torch.linspace(0, 1, 120, dtype=F64)**4)
    op = LinearOperator(A.shape, matvec=lambda v: A.numpy() @ v, dtype=float)
    ref = torch.from_numpy(eigsh(op, k=k, which="LA", return_eigenvectors=False).copy()).sort(descending=True).values
    for solve, start in ((lanczos, randn(1, 120)), (lobpcg, randn(2, 120, k + 2))):
        e = solve(A.__matmul__, start, k, tol=1e-8)
        assert e.converged
        torch.testing.assert_close(e.values, ref, atol=1e-9, rtol=0)


def test_lobpcg_is_a_conjugate_gradient_method():
    A, _ = symmetric(torch.linspace(-1, 1, 200, dtype=F64))
    q, tight = randn(1, 200, 1), dict(k=1, tol=1e-6, max_iters=1000, check=False)
    full = lanczos(A.__matmul__, q, tol=1e-6, vectors=True, check=False)
    assert lobpcg(A.__matmul__, q, **tight).matvecs < 2 * full.matvecs       # steepest ascent needs some ten times more


# --- warm starts ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_exact_vectors_cost_one_product_each(k, dtype):
    A, U = symmetric(SPECTRA["decay"](200), dtype=dtype)
    V = U[:, :k].to(dtype)
    assert lanczos(A.__matmul__, V, k, check=False).matvecs == lobpcg(A.__matmul__, V, check=False).matvecs == k
    assert lanczos(A.__matmul__, torch.cat([V, randn(1, 200, 1, dtype=dtype)], 1), k, check=False).matvecs <= k + 8


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("solve", [lanczos, lobpcg])
@pytest.mark.parametrize("p", [50, 5000])
@pytest.mark.parametrize("top", [101.5, 110, 200])
def test_an_overtaken_eigenvector_is_left(top, p, solve, k):
    lam = torch.cat([torch.tensor([top, 100, 98, 97, 96]), 90 / torch.arange(1., p - 4)]).to(F64)     # diagonal
    old = torch.zeros(p, k, dtype=F64)
    old[range(1, k + 1), range(k)] = 1                       # exact eigenvectors, but a new top has come from below
    matvec = lambda v: lam * v if v.ndim == 1 else lam[:, None] * v
    alone, guarded = solve(matvec, old, k, check=False), solve(matvec, torch.cat([old, randn(3, p, 1)], 1), k)
    torch.testing.assert_close(alone.values, lam[1:k + 1])   # what nobody looks for is not seen
    assert alone.errors.isinf().all()
    checked = solve(matvec, old, k)
    assert (lam[:k] <= checked.values + checked.errors).all()
    assert guarded.converged
    torch.testing.assert_close(guarded.values, lam[:k], atol=1e-3 * top, rtol=0)


def test_an_eigenvector_alone_does_not_hide_the_others():
    A, U = symmetric(SPECTRA["copies"](60))
    e = lanczos(A.__matmul__, U[:, 0], 4)
    torch.testing.assert_close(e.values, torch.tensor([1, 1, 1, .6], dtype=F64), atol=1e-3, rtol=0)


@pytest.mark.parametrize("start", [torch.zeros(40), torch.zeros(40, 3), torch.ones(40, 3)], ids=["0", "000", "111"])
def test_deficient_starts_are_filled(start):
    start = start.to(F64)
    A, _ = symmetric(SPECTRA["decay"](40))
    top = torch.tensor([100.], dtype=F64)
    assert lanczos(A.__matmul__, start).converged
    torch.testing.assert_close(lanczos(A.__matmul__, start).values, top, atol=.1, rtol=0)
    if start.ndim == 2: torch.testing.assert_close(lobpcg(A.__matmul__, start, 1).values, top, atol=.1, rtol=0)
    if start.ndim == 1: torch.testing.assert_close(power_iteration(A.__matmul__, start).values, top, atol=.1, rtol=0)


# --- precision --------------------------------------------------------------------------------------------------

@contextmanager
def matmul_precision(name):
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try: yield
    finally: torch.set_float32_matmul_precision(old)


def test_float32_with_many_parameters():
    p = 300_000
    lam = torch.cat([torch.tensor([106.7, 101.4, 100.4, 100.2, 97.0]), 90 / torch.arange(1., p - 4)**.8])
    matvec, g = lambda v: lam * v if v.ndim == 1 else lam[:, None] * v, lam * randn(1, p, dtype=torch.float32)
    e = lanczos(matvec, g, 2, tol=1e-4)
    assert e.converged
    torch.testing.assert_close(e.values, lam[:2].double(), rtol=1e-6, atol=0)
    with matmul_precision("medium"): same = lanczos(matvec, g, 2, tol=1e-4)
    assert torch.equal(same.values, e.values) and torch.equal(same.vectors, e.vectors)


def test_huge_and_tiny_scales():
    for scale in (1e-30, 1e30):
        A, _ = symmetric(SPECTRA["decay"](50), dtype=torch.float32)
        e = lanczos((A * scale).__matmul__, randn(1, 50, dtype=torch.float32) * scale, 2)
        assert e.converged
        torch.testing.assert_close(e.values / scale, torch.tensor([100., 25], dtype=F64), atol=.1, rtol=0)
    A, _ = symmetric(SPECTRA["decay"](50))
    e = lanczos(lambda v: A @ v * 1e160, randn(1, 50), 2)         # squares that float64 does not hold
    torch.testing.assert_close(e.values / 1e160, torch.tensor([100., 25], dtype=F64), atol=.1, rtol=0)


@pytest.mark.parametrize("k", [1, 30])
def test_a_matrix_of_zeros_has_eigenvalues(k):
    e = lanczos(torch.zeros_like, randn(1, 100), k)
    assert e.converged and not e.values.any() and not e.errors.any()


# --- manners ----------------------------------------------------------------------------------------------------

def test_nothing_is_disturbed_and_everything_repeats():
    A, _ = symmetric(SPECTRA["copies"](60))
    q = randn(1, 60)
    kept, state = q.clone(), torch.get_rng_state()
    runs = [lanczos(A.__matmul__, q, 4) for _ in range(2)]
    runs += [lobpcg(A.__matmul__, torch.zeros(60, 4, dtype=F64), 4) for _ in range(2)]
    trace = [hutchinson(A.__matmul__, 60, dtype=F64) for _ in range(2)]
    assert torch.equal(runs[0].vectors, runs[1].vectors) and torch.equal(runs[2].vectors, runs[3].vectors)
    assert trace[0] == trace[1] and trace[0] != hutchinson(A.__matmul__, 60, stream=Stream(1), dtype=F64)
    assert torch.equal(q, kept) and torch.equal(state, torch.get_rng_state())


def test_a_matvec_may_use_autograd():
    A, _ = symmetric(SPECTRA["decay"](20))
    theta = randn(1, 20).requires_grad_()

    def hvp(v):
        (grad,) = torch.autograd.grad(theta @ A @ theta / 2, theta, create_graph=True)
        return torch.autograd.grad(grad @ v, theta, create_graph=True)[0]
    e = lanczos(hvp, theta)
    assert not e.vectors.requires_grad
    torch.testing.assert_close(e.values.item(), 100., atol=.1, rtol=0)


def test_a_short_budget_is_admitted():
    A, _ = symmetric(torch.linspace(-1, 1, 200, dtype=F64))
    for n in (1, 5, 30):
        matvec, start = Counter(A), randn(1, 200)
        e = lanczos(matvec, start, max_matvecs=n)
        assert (e.matvecs, e.converged) == (n, False) and "NOT converged" in str(e)
        check(e, A, 1, matvec, start, 1e-3)
    assert not lobpcg(A.__matmul__, randn(1, 200, 2), max_iters=2).converged
    assert not power_iteration(A.__matmul__, randn(1, 200), max_matvecs=3).converged


def test_a_noisy_matvec_ends_unconverged():
    A, _ = symmetric(SPECTRA["decay"](300))
    draws = Stream(5).generator()
    noisy = lambda v: A @ v + torch.randn(v.shape, generator=draws, dtype=F64)
    with pytest.warns(UserWarning, match="not symmetric"): e = lanczos(noisy, randn(1, 300), tol=1e-6, max_matvecs=60)
    assert not e.converged and e.matvecs < 30


@pytest.mark.parametrize("memory", [None, 16])
@pytest.mark.parametrize("kind", ["quantised", "white", "bfloat16"])
@pytest.mark.parametrize("name", ["cluster", "decay", "negative"])
def test_a_search_that_rounding_has_stopped_stops(name, kind, memory):
    A, _ = symmetric(SPECTRA[name](400))
    def coarse(v):
        unit = v.abs().max() / 200
        if kind == "quantised": return A @ (unit * (v / unit).round())
        if kind == "bfloat16": return (A.bfloat16() @ v.bfloat16()).double()
        noise = torch.randn(400, dtype=F64, generator=torch.Generator().manual_seed(hash(float(v @ torch.arange(400.).double())) % 2**60))
        return A @ v + .004 * (A @ v).norm() * noise / 20
    with pytest.warns(UserWarning, match="not symmetric to within tol = 1e-05"):
        e = lanczos(coarse, randn(2, 400), tol=1e-5, memory=memory)
    assert e.matvecs < 150 and not e.converged and e.values + e.errors >= torch.linalg.eigvalsh(A)[-1]


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_a_sketch_of_quite_another_matrix_is_dropped(k, dtype):
    lam = torch.cat([20 / torch.arange(2., 12, dtype=F64), .3 * torch.linspace(1, -1, 290, dtype=F64)])
    (old, _), (new, _) = symmetric(lam, 1, dtype), symmetric(lam / 5, 2, dtype)
    options = dict(k=k, memory=12 + 4 * k, keep=k + 8)
    sketch = lanczos(old.__matmul__, randn(3, 300, dtype=dtype), **options).sketch
    start = sketch.vectors[:, :k].to(dtype, copy=True)
    start[:, -1] += .3 * sketch.vectors[:, k:].to(dtype).sum(1) + .02 * randn(4, 300, dtype=dtype)
    A = Counter(new)
    e = lanczos(A, start, sketch=sketch, **options)
    check(e, new, k, A, start, 1e-3)
    assert e.converged and e.matvecs < 110 + 20 * k


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_search_that_is_slow_goes_on(dtype):
    A, _ = symmetric(torch.linspace(0, 1, 1000, dtype=F64)**.5, dtype=dtype)
    assert lanczos(Counter(A), randn(2, 1000, dtype=dtype), tol=1e-5).matvecs == 220


@pytest.mark.parametrize("start", [randn(1, 60), torch.linalg.qr(randn(1, 60, 60))[0]], ids=["vector", "whole"])
def test_rough_products_have_their_rounding_in_the_error(start):
    A, _ = symmetric(SPECTRA["decay"](60))
    coarse = lambda v: (A.bfloat16() @ v.bfloat16()).double()
    with pytest.warns(UserWarning, match="not symmetric"):
        e = lanczos(coarse, start, k=3, tol=1e-6)
    assert e.matvecs <= 60 and not e.converged and ((torch.linalg.eigvalsh(A).flip(0)[:3] - e.values).abs() <= e.errors).all()
    assert (e.errors < 1).all()


def test_non_finite_products_are_named():
    A, _ = symmetric(SPECTRA["decay"](30))
    matvec = Counter(A)

    def breaks(v):
        out = matvec(v)
        if matvec.n >= 7: out[3] = float("nan")
        return out
    with pytest.raises(RuntimeError, match="non-finite value at product 7;"): lanczos(breaks, randn(1, 30), tol=1e-9, vectors=True)
    matvec.n = 0
    with pytest.raises(RuntimeError, match="value at product 7;"): power_iteration(breaks, randn(1, 30), tol=1e-9)
    block = lambda V: torch.cat([V[:, :2], V[:, 2:] * float("inf")], 1)
    with pytest.raises(RuntimeError, match="non-finite value at product 3;"): lobpcg(block, randn(1, 30, 4))


A10 = torch.eye(10)
ONE, BLOCK = torch.ones(10), torch.eye(10)[:, :3]
REFUSED = {
    "k too large": (lambda: lanczos(A10.__matmul__, ONE, 11), ValueError, "choose 1 ≤ k ≤ 10"),
    "k zero": (lambda: lanczos(A10.__matmul__, ONE, 0), ValueError, "k = 0"),
    "integers": (lambda: lanczos(A10.__matmul__, ONE.long()), TypeError, "int64"),
    "bfloat16": (lambda: lanczos(A10.__matmul__, ONE.bfloat16()), TypeError, "float32 or float64"),
    "three axes": (lambda: lanczos(A10.__matmul__, ONE.reshape(1, 2, 5)), ValueError, r"\(1, 2, 5\)"),
    "scalar": (lambda: lanczos(A10.__matmul__, torch.tensor(1.)), ValueError, r"shape \(\)"),
    "no columns": (lambda: lanczos(A10.__matmul__, ONE[:, None][:, :0]), ValueError, r"\(10, 0\)"),
    "wide": (lambda: lanczos(A10.__matmul__, torch.ones(2, 10)), ValueError, r"\(2, 10\)"),
    "NaN start": (lambda: lanczos(A10.__matmul__, ONE * float("nan")), ValueError, "NaN"),
    "small basis": (lambda: lanczos(A10.__matmul__, ONE, 3, basis=4), ValueError, "give at least 6"),
    "small budget": (lambda: lanczos(A10.__matmul__, ONE, 3, max_matvecs=2), ValueError, "max_matvecs = 2"),
    "matvec's shape": (lambda: lanczos(lambda v: v[:5], ONE), ValueError, r"\(10,\) into \(5,\)"),
    "narrow block": (lambda: lobpcg(A10.__matmul__, BLOCK, 4), ValueError, "3 columns for k = 4"),
    "power of a block": (lambda: power_iteration(A10.__matmul__, BLOCK), ValueError, r"\(10, 3\)"),
    "no budget": (lambda: power_iteration(A10.__matmul__, ONE, max_matvecs=0), ValueError, "max_matvecs = 0"),
    "one probe": (lambda: hutchinson(A10.__matmul__, 10, 1), ValueError, "at least 2 samples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_misuse_is_refused(case):
    call, error, match = REFUSED[case]
    with pytest.raises(error, match=match): call()


# --- power iteration and traces ---------------------------------------------------------------------------------

def test_power_iteration_finds_the_largest_magnitude():
    A, _ = symmetric(torch.tensor([-5., 4, 1, 0, -2], dtype=F64))
    matvec, start = Counter(A), randn(1, 5)
    e = power_iteration(matvec, start, tol=1e-8)
    assert e.converged and e.matvecs == matvec.n
    torch.testing.assert_close(e.values.item(), -5., rtol=1e-12, atol=0)
    assert not power_iteration(torch.diag(torch.tensor([3., -3])).__matmul__, torch.ones(2), max_matvecs=50).converged
    assert power_iteration(torch.zeros(4, 4).__matmul__, torch.ones(4)).values.item() == 0


def test_hutchinson_covers_at_its_nominal_rate():
    A, _ = symmetric(torch.linspace(-1, 3, 60, dtype=F64))
    A = A.double()
    held = sum(A.trace().item() in hutchinson(A.__matmul__, 60, 64, Stream(0) / i, dtype=F64) for i in range(200)) / 200
    rate = .9456                                     # Student with 63 degrees of freedom at the Gaussian 1.96
    assert abs(held - rate) < 3.3 * sqrt(rate * (1 - rate) / 200)


@pytest.mark.parametrize("name", ["hutchinson", "spectrum", "density"])
def test_intervals_hold_where_one_eigenvalue_is_all(name):
    "Forms like χ² with one degree of freedom: an interval from the spread of 8 of them holds in 85 %."
    u = randn(5, 20); u = u / u.norm()
    H = lambda v: u.outer(u) @ v
    def stated(s):
        if name == "hutchinson": return hutchinson(H, 20, 8, s, F64)
        if name == "spectrum": return spectrum(H, 20, 8, 3, s, F64).trace(torch.square)
        d = spectrum(H, 20, 8, 3, s, F64).density([1.], .01)
        return Estimate(*(v.item() * .01 * sqrt(2 * pi) * 20 for v in (d.value, d.high - d.value, d.low, d.high)))
    held = sum(1. in stated(Stream(i) / name) for i in range(300))
    assert .93 * 300 <= held < 300, held


@pytest.mark.parametrize("statistic, unit", [(lambda H: hutchinson(H, 20, 8, dtype=F64), 2.**600),
                                             (lambda H: spectrum(H, 20, 4, 5, dtype=F64).trace(), 2.**400)])
def test_errors_of_traces_scale(statistic, unit):
    A, _ = symmetric(torch.linspace(-1, 3, 20, dtype=F64))
    one, far = statistic(A.__matmul__), statistic((A * unit).__matmul__)
    torch.testing.assert_close(tuple(far), tuple(v * unit for v in one), rtol=1e-9, atol=0)


def test_hutchinson_is_exact_on_diagonals_and_blind_to_blocks():
    lam = torch.linspace(-1, 3, 33)
    matvec = lambda Z: lam[:, None] * Z
    e = hutchinson(matvec, 33, 9)
    assert e.stderr < 1e-6 and abs(e.value - lam.sum().item()) < 1e-5
    A, _ = symmetric(torch.linspace(-1, 3, 33, dtype=F64))
    one, five, all_ = (hutchinson(A.__matmul__, 33, 9, dtype=F64, block=b) for b in (1, 5, 32))
    torch.testing.assert_close(one, five)
    torch.testing.assert_close(one, all_)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees():
    A, _ = symmetric(SPECTRA["copies"](100), dtype=torch.float32)
    q, G = randn(1, 100, 6, dtype=torch.float32), A.cuda()
    for solve, start in ((lanczos, q[:, 0]), (lanczos, q), (lobpcg, q)):
        cpu, gpu = solve(A.__matmul__, start, 4), solve(G.__matmul__, start.cuda(), 4)
        assert gpu.vectors.is_cuda and gpu.converged
        torch.testing.assert_close(cpu.values, gpu.values, atol=2e-3, rtol=0)
    cpu, gpu = hutchinson(A.__matmul__, 100), hutchinson(G.__matmul__, 100, device="cuda")
    torch.testing.assert_close(tuple(cpu), tuple(gpu), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("spectrum", ["cluster", "copies", "decay"])
def test_a_basis_stays_orthonormal_and_knows_its_images(spectrum, dtype):
    "However often its directions outside are turned, by whatever angle."
    A = symmetric(SPECTRA[spectrum](90), dtype=dtype)[0]
    B, eps = Basis(A.__matmul__, randn(7, 1, 90, dtype=dtype), 90), torch.finfo(dtype).eps
    B.add(randn(7, 3, 90, dtype=dtype))
    for i in range(16):
        if i in (5, 11): B.add(randn(8 + i, 1, 90, dtype=dtype))
        if i == 8: B.rotate(B.ritz()[1][:5])
        a = torch.eye(len(B.R), dtype=F64)[0] + 10.**-i * randn(9 + i, len(B.R))
        towards = a / a.norm() @ torch.stack(B.R).double()
        B._turn(a)
        assert (B.R[0] - towards).abs().max() < 10 * eps
        if i % 2: B.grow(randn(9 + i, B.m))
        rows = torch.stack([*B.Q, *B.R]).double()
        assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 100 * eps
        images = torch.stack(B.Q).double() @ A.double() - torch.cat([B.M, B.F], 1) @ rows
        assert images.abs().max() < 100 * eps * B.T.abs().max()


def test_rows_that_nothing_makes_orthonormal_are_given_up():
    "Rows outside the rest that are not orthonormal themselves, as after a fault, must not be gone round for ever."
    Q = randn(0, 3, 9) / 3
    assert orthonormalise(Q, randn(1, 6, 9)) <= 6


@pytest.mark.parametrize("blind, j, k", [(1, 30, 10), (4, 40, 10), (3, 30, 3), (6, 60, 20)])
def test_pairs_that_a_large_start_was_blind_to_are_found_for_a_few_products(blind, j, k):
    d = torch.linspace(1, 0, 400, dtype=torch.float64)**4
    eigs = lanczos(torch.diag(d).__matmul__, torch.eye(400, dtype=torch.float64)[:, blind:blind + j], k, tol=1e-2)
    assert eigs.converged and eigs.matvecs < 2 * j + 20
    assert ((d[:k] >= eigs.values - 1e-12) & (d[:k] <= eigs.values + eigs.errors)).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_bound_at_once_holds_after_any_number_of_products(seed):
    "Within its budget, on flat, spiked, negative and multiple spectra, in both precisions; past the size of the matrix, where rows without a basis come again."
    gen = torch.Generator().manual_seed(seed)
    Q, spikes = torch.linalg.qr(torch.randn(120, 120, generator=gen, dtype=torch.float64)).Q, torch.tensor([3., 2.9])
    for values in (torch.linspace(-1, 1, 120), torch.cat([spikes, .1 * torch.randn(118, generator=gen)]), -torch.rand(120, generator=gen), torch.cat([spikes[:1]] * 3 + [torch.zeros(117)])):
        values = values.double().sort(descending=True).values
        for dtype, slack in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
            A = ((Q * values) @ Q.T).to(dtype)
            for budget, tol in ((2, 1e-3), (7, 1e-3), (25, 1e-3), (60, 1e-3), (300, 0.)):
                found = lanczos_bound(A.__matmul__, A[0], tol, budget, Stream(seed))
                assert found.matvecs <= budget and found.values <= values[0] + slack and values[0] <= found.values + found.errors + slack
            assert found.errors < 1e-4


def test_a_bound_at_once_knows_of_the_top_of_a_spectrum():
    A, U = symmetric(torch.cat([torch.tensor([9., 7.], dtype=F64), torch.linspace(1, -1, 98, dtype=F64)]))
    found = lanczos_bound(A.__matmul__, A[0], 1e-3, 40)
    assert found.converged and found.matvecs < 40 and len(found.sketch.values) == 5
    assert ((found.sketch.vectors[:, :2].double() * U[:, :2]).sum(0).abs() > .99).all() and (found.sketch.values[:2] - torch.tensor([9., 7.])).abs().max() < .01


def on_shards(sizes, search):
    "What each of so many threads gets, each with a part of every vector; `search` takes what makes vectors whole, and the part."
    ends, pieces, found, wait = [0, *torch.tensor(sizes).cumsum(0).tolist()], {}, {}, Barrier(len(sizes), timeout=60)
    def gathered(i, t):
        pieces[i] = t.clone()
        wait.wait()
        all = [pieces[j] for j in range(len(sizes))]
        wait.wait()
        return all
    def part(i):
        mine = slice(ends[i], ends[i + 1])
        whole = Parts(ends[-1], lambda t: sum(gathered(i, t)), lambda stream: torch.randn(ends[-1], generator=stream.generator(), dtype=F64)[mine])
        try:
            with parted(whole): found[i] = search(lambda v: torch.cat(gathered(i, v)), mine)
        except BaseException:
            wait.abort()
            raise
    threads = [Thread(target=part, args=(i,)) for i in range(len(sizes))]
    for t in threads: t.start()
    for t in threads: t.join()
    return [found[i] for i in range(len(sizes))]


def test_what_a_scan_finds_on_shards_is_what_it_finds_alone(monkeypatch):
    "A start that is blind to the largest eigenvalue, so that the rows of a scan are made once more; and a search that is warm from its sketch."
    again, twice = scan._Bent.again, []
    monkeypatch.setattr(scan._Bent, "again", lambda self, *args: twice.append(1) or again(self, *args))
    A, U = symmetric(torch.cat([torch.tensor([9.5, 9, 7, 5, 3, 2.5]), torch.linspace(0, 1, 294)]).double())
    start, moved = U[:, 1] + .01 * U[:, 7:].mean(1), A + .01 * (U[:, 5:6] @ U[:, 7:8].T + U[:, 7:8] @ U[:, 5:6].T)
    def search(whole, mine):
        cold = lanczos(lambda v: (A @ whole(v))[mine], start[mine], memory=14., keep=4)
        return cold, lanczos(lambda v: (moved @ whole(v))[mine], cold.vectors, memory=14., keep=4, sketch=cold.sketch, stream=Stream(1))
    known = lambda sketches: (V := torch.cat([s.vectors for s in sketches]).double()) * sketches[0].values @ V.T
    for alone, *ranks in zip(search(lambda v: v, slice(None)), *on_shards([100, 151, 49], search)):
        for r in ranks: assert r.converged and r.matvecs == alone.matvecs and torch.allclose(r.values, alone.values, rtol=1e-12) and torch.allclose(r.errors, alone.errors, rtol=1e-9)
        assert abs(alone.values[0] - 9.5) <= alone.errors[0] <= .01
        assert torch.allclose(torch.cat([r.vectors for r in ranks]), alone.vectors, atol=1e-10)
        assert torch.allclose(known([r.sketch for r in ranks]), known([alone.sketch]), atol=1e-4)
    assert len(twice) == 4
