"""How often what is stated holds, on inputs that nobody tuned to.

A claim is a line of CLAIMS: how an input is drawn, what we say of it, what is true, and how often it should hold.
`python tests/test_coverage.py 200 eigenvalues` counts the claims whose name holds that word, in 200 draws, prints them and
keeps them in tests/coverage.json, which is what the documentation shows."""
import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Callable
from math import atan, pi, sqrt, tan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

import gradnb
from gradnb import Quadratic, Stream, sharpness
from gradnb.ground.estimate import Estimate
from gradnb.linalg import Eigs, hutchinson, lanczos, lobpcg, power_iteration
from gradnb.linalg.unseen import lanczos_bound
from gradnb.linalg.spectra import spectrum, xtrace
from gradnb.linalg.trace import frobenius
from gradnb.measure.noise.batchsize import cabs, critical_batch, inner_product_test, norm_test, orthogonality_test
from gradnb.measure.noise.comparing import bias_check
from gradnb.measure.noise.coordinates import coordinate_normalized_variance, coordinate_variance, gsnr, stopping_evidence, tic_diagonal, tic_trace
from gradnb.measure.noise.spread import grad_norm_sq, grad_variance, noise_scale, noise_scale_of_pairs, normalized_variance, signal_to_noise
from gradnb.measure.precedence import precedence
from gradnb.measure.tail.estimators import tail_index
from gradnb.measure.tail.magnitudes import Magnitudes
from gradnb.measure.tail.methods import Histograms, hill_edge
from gradnb.measure.tail.stable import stable_sample
from gradnb.measure.tail.verdict import profile_change
from gradnb.measure.probes.subspace import widest_gap
from gradnb.measure.thresholds.directions import ratio_of_means
from gradnb.measure.trajectories import Projection, first_crossing, projected_distance
from gradnb.runs.sweeps.comparison import geometric_mean, spread_times
from gradnb.runs.sweeps.limits import mean_between
from gradnb.runs.sweeps.pairs import pair
from gradnb.show.claims import batch_means

F64 = torch.float64


class Claim(NamedTuple):
    name: str                                # room: quantity, inputs
    draw: Callable[[Stream], Any]            # an input
    state: Callable[[Any, Stream], Any]      # what we say of it: an Estimate, Eigs, or a pair (low, high) of numbers or tensors
    truth: Callable[[Any], Any]              # a number or a tensor
    level: float                             # how often all of it should hold


def holds(stated, truth) -> bool:
    "Whether all of it does, but for rounding."
    if isinstance(stated, Eigs):
        stated = stated.values - stated.errors, stated.values + stated.errors      # at least ten roundings of the whole matrix
    low, high = (stated.low, stated.high) if isinstance(stated, Estimate) else stated
    low, high, truth = (torch.as_tensor(t, dtype=F64) for t in (low, high, truth))
    return bool(((low <= truth) & (truth <= high)).all())


def coverage(claim: Claim, draws: int) -> tuple[int, float]:
    "In how many draws it held, and its mean cost in products where it tells."
    held = paid = 0
    for i in range(draws):
        stream = Stream(i) / "coverage" / claim.name
        given = claim.draw(stream / "input")
        stated = claim.state(given, stream / "statement")
        held, paid = held + holds(stated, claim.truth(given)), paid + getattr(stated, "matvecs", 0) / draws
    return held, paid


def enough(claim: Claim, held: int, draws: int) -> bool:
    "Not less often than chance allows at the level."
    return held >= claim.level * draws - 3 * sqrt(draws * claim.level * (1 - claim.level))


# --- eigenvalues ------------------------------------------------------------------------------------------------

class Search(NamedTuple):
    "A diagonal matrix and how it is searched; nothing but a start tells it from a rotated one."
    values: Tensor    # (p,) descending
    start: Tensor     # (p,)
    k: int
    tol: float

def uniform(stream, *shape, low=0., high=1.): return low + (high - low) * torch.rand(*shape, generator=stream.generator(), dtype=F64)
def normal(stream, *shape): return torch.randn(*shape, generator=stream.generator(), dtype=F64)

def clustered(p, s):
    "Up to five eigenvalues with gaps of 10⁻⁶ to 10⁻¹ of the first, above a bulk."
    gaps = 10 ** uniform(s / "gaps", 4, low=-6, high=-1)
    return torch.cat([1 - torch.cat([torch.zeros(1), gaps.cumsum(0)]), uniform(s / "bulk", p - 5, low=-.1, high=.55)]).double()

