"""How often what is stated holds, on inputs that nobody tuned to.

A claim is a line of CLAIMS: how an input is drawn, what we say of it, what is true, and how often it should hold.
`python tests/test_coverage.py 400 eigenvalues` measures the claims whose name holds that word, in 400 draws, and prints
the table that the documentation shows."""
import sys
from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gradnb import Quadratic, Stream, sharpness
from gradnb.ground.estimate import Estimate
from gradnb.linalg import Eigs, hutchinson, lanczos, lobpcg, power_iteration
from gradnb.linalg.spectra import spectrum, xtrace
from gradnb.measure.noise.comparing import bias_check
from gradnb.measure.noise.coordinates import coordinate_normalized_variance, gsnr
from gradnb.measure.noise.spread import grad_norm_sq, grad_variance, noise_scale, signal_to_noise
from gradnb.measure.tail.estimators import tail_index
from gradnb.measure.tail.stable import stable_sample

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
        return Search(values.to(start.dtype), start, int(pick("k", 1, 10.999)), 10 ** pick("tol", -8, -2))
    return draw

def pick_int(stream): return int(uniform(stream / "cut", 1, low=1, high=6))
def product(values): return lambda V: values * V if V.ndim == 1 else values[:, None] * V
def top(s): return s.values.double()[:s.k]

def cold(s, stream): return lanczos(product(s.values), s.start, s.k, s.tol, stream=stream)

def warm(s, stream):
    "From what was true when the eigenvalues were others, and the top somewhere below."
    before = s.values * (1 + .1 * normal(stream / "before", len(s.values))).to(s.values)
    before[:2] *= uniform(stream / "below", 1).item()
    old = lanczos(product(before), s.start, s.k, 1e-3, stream=stream / "old", keep=s.k + 8)
    return lanczos(product(s.values), old.sketch.vectors[:, :s.k], s.k, s.tol, sketch=old.sketch, keep=s.k + 8, stream=stream)

def hill(s):
    "A quadratic, with a gradient that holds nothing of the top."
    H, theta = Quadratic(s.values.diag()), torch.ones_like(s.start)
    theta[:1] = 0
    return H, theta

def sharp(s, stream): return sharpness(*hill(s), s.k, s.tol, stream=stream)

def drawn_block(s, stream): return lobpcg(product(s.values), normal(stream / "block", len(s.values), s.k + 2).to(s.start), s.k, s.tol, stream=stream)

def magnitude(s, stream):
    e = power_iteration(product(s.values), s.start, max(s.tol, 1e-4), stream=stream)
    return e.values.abs(), e.values.abs() + e.errors

CLAIMS = [Claim(f"linalg: eigenvalues, {how}, {kind}", search(kind), state, top, .995)
          for kind in SPECTRA for how, state in (("cold", cold), ("warm", warm), ("sharpness", sharp))]
CLAIMS += [Claim(f"linalg: eigenvalues, lobpcg, {kind}", search(kind, 100), drawn_block, top, .995) for kind in ("clustered", "multiple", "indefinite")]
CLAIMS += [Claim(f"linalg: largest magnitude, {kind}", search(kind, 100), magnitude, lambda s: s.values.double().abs().max(), .995)
           for kind in ("clustered", "indefinite")]


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
        Claim(f"linalg: density at a place, {name}", rotated(values),
              lambda A, s: (d := spectrum(A.__matmul__, len(A), 8, 40, s, F64).density([.3], .1)) and (d.low, d.high),
              lambda A: blurred(A, torch.tensor([.3], dtype=F64), .1), .93)]


# --- noise of gradients -----------------------------------------------------------------------------------------

class Noise(NamedTuple):
    draws: Tensor      # (64, 50)
    other: Tensor      # as many, independent of them
    mean: Tensor       # (50,), of both
    var: Tensor        # (50,), of both

def noisy(kind):
    "Draws with a signal of 0.3 of the noise."
    def draw(stream):
        sd = {"equal": torch.ones(50), "decay": 1 / I[:50], "one": torch.cat([torch.ones(1), torch.full((49,), .01)]), "heavy": torch.ones(50)}[kind].double()
        mean = torch.linspace(1, .1, 50, dtype=F64)
        mean *= .3 * sd.norm() / mean.norm()
        def some(s):
            z = normal(s, 64, 50)
            return mean + sd * (z if kind != "heavy" else z * sqrt(.75) / normal(s / "chi", 64, 8).square().mean(1, keepdim=True).sqrt())     # Student, 8
        return Noise(some(stream / "a"), some(stream / "b"), mean, sd.square())
    return draw

MEASURES = {
    "grad_variance": (lambda x, s: grad_variance(x.draws), lambda x: x.var.sum(), .89),
    "grad_norm_sq": (lambda x, s: grad_norm_sq(x.draws), lambda x: x.mean.square().sum(), .93),
    "signal_to_noise": (lambda x, s: signal_to_noise(x.draws), lambda x: x.mean.square().sum() / x.var.sum(), .93),
    "noise_scale": (lambda x, s: noise_scale(x.draws), lambda x: x.var.sum() / x.mean.square().sum(), .93),
    "normalized variance of coordinates": (lambda x, s: coordinate_normalized_variance(x.draws).mean, lambda x: (x.var / (x.var + x.mean**2)).mean(), .9),
    "gsnr": (lambda x, s: gsnr(x.draws).mean, lambda x: (x.mean**2 / x.var).mean(), .93),
    "bias_check, none there": (lambda x, s: bias_check(x.draws, x.other).sq, lambda x: 0., .95)}
CLAIMS += [Claim(f"measure: {name}, {kind}", noisy(kind), *measure) for name, measure in MEASURES.items() for kind in ("equal", "decay", "one", "heavy")]


# --- tails ------------------------------------------------------------------------------------------------------

def power(alpha): return lambda s: uniform(s / "size", 1000)**(-1 / alpha) * (2 * torch.randint(2, (1000,), generator=(s / "sign").generator()) - 1)
def stable(alpha): return lambda s: stable_sample(alpha, (1000,), s.generator(), dtype=F64)

CLAIMS += [Claim(f"measure: tail_index, {method}, stable {alpha}", stable(alpha), lambda x, s, m=method: tail_index(x, m), lambda x, a=alpha: a, .88)
           for method in ("mle", "mcculloch", "logmoment", "ecf", "mohammadi", "mohammadi22") for alpha in (1., 1.5, 2.)]
CLAIMS += [Claim(f"measure: tail_index, {method}, Pareto {alpha}", power(alpha), lambda x, s, m=method: tail_index(x, m), lambda x, a=alpha: a, .85)
           for method in ("hill", "pickands", "dedh") for alpha in (1.5, 3.)]


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


if __name__ == "__main__":
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print("| claim | level | held | products |\n|---|---|---|---|")
    for claim in CLAIMS:
        if len(sys.argv) > 2 and not all(w in claim.name for w in sys.argv[2:]): continue
        held, paid = coverage(claim, draws)
        print(f"| {claim.name} | {claim.level:.1%} | {held / draws:.1%} of {draws} | {paid:.0f} |" if paid else
              f"| {claim.name} | {claim.level:.1%} | {held / draws:.1%} of {draws} | |", flush=True)
