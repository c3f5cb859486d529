"""Central flows against closed forms, dense linear algebra, finite differences and the runs they average."""
from itertools import islice

import pytest
import torch
from torch import nn

from gradnb.data import Dataset, load_dataset
from gradnb.move.flows.central import CentralFlow, Motion, kinetics
from gradnb.move.flows.complementarity import oscillation, pack, unpack
from gradnb.move.flows.midpoint import midpoint
from gradnb.runs.laws import check_stepper
from gradnb.models import build_model
from gradnb.problem import Problem
from gradnb.move.rules.adam import Adam
from gradnb.move.rules.gd import GD
from gradnb.move.rules.momentum import Momentum
from gradnb.move.rules.rmsprop import RMSProp
from gradnb.runs import Spec, Store
from gradnb.move.steppers import Descent, trajectory
from gradnb.ground.streams import Stream
from gradnb.runs.training import train

D = torch.float64


class Landscape(nn.Module):
    "A loss given as a function of θ, the same for every row."
    def __init__(self, fn, theta0):
        super().__init__()
        self.fn, self.theta = fn, nn.Parameter(torch.tensor(theta0, dtype=D))

    def forward(self, rows): return self.fn(self.theta).expand(len(rows))


def landscape(fn, *theta0):
    one = torch.zeros(1, 1, dtype=D)
    return Problem(Landscape(fn, theta0), lambda out, y: out, Dataset(one, one, one, one, None, "landscape"))


def two_valleys(t):
    "½ x₁²y₁ + ½ x₂²y₂ − a₁y₁ − a₂y₂: each curvature is held by σᵢ² = 2aᵢ."
    x1, x2, y1, y2 = t
    return x1**2 * y1 / 2 + x2**2 * y2 / 2 - 1. * y1 - .7 * y2


def network(name="chebyshev-4-20"):
    data = load_dataset(name)
    return Problem(build_model("regression", data).double(), "mse", data)


def run(problem, stepper, steps, **more):
    return list(islice(trajectory(problem, stepper, **more), steps))


@pytest.mark.parametrize("rule", [GD(.1), Momentum(.01, .5), Momentum(.01, .5, nesterov=True)], ids=repr)
def test_two_degenerate_curvatures_are_held_at_the_limit(rule):
    "Σ has the closed form diag(2a) whatever the rule, once both curvatures are at c/η; the predicted loss then stands still."
    limit = kinetics(rule).limit / rule.lr
    problem = landscape(two_valleys, 0., 0., limit - .05, limit - .02)
    last = run(problem, CentralFlow(rule), 12)[-1]
    U = last.rule.vectors[:, :2] * rule.lr**.5
    sigma = U @ last.rule.X @ U.T
    assert torch.allclose(sigma, torch.diag(torch.tensor([2., 1.4, 0., 0.], dtype=D)), atol=1e-4)
    assert torch.allclose(last.theta[2:], torch.full((2,), limit, dtype=D), rtol=1e-4)
    assert last.rule.added_loss == pytest.approx(float((sigma.diagonal()[:2] * limit).sum()) / 2, rel=1e-4)
    assert last.rule.added_grad_sq == pytest.approx(float((sigma.diagonal()[:2] * limit**2).sum()), rel=1e-4)
    assert last.rule.residual < 1e-7


def test_a_curvature_that_falls_by_itself_is_let_go():
    problem = landscape(lambda t: t[0]**2 * t[1] / 2 + .5 * t[1]**2, 0., 19.99)        # y falls
    states = run(problem, CentralFlow(GD(.1)), 3)
    assert float(states[0].rule.X.abs().sum()) == 0 and states[-1].rule.values[0] < 2
    assert states[-1].theta[1].item() == pytest.approx(19.99 * (1 - .1 / 4)**8, rel=1e-9)     # Euler steps of plain flow