SPECTRA = {
    "clustered": clustered,
    "indefinite": lambda p, s: torch.cat([uniform(s / "top", 3, low=.6), uniform(s / "bulk", p - 3, low=-3, high=.5)]),
    "near zero": lambda p, s: 1e-6 * normal(s, p),
    "multiple": lambda p, s: torch.cat([torch.ones(4), torch.full((3,), .9), uniform(s, p - 7, high=.8)]).double(),
    "bulk": lambda p, s: torch.linalg.eigvalsh((M := normal(s, 90, 90)) + M.T),
    "edge of stability": lambda p, s: torch.cat([100 + 7 * uniform(s, 5), 90 / torch.arange(1., p - 4)**.8]).double(),
    "heavy": lambda p, s: normal(s, p) / normal(s / 1, p).abs().clamp_min(1e-3),
    "negative": lambda p, s: -uniform(s, p).square(),
}

def search(kind: str, largest=300):
    def draw(stream):
        pick = lambda name, low, high: uniform(stream / name, 1, low=low, high=high).item()
        p = int(20 * (largest / 20) ** pick("p", 0, 1))
        values = SPECTRA[kind](p, stream).sort(descending=True).values
        start = normal(stream / "start", len(values)) * values.abs()
        if pick("adversary", 0, 1) < .5: start[:pick_int(stream)] = 0                   # no share of the top
        if pick("dtype", 0, 1) < .5: start = start.float()
        return Search(values.to(start.dtype), start, int(pick("k", 1, 10.999)), 10 ** pick("tol", -8, -1))
    return draw

def pick_int(stream): return int(uniform(stream / "cut", 1, low=1, high=6))
def product(values): return lambda V: values * V if V.ndim == 1 else values[:, None] * V
def top(s): return s.values.double()[:s.k]

def cold(s, stream, **held): return lanczos(product(s.values), s.start, s.k, s.tol, stream=stream, **held)

def warm(s, stream, **held):
    "From what was true when the eigenvalues were others, and the top somewhere below."
    before = s.values * (1 + .1 * normal(stream / "before", len(s.values))).to(s.values)
    before[:2] *= uniform(stream / "below", 1).item()
    old = lanczos(product(before), s.start, s.k, 1e-3, stream=stream / "old", keep=s.k + 8, **held)
    return lanczos(product(s.values), old.sketch.vectors[:, :s.k].to(s.start), s.k, s.tol, sketch=old.sketch, keep=s.k + 8, stream=stream, **held)

def hill(s):
    "A quadratic, with a gradient that holds nothing of the top."
    H, theta = Quadratic(s.values.diag()), torch.ones_like(s.start)
    theta[:1] = 0
    return H, theta

def sharp(s, stream, **held): return sharpness(*hill(s), s.k, s.tol, stream=stream, **held)

def in_few(s, stream):
    "Within a memory between the least, what `sharpness` takes of a large θ, and more, in one of the three ways."
    least, way = ((2 * s.k + 6, cold), (4 * s.k + 5, warm), (3 * s.k + 5, sharp))[int(uniform(stream / "way", 1, high=3))]
    return way(s, stream, memory=uniform(stream / "memory", 1, low=least, high=2 * least).item())

def drawn_block(s, stream): return lobpcg(product(s.values), normal(stream / "block", len(s.values), s.k + 2).to(s.start), s.k, s.tol, stream=stream)

def magnitude(s, stream):
    e = power_iteration(product(s.values), s.start, max(s.tol, 1e-4), stream=stream)
    return e.values.abs(), e.values.abs() + e.errors

def bound_alone(s, stream):
    "After a number of products that is drawn too."
    return lanczos_bound(product(s.values), s.start, s.tol, int(2 * 60 ** uniform(stream / "budget", 1).item()), stream)

CLAIMS = [Claim(f"linalg: eigenvalues, {how}, {kind}", search(kind), state, top, .995)
          for kind in SPECTRA for how, state in (("cold", cold), ("warm", warm), ("sharpness", sharp), ("in few", in_few))]
