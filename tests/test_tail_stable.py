"""The symmetric stable law on grids of alpha and x, against SciPy, closed forms, quadrature and the series."""
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import kstest, levy_stable

from gradnb.ground.streams import Stream
from gradnb.measure.tail.stable import stable_cdf, stable_density, stable_logpdf, stable_sample

ALPHAS = [0.5, 0.6, 0.77, 0.95, 1.0, 1.05, 1.3, 1.62, 1.85, 1.97, 1.999, 2.0]


def series(x, alpha, terms=40):
    "The density far out, summed until its terms are smallest."
    total, last = 0.0, math.inf
    for k in range(1, terms):
        term = math.exp(math.lgamma(k * alpha + 1) - math.lgamma(k + 1) - (k * alpha + 1) * math.log(x)) / math.pi
        if term > last: break
        total, last = total + (-1)**(k + 1) * term * math.sin(k * math.pi * alpha / 2), term
    return total


@pytest.mark.parametrize("alpha", [0.6, 0.9, 1.2, 1.5, 1.8, 1.95])
def test_density_and_distribution_of_scipy(alpha):
    x = np.array([0, 0.4, 1, 2, 5, 11, 30.])
    assert np.abs(stable_logpdf(torch.tensor(x), alpha).numpy() - levy_stable.logpdf(x, alpha, 0)).max() < 1e-5
    for s in (1, -1):
        assert np.abs(stable_cdf(torch.tensor(s * x), alpha).numpy() - levy_stable.cdf(s * x, alpha, 0)).max() < 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
def test_density_of_the_quadrature(alpha):
    x = np.geomspace(1e-3, 5 if alpha > 1.99 else 900, 120)
    assert np.abs(stable_logpdf(torch.tensor(x), alpha).numpy() - np.log(stable_density(x, alpha))).max() < 1e-5


@pytest.mark.parametrize("alpha", [a for a in ALPHAS if a < 2])
def test_density_of_the_series(alpha):
    x = np.array([100., 500, 999, 1001, 1e4, 1e6])
    assert np.abs(stable_logpdf(torch.tensor(x), alpha).numpy() - np.log([series(v, alpha) for v in x])).max() < 1e-5


@pytest.mark.parametrize("alpha", ALPHAS)
def test_density_integrates_to_one(alpha):
    f = lambda u: math.exp(stable_logpdf(torch.tensor(math.sinh(u)), alpha).item()) * math.cosh(u)
    end = 14.0
    mass = quad(f, 0, end, limit=200, points=[0.1, 1, 3])[0] + stable_cdf(torch.tensor(-math.sinh(end)), alpha).item()
    assert mass == pytest.approx(0.5, abs=1e-5)


def test_cauchy_and_gauss():
    x = torch.tensor([-1e6, -30, -1, 0, 0.2, 4, 1e3, 1e6], dtype=torch.float64)
    cauchy = torch.distributions.Cauchy(torch.tensor(0., dtype=torch.float64), torch.tensor(3., dtype=torch.float64))
    assert (stable_logpdf(x, 1.0, 3.0) - cauchy.log_prob(x)).abs().max() < 1e-5
    assert (stable_cdf(x, 1.0, 3.0) - cauchy.cdf(x)).abs().max() < 1e-9
    normal = torch.distributions.Normal(torch.tensor(0., dtype=torch.float64), torch.tensor(3 * 2**.5, dtype=torch.float64))
    torch.testing.assert_close(stable_logpdf(x, 2.0, 3.0), normal.log_prob(x))
    torch.testing.assert_close(stable_cdf(x, 2.0, 3.0), normal.cdf(x))


def test_just_below_two_the_tail_is_in_proportion_to_what_is_missing():
    x, gap = torch.tensor([20., 200.], dtype=torch.float64), 1e-6
    ratio = stable_logpdf(x, 2 - gap).exp() / stable_logpdf(x, 2 - 100 * gap).exp()
    assert ((ratio * 100 - 1).abs() < 1e-3).all()


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0, 1.3, 1.7, 2.0])
def test_draws_follow_the_distribution(alpha):
    x = stable_sample(alpha, (20_000,), (Stream(1) / "draws").generator(), 2.5, torch.float64)
    assert kstest(x.numpy(), lambda v: stable_cdf(torch.as_tensor(v), alpha, 2.5).numpy()).pvalue > 0.005


def test_draws_come_from_the_generator_alone():
    before = torch.get_rng_state()
    first, second = (stable_sample(1.5, (3, 4), Stream(2).generator()) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float32 and first.shape == (3, 4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("alpha, scale, says", [(0.4, 1, "got 0.4"), (2.1, 1, "got 2.1"), (1.5, 0, "scale must be positive"),
                                               (float("nan"), 1, "got nan")])
def test_what_is_no_law_is_refused(alpha, scale, says):
    for f in (stable_logpdf, stable_cdf):
        with pytest.raises(ValueError, match=says): f(torch.ones(2), alpha, scale)
