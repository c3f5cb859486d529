"Probes of rules against the run itself, stepped by hand."
from itertools import islice

import pytest
import torch

from gradnb.data import load_dataset
from gradnb.move.estimators.minibatch import MiniBatch
from gradnb.runs.laws import check_probe
from gradnb.models import build_model
from gradnb.measure.probes.view import PROBES
from gradnb.problem import Problem
from gradnb.move.rules.agd import AutomaticGradientDescent
from gradnb.move.rules.gd import GD
from gradnb.move.rules.lamb import LAMB
from gradnb.move.rules.schedule import Piecewise, Scheduled
from gradnb.move.steppers import Descent, trajectory
from gradnb.runs.training import train


@pytest.fixture(scope="module")
def problem():
    digits = load_dataset("digits-200").to(dtype=torch.float64)
    return Problem(build_model("fc-tanh:width=8,depth=1", digits), "ce", digits)


@pytest.mark.parametrize("name", ["weight_norms", "grad_norms", "update_norms", "relative_updates", "effective_rates",
                                  "trust_ratio", "rule:field=exp_avg", "rule:field=step"])
def test_laws(name, problem): check_probe(PROBES.build(name, every=5), problem, Descent(LAMB(.01), MiniBatch(8)))


def test_laws_of_agd(problem): check_probe(PROBES.build("agd"), problem, Descent(AutomaticGradientDescent(vectors=True)))


def test_they_measure_the_step_that_the_run_takes(problem):
    stepper, names = Descent(Scheduled(LAMB(.01), Piecewise(((5, .1),))), MiniBatch(16)), problem.layout.names
    watch = ["weight_norms", "grad_norms", "update_norms", "relative_updates", "effective_rates", "trust_ratio", "rule:field=adam_norm"]
    _, traces = train(problem, stepper, 9, [PROBES.build(p, every=1) for p in watch], progress=False)
    states = list(islice(trajectory(problem, stepper), 11))
    for k, (now, then) in enumerate(zip(states[:10], states[1:])):
        w, g, to = (problem.layout.split(v) for v in (now.theta, now.grad, then.theta))
        for i, n in enumerate(names):
            got = {t: float(traces[t].columns[n][k]) for t in traces if t != "loss"}
            moved = float((to[i] - w[i]).norm())
            expected = dict(weight_norms=float(w[i].norm()), grad_norms=float(g[i].norm()), update_norms=moved,
                            relative_updates=moved / float(w[i].norm()), effective_rates=moved / float(g[i].norm()),
                            trust_ratio=float(then.rule.inner.trust_ratio[n]), adam_norm=float(then.rule.inner.adam_norm[n]))
            for t, value in expected.items(): assert abs(got[t] / value - 1) < 1e-9, (t, k, n)
            assert abs(got["relative_updates"] / (.01 if k < 5 else .001) - 1) < 1e-9


def test_a_dead_block_has_no_ratio(problem):
    theta = problem.theta0.clone()
    problem.layout.named(theta)["fc1.bias"].zero_()
    _, traces = train(problem, Descent(GD(.1)), 0, [PROBES.build("relative_updates", every=1)], theta=theta, progress=False)
    columns = traces["relative_updates"].columns
    assert columns["fc1.bias"][0] != columns["fc1.bias"][0] and columns["fc1.weight"][0] > 0


def test_what_is_not_there(problem):
    for rule, name, says in ((GD(.1), "trust_ratio", "nothing"), (LAMB(.1), "rule:field=velocity", "exp_avg_sq")):
        with pytest.raises(ValueError, match=says): train(problem, Descent(rule), 1, [PROBES.build(name)], progress=False)