CLAIMS += [Claim(f"linalg: eigenvalues, lobpcg, {kind}", search(kind, 100), drawn_block, top, .995) for kind in ("clustered", "multiple", "indefinite")]
CLAIMS += [Claim(f"linalg: largest magnitude, {kind}", search(kind, 100), magnitude, lambda s: s.values.double().abs().max(), .995)
           for kind in ("clustered", "indefinite")]
CLAIMS += [Claim(f"linalg: bound alone, {kind}", search(kind), bound_alone, lambda s: s.values.double()[:1], .995) for kind in SPECTRA]


# --- traces and densities ---------------------------------------------------------------------------------------

I = torch.arange(1., 301, dtype=F64)
ranked = lambda r, floor: torch.cat([torch.linspace(2, 1, r, dtype=F64), torch.full((300 - r,), floor, dtype=F64)])
TRACES = {"1/i": (1 / I, 40), "1/i²": (1 / I**2, 40), "rank 25 and a floor": (ranked(25, 1e-3), 40), "rank 30": (ranked(30, 0.), 60),
          "0.7ⁱ": (.7**I, 24), "semicircle": (torch.cos(torch.pi * (I - .5) / 300), 40), "signs": ((-1)**I / I, 16)}

def rotated(values):
    "With random eigenvectors."
    def draw(stream):
        U, _ = torch.linalg.qr(normal(stream, len(values), len(values)))
        return (U * values) @ U.T
    return draw

def blurred(A, places, width):
    return torch.exp(-.5 * ((places[:, None] - torch.linalg.eigvalsh(A)) / width)**2).mean(1) / (width * sqrt(2 * torch.pi))

for name, (values, products) in TRACES.items():
    CLAIMS += [
        Claim(f"linalg: trace, xtrace, {name}, {products} products", rotated(values),
              lambda A, s, n=products: xtrace(A.__matmul__, len(A), n, s, F64), torch.trace, .93),
        Claim(f"linalg: trace, hutchinson, {name}", rotated(values), lambda A, s: hutchinson(A.__matmul__, len(A), 32, s, F64), torch.trace, .93),
        Claim(f"linalg: ‖A‖², spectrum, {name}", rotated(values),
              lambda A, s: spectrum(A.__matmul__, len(A), 8, 30, s, F64).trace(torch.square), lambda A: A.square().sum(), .93),
        Claim(f"linalg: ‖A‖_F, frobenius, {name}", rotated(values), lambda A, s: frobenius(A.__matmul__, len(A), 32, s, F64), torch.linalg.matrix_norm, .93),
        Claim(f"linalg: density at a place, {name}", rotated(values),
              lambda A, s: (d := spectrum(A.__matmul__, len(A), 8, 40, s, F64).density([.3], .1)) and (d.low, d.high),
              lambda A: blurred(A, torch.tensor([.3], dtype=F64), .1), .93)]


# --- noise of gradients -----------------------------------------------------------------------------------------

class Noise(NamedTuple):
    draws: Tensor      # (64, 50)
    other: Tensor      # as many, independent of them
    mean: Tensor       # (50,), of both
    var: Tensor        # (50,), of both

    @property
    def signal(self): return self.mean.square().sum()

    @property
    def total(self): return self.var.sum()

    @property
    def seen(self): return self.signal + self.total / len(self.draws)         # E‖ḡ‖²

    @property
    def inside(self):                                                          # E ḡᵀSḡ over (E‖ḡ‖²)²
        return (self.mean.square() @ self.var + self.var.square().sum() / len(self.draws)) / self.seen**2

def noisy(kind, n=64, signal=.3):
    "Draws with a signal of so much of the noise."
    def draw(stream):
        sd = {"equal": torch.ones(50), "decay": 1 / I[:50], "one": torch.cat([torch.ones(1), torch.full((49,), .01)]), "heavy": torch.ones(50)}[kind].double()
        mean = torch.linspace(1, .1, 50, dtype=F64)
        mean *= signal * sd.norm() / mean.norm()
        def some(s):
            z = normal(s, n, 50)
            return mean + sd * (z if kind != "heavy" else z * sqrt(.75) / normal(s / "chi", n, 50, 8).square().mean(2).sqrt())     # Student, 8
        return Noise(some(stream / "a"), some(stream / "b"), mean, sd.square())
    return draw

