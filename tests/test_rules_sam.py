"SAM and ASAM keep the laws, and step as pytorch_optimizer's SAM does."
from itertools import islice

import pytest
import pytorch_optimizer as po
import torch
from torch import nn

from gradnb.data import load_dataset
from gradnb.move.estimators.minibatch import FullBatch, MiniBatch
from gradnb.move.estimators.projected import Projected
from gradnb.move.estimators.sam import ASAM, SAM
from gradnb.runs.laws import check_estimator, check_stepper
from gradnb.models import build_model
from gradnb.problem import Problem
from gradnb.ground.roles import ESTIMATORS
from gradnb.ground.streams import Stream
from gradnb.move.rules.gd import GD
from gradnb.move.rules.momentum import Momentum
from gradnb.runs import Spec
from gradnb.move.steppers import Descent, trajectory


@pytest.fixture(scope="module")
def problem():
    digits = load_dataset("digits-200").to(dtype=torch.float64)
    return Problem(build_model("fc-tanh:width=5,depth=1", digits), "ce", digits)


@pytest.mark.parametrize("estimator", [SAM(.1), SAM(.1, MiniBatch(16)), ASAM(.5, MiniBatch(16)), SAM(.05, ASAM(.1)), Projected(3, "top"), Projected(3, "bulk", MiniBatch(16), every=4, since=2)], ids=repr)
def test_laws(estimator, problem):
    check_estimator(estimator, problem, draws=problem.p // 2)
    check_stepper(Descent(Momentum(.1), estimator), problem)
    assert Spec.from_json(Spec("digits", "fc-tanh", "ce", GD(.1), 3, estimator).to_json()).estimator == estimator


@pytest.mark.parametrize("inner", [FullBatch(), MiniBatch(16)], ids=repr)
def test_radius_zero_is_the_estimator_inside(inner, problem):
    runs = (trajectory(problem, Descent(GD(.1), estimator)) for estimator in (inner, SAM(0., inner), ASAM(0., inner)))
    for a, b, c in islice(zip(*runs), 5): assert torch.equal(a.theta, b.theta) and torch.equal(a.theta, c.theta)


def test_it_is_biased(problem):
    class Claims(SAM): biased = False
    with pytest.raises(RuntimeError, match="is biased"): check_estimator(Claims(.5, MiniBatch(16)))


@pytest.mark.parametrize("adaptive, estimator", [(False, SAM(.1)), (True, ASAM(.5, eta=0.))])
def test_parity(adaptive, estimator, problem):
    net, data = build_model("fc-tanh:width=5,depth=1", problem.dataset), problem.dataset
    sam = po.SAM(net.parameters(), torch.optim.SGD, rho=estimator.rho, adaptive=adaptive, lr=.1, momentum=.9)
    for state in islice(trajectory(problem, Descent(Momentum(.1), estimator)), 30):
        theirs = torch.cat([p.detach().flatten() for p in net.parameters()])
        assert (state.theta - theirs).abs().max() < 1e-8       # their norms are float32, with an eps of 1e-12
        nn.functional.cross_entropy(net(data.x), data.y).backward()
        sam.first_step(zero_grad=True)
        nn.functional.cross_entropy(net(data.x), data.y).backward()
        sam.second_step(zero_grad=True)


def test_words():
    assert ESTIMATORS.build("sam:rho=0.2,size=32") == SAM(.2, MiniBatch(32))
    assert ESTIMATORS.build("asam:eta=0.1") == ASAM(.5, FullBatch(), .1)
    with pytest.raises(ValueError, match="rho=nan"): SAM(float("nan"))


# --- a part of the gradient -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("every", [1, 3])
def test_both_parts_are_those_of_the_dense_hessian_and_add_up(problem, every):
    "Against NumPy's eigenvectors of the Hessian at the step of the last look."
    import numpy as np
    runs = [trajectory(problem, Descent(GD(.1), Projected(4, part, MiniBatch(16), every, since=2, tol=1e-6))) for part in ("top", "bulk")] + [trajectory(problem, Descent(GD(.1), MiniBatch(16)))]
    known = {}
    for k, (top, bulk, plain) in enumerate(islice(zip(*runs), 6 if every == 1 else 8)):
        if k <= 2: assert torch.equal(top.theta, plain.theta) and torch.equal(bulk.theta, plain.theta)
        if k < 2: assert torch.equal(top.grad, plain.grad) and torch.equal(bulk.grad, plain.grad)
        else:
            for state, part in ((top, 1.), (bulk, 0.)):
                if (k - 2) % every == 0: known[part] = np.linalg.eigh(problem.hvp(state.theta, torch.eye(problem.p, dtype=torch.float64)).numpy())[1][:, -4:]
                V, g = known[part], problem.grad_and_loss(state.theta, MiniBatch(16).sample((), problem, Stream(0) / "train" / k / "batch"))[0].numpy()
                inside = V @ (V.T @ g)
                np.testing.assert_allclose(state.grad, inside if part else g - inside, atol=1e-4 * np.linalg.norm(g))


def test_what_cannot_be_projected_is_refused(problem):
    with pytest.raises(ValueError, match="smaller k"): Projected(problem.p).init(problem, problem.theta0)
    with pytest.raises(TypeError, match="instance of gradnb.Estimator"): Projected(3, estimator=MiniBatch)
    with pytest.raises(ValueError, match="every"): Projected(3, every=0)