@pytest.mark.parametrize("flow", [CentralFlow(RMSProp(1e-3), start=600), CentralFlow(Adam(3e-3, 0., .99), start=620)], ids=repr)
def test_complementarity_holds_at_the_end_of_a_step(flow):
    "Slacks from dense matrices after an Euler step of length h: they and X violate the conditions by O(h²)."
    problem, law = network(), kinetics(flow.rule)
    before = run(problem, flow, flow.start + 6)[-1]
    hessian = torch.func.hessian(lambda t: problem.piece(t, problem.dataset.x, problem.dataset.y, None, problem.n))
    errors = []
    for h in (.5, .25):
        c = Motion(problem, before.theta, before.rule, flow, Stream(), h).state
        P, later = law.preconditioner(c.nu, c.time), law.preconditioner(c.nu + h * c.drift, c.time + h)
        U = c.vectors[:, :len(c.X)] / P.sqrt()[:, None]
        assert torch.allclose(U.T @ (P[:, None] * U), torch.eye(len(c.X), dtype=D), atol=1e-8)
        assert torch.allclose(U.T @ hessian(before.theta) @ U, torch.diag(c.values[:len(c.X)]), atol=1e-6)
        S = U.T @ (law.limit * torch.diag(later) - hessian(before.theta + h * c.velocity)) @ U
        still = U.T @ (law.limit * torch.diag(P) - hessian(before.theta)) @ U
        errors.append(float((c.X @ S).norm() / c.X.norm()))
        assert len(c.X) == 2 and float(torch.linalg.eigvalsh(S)[0]) > -2 * errors[-1]
        assert c.added_loss == pytest.approx(float((hessian(before.theta) * (U @ c.X @ U.T)).sum()) / 2, rel=1e-5)
        H = hessian(before.theta)
        assert c.added_grad_sq == pytest.approx(float((H @ U @ c.X @ U.T @ H).trace()), rel=1e-5)
    assert 0 < errors[1] < errors[0] / 3 and errors[0] < .01 and float(still.abs().max()) < .05