def losses(x, s): return 1 + torch.empty(len(x.draws), dtype=F64).exponential_(generator=s.generator()) / 2
def bracket(value, stderr, dof): return value - stdtrit(dof, .975) * stderr, value + stdtrit(dof, .975) * stderr
def first(found):
    "In the logarithm, by ten groups."
    low, high = bracket(0., found.stderr[0] / found.value[0], 9)
    return found.value[0] * low.exp(), found.value[0] * high.exp()

def pairs(x, s):
    "Norms of batches of 1 and of 8."
    big = x.mean + (x.other - x.mean) / sqrt(8)
    return noise_scale_of_pairs(x.draws.square().sum(1), big.square().sum(1), 1, 8)

def drawn_trace(s): return Estimate.normal(3 + .1 * normal(s, 1).item(), .1)

MEASURES = {
    "grad_variance": (lambda x, s: grad_variance(x.draws), lambda x: x.total),
    "grad_norm_sq": (lambda x, s: grad_norm_sq(x.draws), lambda x: x.signal),
    "signal_to_noise": (lambda x, s: signal_to_noise(x.draws), lambda x: x.signal / x.total),
    "normalized_variance": (lambda x, s: normalized_variance(x.draws), lambda x: x.total / (x.total + x.signal)),
    "noise_scale": (lambda x, s: noise_scale(x.draws), lambda x: x.total / x.signal),
    "noise_scale_of_pairs": (pairs, lambda x: x.total / x.signal),
    "norm_test": (lambda x, s: norm_test(x.draws), lambda x: (x.total / len(x.draws) / x.seen).sqrt()),
    "inner_product_test": (lambda x, s: inner_product_test(x.draws), lambda x: (x.inside / len(x.draws)).sqrt()),
    "orthogonality_test": (lambda x, s: orthogonality_test(x.draws), lambda x: ((x.total / x.seen - x.inside) / len(x.draws)).sqrt()),
    "cabs": (lambda x, s: cabs(x.draws, losses(x, s), .1), lambda x: .1 * x.total / 1.5),
    "coordinate_variance": (lambda x, s: first(coordinate_variance(x.draws)), lambda x: x.var[0]),
    "coordinate_normalized_variance": (lambda x, s: coordinate_normalized_variance(x.draws).mean, lambda x: (x.var / (x.var + x.mean**2)).mean()),
    "gsnr": (lambda x, s: gsnr(x.draws).mean, lambda x: (x.mean**2 / x.var).mean()),
    "tic_trace": (lambda x, s: tic_trace(x.draws, drawn_trace(s)), lambda x: (x.total + x.signal) / 3),
    "tic_diagonal": (lambda x, s: tic_diagonal(x.draws, I[:50], 0.), lambda x: ((x.var + x.mean**2) / I[:50]).sum()),
    "bias_check, none there": (lambda x, s: bias_check(x.draws, x.other).sq, lambda x: 0.),
    "bias_check, a bias": (lambda x, s: bias_check(x.draws, x.other + x.mean / 2).sq, lambda x: x.signal / 4),
    "bias_check, exact": (lambda x, s: bias_check(x.draws, 0 * x.mean).sq, lambda x: x.signal)}
CLAIMS += [Claim(f"measure: {name}, {kind}", noisy(kind), *measure, .93) for name, measure in MEASURES.items() for kind in ("equal", "decay", "one", "heavy")]
CLAIMS += [Claim(f"measure: {name}, {kind}, few", noisy(kind, 12, 1.), *MEASURES[name], .93)
           for name in ("grad_variance", "grad_norm_sq", "signal_to_noise", "norm_test", "bias_check, a bias") for kind in ("equal", "decay", "one", "heavy")]
CLAIMS += [Claim(f"measure: stopping_evidence, {kind}", noisy(kind), lambda x, s: stopping_evidence(x.draws).mean,
                 lambda x: 1 - (1 + 64 * (x.mean**2 / x.var).mean()) * 63 / 61, .93) for kind in ("equal", "decay", "one")]


# --- means ------------------------------------------------------------------------------------------------------

def remembering(s):
    "A series that forgets by a half a step."
    e = normal(s, 600).tolist()
    x = [e[0]]
    for v in e[1:]: x.append(x[-1] / 2 + v)
    return torch.tensor(x)[200:]

def curve(s):
    "A rising line, seen with errors of up to 0.3, and where it reaches 1."
    t = torch.arange(0., 30, dtype=F64)
    line = uniform(s / "slope", 1, low=.04, high=.2) * t
    return t, line + .3 * uniform(s / "error", 30, low=-1), line

