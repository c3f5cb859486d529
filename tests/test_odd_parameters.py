"Parameters of any shape, tied ones and unused ones go through every rule, estimator and probe."
import pytest
import torch
from torch import nn

from gradnb import GD, PROBES, Batch, Descent, MiniBatch, Problem, Stream, load_dataset, train
from gradnb.ground.roles import ESTIMATORS, RULES
from gradnb.problem.modes import drawing


class Odd(nn.Module):
    "A temperature, an empty, a 5-dimensional and an unused parameter."
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)
        self.temperature, self.none, self.unused = (nn.Parameter(t) for t in (torch.tensor(.7), torch.zeros(0), torch.ones(3)))
        self.five = nn.Parameter(torch.linspace(.5, 1.5, 8).view(2, 1, 2, 1, 2))

    def forward(self, x): return self.last(self.first(x.flatten(1)).tanh() * self.five.flatten()) * self.temperature + self.none.sum()


class Tied(nn.Module):
    "Two layers of one weight."
    def __init__(self):
        super().__init__()
        self.first, self.one, self.two, self.last = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.two.weight = self.one.weight

    def forward(self, x): return self.last(self.two(self.one(self.first(x.flatten(1)).tanh()).tanh()).tanh())


@pytest.fixture(scope="module", params=[Odd, Tied], ids=["odd", "tied"])
def odd(request):
    with drawing(Stream(0), torch.device("cpu")): net = request.param().double()
    return Problem(net, "ce", load_dataset("digits-60").to(dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*one by one")
@pytest.mark.parametrize("estimator", ["minibatch:size=16", "svrg:size=16,every=2", "gradientclustering:size=16,k=3", "importancesampling:size=16"])
@pytest.mark.parametrize("rule", ["gd:lr=.05", "momentum:lr=.05", "adam:lr=.001", "rmsprop:lr=.001", "lamb:lr=.001", "lars:lr=.1", "torch:cls=AdamW,lr=.001"])
def test_odd_parameters_are_moved_by_every_rule_and_estimator(odd, rule, estimator):
    state, _ = train(odd, Descent(RULES.build(rule), ESTIMATORS.build(estimator)), 2, progress=False)
    assert torch.isfinite(state.theta).all() and not torch.equal(state.theta, odd.theta0)


@pytest.mark.filterwarnings("ignore:.*one by one")
@pytest.mark.parametrize("word", ["noise_scale", "gradient_moments", "freshness:of=[svrg:size=16,every=2]", "tic", "grad_variance:draws=0", "tail_index",
    "sharpness", "spectrum", "flatness:measure=sam", "update_variance", "batch_sharpness", "published_variance", "noise_norms"])
def test_odd_parameters_are_measured_by_every_probe(odd, word):
    name, _, args = word.partition(":")
    probe = PROBES.build(f"{word}{',' if args else ':'}every=1")
    _, traces = train(odd, Descent(GD(.05), MiniBatch(16)), 1, probe, progress=False)
    assert len(traces[probe.name]) == 2


def test_the_noise_scale_of_odd_parameters_is_that_of_their_gradients(odd):
    g = torch.stack([odd.grad_and_loss(odd.theta0, Batch(torch.tensor([i])))[0] for i in range(odd.n)])
    _, traces = train(odd, Descent(GD(.05)), 0, "noise_scale", progress=False)
    assert traces["noise_scale"].values[0] == pytest.approx((g.var(0, correction=0).sum() / g.mean(0).square().sum()).item(), rel=1e-9)


def test_kfac_says_which_parameters_have_no_factors(odd):
    with pytest.raises(TypeError, match="K-FAC has no factors for layer"): train(odd, Descent(RULES.build("kfac:lr=.01")), 1, progress=False)