def test_complementarity_of_a_known_pair():
    "From X and S with X S = 0 the problem is built backwards: A = S − B[X]."
    for seed in range(8):
        k = 2 + seed % 4
        g = (Stream(seed) / "pair").generator()
        Q = torch.linalg.qr(torch.randn(k, k, generator=g, dtype=D))[0]
        d = torch.rand(k, generator=g, dtype=D) + .1
        on = torch.arange(k) < 1 + seed % k
        X, S = Q @ torch.diag(d * on) @ Q.T, Q @ torch.diag(d * ~on) @ Q.T
        M = torch.randn(k * (k + 1) // 2, k * (k + 1) // 2, generator=g, dtype=D)
        B = M @ M.T + .1 * torch.eye(len(M), dtype=D)
        found = oscillation(S - unpack(B @ pack(X)), B)
        assert torch.allclose(found.X, X, atol=1e-5) and torch.allclose(found.slack, S, atol=1e-5) and found.residual < 1e-7


def test_third_derivatives_share_their_graphs(monkeypatch):
    problem, calls = network(), 0
    theta = problem.theta0
    U = torch.linalg.qr(torch.randn(problem.p, 3, generator=Stream(1).generator(), dtype=D))[0]
    problem.hvp(theta, U[:, 0])                            # what is tried out before the first product
    point = problem.at(theta)
    point.grad
    grad = torch.autograd.grad

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return grad(*args, **kwargs)
    monkeypatch.setattr(torch.autograd, "grad", counted)
    D_ = point.curvature_grads(U)
    assert calls == 3 + 6
    for i in range(3):
        for j in range(3): assert torch.allclose(D_[i, j], problem.curvature_grad(theta, U[:, i], U[:, j]), atol=1e-10)


@pytest.mark.slow                                       # RMSProp's is a lesson of the notebook too
@pytest.mark.parametrize("rule, start, steps", [(RMSProp(1e-3), 600, 120), (Adam(3e-3, 0., .99), 620, 100)], ids=str)
def test_the_average_run_follows_the_central_flow(rule, start, steps):
    "Acceptance: distance below a fifth of the stable flow's, and the time averages as predicted."
    problem = network()
    down = run(problem, Descent(rule), start + steps + 2)
    flows = [run(problem, CentralFlow(rule, critical=c, start=start), start + steps)[start:] for c in (.975, None)]
    middle = midpoint(*(s.theta for s in down[start + steps - 2:start + steps + 1]))
    central, stable = ((f[-1].theta - middle).norm().item() for f in flows)
    assert central < .2 * stable
    late = range(steps // 2, steps)
    mean = lambda value: sum(float(value(k)) for k in late) / len(late)
    measured = mean(lambda k: down[start + k].loss)
    predicted = mean(lambda k: flows[0][k].loss + flows[0][k].rule.added_loss)
    assert abs(predicted - measured) < .3 * abs(measured - mean(lambda k: flows[1][k].loss))
    norms = mean(lambda k: down[start + k].grad.square().sum())
    assert mean(lambda k: flows[0][k].grad.square().sum() + flows[0][k].rule.added_grad_sq) == pytest.approx(norms, rel=.25)
    def swing(k):
        "x: what of the run's oscillation lies along the critical directions, δ = Ux, UᵀPU = I; the flow predicts the mean of xxᵀ."
        c, delta = flows[0][k].rule, down[start + k].theta - midpoint(*(down[start + k + i].theta for i in (-1, 0, 1)))
        return c.vectors[:, :len(c.X)].T @ (kinetics(rule).preconditioner(c.nu, c.time).sqrt() * delta)
    assert mean(lambda k: swing(k).square().sum()) == pytest.approx(mean(lambda k: flows[0][k].rule.X.trace()), rel=.2)
    assert float(flows[0][-1].rule.values[0]) == pytest.approx(2, abs=2e-3)
    assert max(s.rule.residual for s in flows[0]) < 1e-6


def test_a_stored_central_flow_goes_on_bitwise(tmp_path):
    spec = Spec("chebyshev-4-20", "regression", "mse", CentralFlow(Adam(3e-3, 0., .9), 2, start=300), 310, dtype="float64")
    whole = Store(tmp_path).run(spec)
    assert Spec.from_json(spec.to_json()) == spec and whole.spec.fields["rule.rule"] == "Adam"
    problem, stepper, _ = spec.build()
    for k in (299, 303):
        half, _ = train(problem, stepper, k, progress=False)
        assert torch.equal(train(problem, stepper, 310, state=half, progress=False)[0].theta, whole.theta)


@pytest.mark.parametrize("rule", [GD(.3), Momentum(.03, .9), RMSProp(1e-3), Adam(1e-3, .9)], ids=repr)
def test_central_flows_keep_the_laws(rule):
    for flow in (CentralFlow(rule), CentralFlow(rule, 2, None), CentralFlow(rule, start=2)): check_stepper(flow)


def test_at_the_edge_they_keep_the_laws_too():
    problem = landscape(two_valleys, 0., 0., 19.95, 19.98)
    check_stepper(CentralFlow(GD(.1)), problem)


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
def test_chunks_and_dtypes_agree(dtype, close):
    "At the edge, with one critical direction: the same oscillation from chunks of 60, and from float32."
    data = load_dataset("digits-200")
    make = lambda dtype, chunk: Problem(build_model("fc-tanh:width=8", data).to(dtype), "mse", data, chunk)
    flow = CentralFlow(GD(.3), start=60)
    truth, found = (run(make(*a), flow, 64)[-1].rule for a in ((D, None), (dtype, 60)))
    assert found.X.shape == (1, 1) and float(found.X) == pytest.approx(float(truth.X), rel=close)
    assert found.added_loss == pytest.approx(truth.added_loss, rel=close)