def reached(c): return 1 / c[2][1]

def ratios(s): return 2 + normal(s / 0, 30), 4 + normal(s / 1, 30)

def following(q, n=20):
    "Events of which a share q is to follow jumps, twenty steps from each other."
    def draw(s):
        events, jumps = np.zeros((2, 20 * n), bool)
        events[19::20], jumps[15::20] = True, uniform(s, n).numpy() < q
        return events, jumps
    return draw

def gradients(s):
    "Of 40 examples in 3 parts."
    return normal(s, 40, 6), torch.arange(40) % 3

CLAIMS += [
    Claim("ground: mean of 5", lambda s: normal(s, 5), lambda x, s: Estimate.mean(x), lambda x: 0., .93),
    Claim("measure: ratio_of_means", ratios, lambda x, s: ratio_of_means(*x), lambda x: .5, .93),
    *(Claim(f"measure: precedence, 20 events, {q:.0%} follow", following(q), lambda x, s: precedence([x]).share, lambda x, q=q: q, .95) for q in (.3, .9)),
    Claim("show: batch_means", remembering, lambda x, s: batch_means(x), lambda x: 0., .93),
    Claim("measure: first_crossing", curve, lambda c, s: first_crossing(c[0].numpy(), c[1].numpy(), 1., .3) or (0., 99.), reached, .99),
    Claim("measure: projected_distance", lambda s: normal(s, 2, 500), lambda x, s: bracket(*map(float, projected_distance(*map(Projection(64, s), x))), 1e9),
          lambda x: (x[0] - x[1]).norm(), .93),
]


# --- tails ------------------------------------------------------------------------------------------------------

def power(alpha, n): return lambda s: uniform(s / "size", n)**(-1 / alpha) * (2 * torch.randint(2, (n,), generator=(s / "sign").generator()) - 1)
def stable(alpha, n): return lambda s: stable_sample(alpha, (n,), s.generator(), dtype=F64)
def student_t(nu, n): return lambda s: normal(s, n) / normal(s / "chi", n, nu).square().mean(1).sqrt()

def leaning(alpha, beta, n):
    "Strictly stable and skewed (Chambers, Mallows and Stuck 1976)."
    def draw(s):
        u = pi * (uniform(s / "u", n) - .5)
        w = torch.empty(n, dtype=F64).exponential_(generator=(s / "w").generator())
        lean = atan(beta * tan(pi * alpha / 2)) / alpha
        return (alpha * (u + lean)).sin() / u.cos()**(1 / alpha) * ((u - alpha * (u + lean)).cos() / w)**((1 - alpha) / alpha)
    return draw

def own_power(nu):
    "The index of the power laws that are closest to Student's beyond the thresholds that Hill's halves chose."
    def truth(x):
        h = Histograms.leaving_out(Magnitudes.of(x, logs=False))
        def excess(u):
            at = np.linspace(0, 60, 20_001)
            return np.trapezoid(stdtr(nu, -u * np.exp(at)), at) / stdtr(nu, -u)
        return 2 / sum(excess(h.low[hill_edge(h.half(i))].item()) for i in (0, 1))
    return truth

STABLE_METHODS = "mle", "mcculloch", "logmoment", "ecf", "mohammadi", "mohammadi22"
index = lambda m: lambda x, s: tail_index(x, m)
CLAIMS += [Claim(f"measure: tail_index, {m}, stable {a}, {n} draws", stable(a, n), index(m), lambda x, a=a: a, .93)
           for m in STABLE_METHODS for n in (200, 2000) for a in (1., 1.1, 1.3, 1.5, 1.7, 1.9, 2.) if m != "mle" or a in (1., 1.5, 1.9, 2.)]
CLAIMS += [Claim(f"measure: tail_index, {m}, stable {a}, skewed, 2000 draws", leaning(a, .7, 2000), index(m), lambda x, a=a: a, .93)
           for m in STABLE_METHODS for a in (1.3, 1.7)]
CLAIMS += [Claim(f"measure: tail_index, {m}, stable 1.5, 100000 draws", stable(1.5, 100_000), index(m), lambda x: 1.5, .93) for m in STABLE_METHODS[1:]]
CLAIMS += [Claim(f"measure: tail_index, {m}, Pareto {a}, {n} draws", power(a, n), index(m), lambda x, a=a: a, .93)
           for m in ("hill", "pickands", "dedh") for n in (200, 2000) for a in (1.5, 3.)]
