"""Controls of the tail index: what each keeps, what each destroys, and how often a Gaussian passes for one."""
import numpy as np
import pytest
import torch
from scipy import stats

from gradnb.ground.estimate import Estimate
from gradnb.ground.streams import Stream
from gradnb.measure.tail.controls import CONTROLS, control_row, flipped_signs, gaussian_surrogate, gaussian_verdict, independent_gaussian, permuted_columns
from gradnb.measure.tail.stable import stable_sample


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=(Stream(seed) / "test").generator(), dtype=dtype)


def generator(name="control"):
    return (Stream(7) / name).generator()


def autoregression(x, rho=.9):
    lag = torch.arange(x.shape[1])[None] - torch.arange(x.shape[1])[:, None]
    return x @ torch.where(lag < 0, 0, rho**lag.double())


def mohammadi(x, m, dim):
    "Index over blocks of m along a dimension, after Mohammadi et al. (2015, Cor. 2.4); written for this test."
    x = x.movedim(dim, 0)
    x = x[:len(x) // m * m]
    return float(np.log(m) / (x.reshape(-1, m, x.shape[1]).sum(1).abs().log().mean() - x.abs().log().mean()))


def test_the_surrogate_has_the_sample_covariance():
    x = autoregression(draws(30, 6)) + 5
    many = torch.cat([gaussian_surrogate(x, (Stream(1) / i).generator()) for i in range(2000)])
    S = x.T.cov()
    spread = ((S**2 + S.diag()[:, None] * S.diag()) / len(many)).sqrt()          # of a Gaussian's sample covariance
    assert ((many.T.cov() - S).abs() / spread).max() < 4.5
    assert (many.mean(0).abs() / (S.diag() / len(many)).sqrt()).max() < 4
    assert stats.kstest((many @ draws(6)).numpy() / (draws(6) @ S @ draws(6)).sqrt().item(), "norm").pvalue > 1e-3


def test_rows_of_the_surrogate_lie_in_the_span_of_the_centred_rows():
    x = draws(8, 50)
    both = torch.cat([gaussian_surrogate(x, generator()), x - x.mean(0)])
    assert torch.linalg.matrix_rank(both) == 7


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_controls_are_like_the_data_and_leave_them_alone(control, dtype):
    x = draws(12, 9, dtype=dtype)
    before, rng = x.clone(), torch.get_rng_state()
    a, b = control(x, generator()), control(x, generator())
    assert a.shape == x.shape and a.dtype == dtype
    assert torch.equal(a, b) and torch.equal(x, before) and torch.equal(rng, torch.get_rng_state())
    assert not torch.equal(a, x) and not torch.equal(a, control(x, generator("other")))


def test_each_control_keeps_what_it_says():
    x = draws(40, 15) * torch.logspace(-3, 3, 15)
    x = x - x.mean(0)
    order = lambda t: t[:, t[0].argsort()]
    assert torch.equal(order(permuted_columns(x, generator())), order(x))
    assert torch.equal(flipped_signs(x, generator()).abs(), x.abs())
    assert .4 < (flipped_signs(x, generator()) == x).double().mean() < .6
    ratio = independent_gaussian(x, generator()).std(0) / x.std(0)
    assert ((ratio - 1).abs() < 5 / np.sqrt(2 * 39)).all()


def test_a_dead_column_stays_dead():
    x = draws(20, 5)
    x[:, 2] = 0
    for name in ("gaussian", "signs", "scales"): assert (CONTROLS[name](x, generator())[:, 2] == 0).all()


@pytest.mark.parametrize("dim, m", [(1, 8), (0, 2)], ids=["columns", "rows"])
def test_a_correlated_gaussian_is_taken_for_one(dim, m):
    "The p-value of Gaussian data is uniform: at 10 % it rejects 10 % of them, whichever way the index looks."
    mixed = [autoregression(draws(60, 80, seed=s)) * torch.logspace(-1, 1, 80) for s in range(120)]
    p = [control_row(x, lambda x: mohammadi(x, m, dim), Stream(s), 10, {"gaussian": gaussian_surrogate}).p_value["gaussian"]
         for s, x in enumerate(mixed)]
    assert stats.binomtest(sum(v < .1 for v in p), len(p), .1).pvalue > .005
    assert stats.kstest(p, "uniform").pvalue > .005


def test_heavy_tails_are_told_from_a_gaussian():
    heavy = [autoregression(stable_sample(1.5, (120, 100), (Stream(s) / "heavy").generator(), dtype=torch.float64)) for s in range(10)]
    p = [control_row(x, lambda x: mohammadi(x, 4, 0), Stream(s), 10, {"gaussian": gaussian_surrogate}).p_value["gaussian"]
         for s, x in enumerate(heavy)]
    assert sum(v < .05 for v in p) >= 9


def test_the_row():
    x = draws(50, 20)
    scale = lambda x: Estimate.mean(x.square().mean(1))
    row = control_row(x, scale, Stream(3), draws=8)
    assert list(row.index) == ["data", *CONTROLS] and list(row.columns) == ["value", "stderr", "low", "high", "p_value"]
    assert tuple(row.loc["data"])[:4] == scale(x)
    assert row.loc["signs", "value"] == pytest.approx(row.loc["data", "value"], rel=1e-12) and row.loc["signs", "p_value"] > .05
    seen = torch.tensor([scale(independent_gaussian(x, (Stream(3) / "scales" / i).generator())).value for i in range(8)])
    assert row.loc["scales", "value"] == pytest.approx(seen.mean().item()) and row.loc["scales", "stderr"] == pytest.approx(seen.std().item())
    t = abs(row.loc["data", "value"] - seen.mean().item()) / (seen.std().item() * (1 + 1 / 8)**.5)
    assert row.loc["scales", "p_value"] == pytest.approx(2 * stats.t.sf(t, 7), rel=1e-4)
    assert (row.high - row.low)["gaussian"] == pytest.approx(2 * stats.t.ppf(.975, 7) * row.loc["gaussian", "stderr"] * (9 / 8)**.5)


def test_the_verdict_is_a_word():
    row = control_row(draws(40, 10), lambda x: mohammadi(x, 2, 0), Stream(0))
    row.loc["gaussian", "p_value"] = .3
    assert gaussian_verdict(row).endswith("no (p = 0.3)")
    row.loc["gaussian", "p_value"] = .012
    assert gaussian_verdict(row).endswith("yes (p = 0.012)") and gaussian_verdict(row, .99).endswith("no (p = 0.012)")


@pytest.mark.parametrize("shape, n", [((40, 3), 2), ((2, 3), 20), ((40,), 20)])
def test_refusals_name_what_was_given(shape, n):
    with pytest.raises(ValueError, match=rf"got shape \({shape[0]},.*draws={n}"): control_row(draws(*shape), torch.sum, Stream(), n)