CLAIMS += [Claim(f"measure: tail_index, hill, its own power law, Student {nu}", student_t(nu, 2000), index("hill"), own_power(nu), .93) for nu in (1, 3)]
CLAIMS += [Claim(f"measure: profile_change, stable {a}, {n} draws", stable(a, n), lambda x, s: profile_change(x), lambda x: 0., .93) for a in (1.2, 2.) for n in (400, 4000)]

def bracketed(spread, width):
    "Logarithms of five limits, the mean of all such, and the brackets that a grid finds them in."
    def draw(s):
        middle = uniform(s / "middle", 1).item()
        cells = np.floor((middle + spread * normal(s, 5).numpy()) / width)
        return middle, np.exp(width * cells), np.exp(width * (cells + 1))
    return draw

def raced(noise, n):
    "Steps of two rules on n seeds, which differ more than the rules."
    def draw(s):
        gen = np.random.default_rng(s.generator().initial_seed())
        shared = gen.normal(5, 1, n)
        return [np.exp(shared + noise(gen, n)) for _ in range(2)]
    return draw

gumbel, exponential = lambda gen, n: gen.gumbel(0, .2, n), lambda gen, n: gen.exponential(.3, n)
CLAIMS += [Claim(f"runs: pair, {n} seeds, {name} noise", raced(noise, n), lambda x, s: pair(*x).ratio, lambda x: 1., .93)
           for n in (3, 5) for name, noise in (("Gumbel", gumbel), ("exponential", exponential))]
CLAIMS += [Claim("runs: geometric_mean of 5, Gumbel", lambda s: np.exp(gumbel(np.random.default_rng(s.generator().initial_seed()), 5)), lambda x, s: geometric_mean(x),
                 lambda x: np.exp(.2 * np.euler_gamma), .93),
           *(Claim(f"runs: mean_between, 5 seeds, spread {spread}, grid {width}", bracketed(spread, width), lambda x, s: mean_between(*x[1:]), lambda x: np.exp(x[0]), .93)
             for spread in (.05, .5) for width in (.1, .35)),
           Claim("runs: spread_times, 5 and 5", lambda s: (normal(s / "a", 5), normal(s / "b", 5)),
                 lambda x, s: spread_times(geometric_mean((.3 * x[0]).exp().numpy()), Estimate.mean(2 + .2 * x[1])), lambda x: 2., .93)]

def near(s):
    "Eigenvalues with errors, and what they might be for that."
    true = uniform(s / "v", 12, low=.05).sort(descending=True).values
    errors = .1 * true * uniform(s / "e", 12)
    return true, true + errors * uniform(s / "off", 12, low=-1), errors
CLAIMS += [Claim("measure: widest_gap, 12 values", near, lambda x, s: widest_gap(*x[1:]), lambda x: float((x[0][:-1] / x[0][1:]).argmax()) + 1, 1.)]

def raced_batches(critical, noise, seeds):
    "Sizes and steps of runs to a target."
    def draw(s):
        B = np.repeat([4., 8, 16, 32, 64, 128], seeds)
        return B, 50 * (1 + critical / B) * np.exp(noise * normal(s, len(B)).numpy())
    return draw
CLAIMS += [Claim(f"measure: critical_batch, {what} of {c} and 50, noise {noise}, {seeds} seeds", raced_batches(c, noise, seeds), lambda x, s, i=i: critical_batch(*x)[i], lambda x, v=v: v, .95)
           for c in (5., 20., 100.) for noise in (.05, .3) for seeds in (1, 3) for i, what, v in ((0, "B_c", c), (1, "S_min", 50.))]


# --- nothing is left out ----------------------------------------------------------------------------------------

COUNTED = {      # what states an error → the claims that count it
    "ground.estimate.Estimate.mean": "mean of 5", "ground.estimate.Estimate.student": "mean of 5", "ground.estimate.skewed_student": "tail_index, mohammadi",
    "linalg.krylov.lanczos": "eigenvalues, cold", "linalg.krylov.certify": "eigenvalues, cold", "linalg.basis.Basis.eigs": "eigenvalues, cold",
    "linalg.basis.open_pairs": "eigenvalues, cold", "linalg.iterations.lobpcg": "eigenvalues, lobpcg", "linalg.iterations.power_iteration": "largest magnitude", "linalg.unseen.lanczos_bound": "bound alone",
    "linalg.spectra.xtrace": "xtrace", "linalg.spectra.Spectrum.trace": "‖A‖², spectrum", "linalg.spectra.Spectrum.density": "density at a place",
    "linalg.trace.hutchinson": "hutchinson", "linalg.trace.frobenius": "‖A‖_F, frobenius", "measure.curvature.sharpness": "eigenvalues, sharpness", "measure.tail.sketch.TailSketch.tail_index": "tail_index, mohammadi",
    "measure.thresholds.metrics.preconditioned_sharpness": "eigenvalues, sharpness", "measure.noise.batchsize.radius": "inner_product_test",
    "measure.noise.spread.jackknife": "grad_variance", "measure.noise.coordinates.over_groups": "tic_diagonal", "measure.noise.coordinates.means_over_parameters": "gsnr",
    "measure.trajectories.projected_distance": "projected_distance", "measure.trajectories.first_crossing": "first_crossing", "show.claims.batch_means": "batch_means", "measure.precedence.precedence": "precedence",
    "measure.noise.batchsize.critical_batch": "critical_batch", "measure.probes.subspace.widest_gap": "widest_gap", "measure.thresholds.directions.ratio_of_means": "ratio_of_means", "measure.thresholds.directions.batch_sharpness": "mean of 5",
    "measure.flatness.centre.Centre.estimate": "mean of 5", "measure.probes.stability.noise_curvature": "mean of 5", "measure.flatness.norms.lambda_max": "eigenvalues, sharpness",
    **{f"measure.flatness.{f}": "mean of 5" for f in ("directions.average_sharpness", "norms.trace", "norms.relative_flatness")}, "measure.flatness.norms.frobenius": "‖A‖_F, frobenius",
    **{f"measure.noise.{room}.{name}": name for room, names in {"spread": ("grad_variance", "grad_norm_sq", "signal_to_noise", "normalized_variance", "noise_scale",
        "noise_scale_of_pairs"), "batchsize": ("norm_test", "inner_product_test", "orthogonality_test", "cabs"), "comparing": ("bias_check",),
        "coordinates": ("coordinate_variance", "coordinate_normalized_variance", "gsnr", "stopping_evidence", "tic_trace", "tic_diagonal")}.items() for name in names},
    **{f"measure.tail.methods.{m}": f"tail_index, {m}" for m in ("mle", "mcculloch", "logmoment", "ecf", "mohammadi22")},
    "measure.tail.methods.inverse": "tail_index, hill", "measure.tail.methods.LogQuantile.of": "tail_index, mcculloch",
    **{f"measure.tail.estimators.{f}": "tail_index, " for f in ("estimate_index", "tail_index", "compare_records", "compare_tails", "m_profile", "k_plot")},
    "measure.tail.noise.noise_index": "tail_index, mohammadi", "measure.tail.noise.index_or_nan": "tail_index, mohammadi", "measure.tail.verdict.profile_change": "profile_change", "show.plots.tail.profile_frame": "tail_index, ",
    "runs.sweeps.comparison.geometric_mean": "geometric_mean", "runs.sweeps.pairs.antilog": "geometric_mean", "runs.sweeps.comparison.spread_times": "spread_times",
    "runs.sweeps.limits.mean_between": "mean_between"}
CONVERTS = "the numbers that it is given, in other units or under another name"
SEARCHED = "a bracket of a search, not of chance: tests/test_flatness.py holds it against exact values"
UNCOUNTED = {    # and why others are not
    "ground.estimate.Estimate.normal": CONVERTS, "ground.estimate.Estimate.times": CONVERTS, "measure.noise.comparing.efficiency": CONVERTS,
    "measure.noise.spread.through": CONVERTS, "measure.flatness.centre.Centre.reading": CONVERTS, "measure.flatness.centre.measure_flatness": CONVERTS,
    "linalg.spectra.Spectrum.above": "a step is no polynomial, its docstring says so",
    **{f"measure.flatness.{f}": SEARCHED for f in ("ball.worst_case", "ball.sam_sharpness", "ball.asam_sharpness", "centre.Centre.rise", "directions.eps_radius",
        "directions.eps_volume", "directions.pac_bayes_sigma", "keskar.keskar_sharpness", "norms.fisher_rao")},
    "measure.tail.controls.control_row": "an interval of the next draw of a control: tests/test_tail_controls.py", "measure.tail.fit.compare_laws": "tests/test_tail_fit.py counts its ranks",
    "problem.designs.Design.variance": "its error is that of the simulation of counts alone: tests/test_estimators_noise.py",
    "problem.audit.slopes": "a difference's own, by two widths: tests/test_problem.py holds it against closed forms", "runs.sweeps.many.results": "the word of an exception", "show.plots.ticks.log_ticks": "places on an axis", "show.claims.within": "a comparison"}

def stating():
    "Every public function that states an error: it returns what holds one, or its signature's comment says so."
    types, words = re.compile(r"\b(Estimate|Eigs|PerParameter|Masked|Bias|Reading|Density)\b"), re.compile(r"\b(stderr|low|errors?|interval)\b")
    for info in pkgutil.walk_packages(gradnb.__path__, "gradnb."):
        room = info.name.split(".")[1]
        if room in ("bench", "cli") or info.ispkg or "explorers" in info.name: continue
        try: module = importlib.import_module(info.name)
        except ImportError: continue                                                     # of an extra that is not there
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            members = {f"{name}.{k}": getattr(v, "__func__", v) for k, v in vars(thing).items() if k[0] != "_"} if inspect.isclass(thing) else {name: thing}
            for called, f in members.items():
                if not inspect.isfunction(f) or f.__module__ != info.name: continue
                returned = next((line for line in inspect.getsource(f).splitlines() if "->" in line), "").rpartition("->")[2]
                kind, _, said = returned.partition("#")
                if types.search(kind) or words.search(said): yield f"{info.name.removeprefix('gradnb.')}.{called}"

def test_everything_that_states_an_error_is_counted():
    "A new one needs a claim, or a reason."
    found = set(stating())
    assert found - COUNTED.keys() - UNCOUNTED.keys() == set(), "these state errors and no claim counts them"
    assert (COUNTED.keys() | UNCOUNTED.keys()) - found <= {"ground.estimate.skewed_student"}, "these are there no more"
    assert [name for name, word in COUNTED.items() if not any(word in c.name for c in CLAIMS)] == []


# --- the laws ---------------------------------------------------------------------------------------------------

FEW = ("eigenvalues, cold, clustered", "eigenvalues, warm, multiple", "xtrace, rank 30", "hutchinson, 1/i²", "spectrum, 1/i²", "at a place, 1/i²")

@pytest.mark.parametrize("claim", [c for c in CLAIMS if any(w in c.name for w in FEW)], ids=lambda c: c.name)
def test_four_draws(claim): assert enough(claim, coverage(claim, 4)[0], 4)

@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_what_is_stated_holds(claim):
    draws = 200
    held, _ = coverage(claim, draws)
    assert enough(claim, held, draws), f"{claim.name}: held in {held} of {draws} draws, stated {claim.level:.1%}"


KEPT = Path(__file__).parent / "coverage.json"

def kept() -> dict: return json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}

def test_what_the_documentation_shows_is_every_claim_and_holds():
    found, claims = kept(), {c.name: c for c in CLAIMS}
    assert found.keys() == claims.keys(), "count the new claims, and leave out the old: python tests/test_coverage.py 200"
    assert [name for name, row in found.items() if not enough(claims[name], row["held"], row["draws"])] == []


if __name__ == "__main__":
    draws, words = int(sys.argv[1]) if len(sys.argv) > 1 else 200, sys.argv[2:]
    print("| claim | level | held | products |\n|---|---|---|---|")
    for claim in CLAIMS:
        if not all(w in claim.name for w in words): continue
        held, paid = coverage(claim, draws)
        print(f"| {claim.name} | {claim.level:.1%} | {held} of {draws} | {f'{paid:.0f}' if paid else ''} |", flush=True)
        rows = kept() | {claim.name: {"held": held, "draws": draws, "products": round(paid)}}
        rows = {c.name: rows[c.name] for c in CLAIMS if c.name in rows}
        KEPT.write_text("{\n" + ",\n".join(f" {json.dumps(k, ensure_ascii=False)}: {json.dumps(v)}" for k, v in rows.items()) + "\n}\n", "utf-8")
