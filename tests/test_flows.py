"""Flows against closed forms, SciPy and torchdiffeq; their order, their laws, and their runs in a store."""
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from gradnb.data import load_dataset
from gradnb.move.flows.central import CentralFlow
from gradnb.move.flows.gradient import GradientFlow
from gradnb.move.flows.integrators import RK4, Chebyshev, DormandPrince
from gradnb.runs.laws import check_stepper
from gradnb.models import build_model
from gradnb.measure.probes.view import PROBES
from gradnb.problem import Problem, Quadratic
from gradnb.ground.roles import FLOWS, RULES
from gradnb.move.rules.gd import GD
from gradnb.move.rules.momentum import Momentum
from gradnb.runs import Spec, Store
from gradnb.move.steppers import Descent, trajectory
from gradnb.ground.streams import Stream
from gradnb.runs.training import train

METHODS = [RK4(), RK4(2.), RK4(.5, .1), DormandPrince(), DormandPrince(1e-3), Chebyshev(), Chebyshev(1e-6, 20)]


def small(dtype=torch.float64, model="regression"):
    "A network of 300 parameters."
    data = load_dataset("chebyshev-3-20")
    return Problem(build_model(model, data).to(dtype), "mse", data)


def last(problem, stepper, steps):
    return next(islice(trajectory(problem, stepper), steps, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_flow_keeps_the_laws(method, dtype):
    check_stepper(GradientFlow(.3, method, measure_every=2))
    check_stepper(GradientFlow(.1, method, measure_every=3), small(dtype))


@pytest.mark.parametrize("lr", [.05, 1., 20.])
@pytest.mark.parametrize("method, close", [(RK4(.5), 3e-4), (DormandPrince(1e-9), 1e-7), (Chebyshev(1e-5), 2e-3)], ids=str)
def test_the_matrix_exponential(method, close, lr):
    "Relative to the start, on a quadratic with eigenvalues over three decades and one that is negative."
    values = torch.cat([torch.tensor([-.02], dtype=torch.float64), torch.logspace(-2, 1, 12, dtype=torch.float64)])
    Q = torch.linalg.qr(torch.randn(13, 13, generator=Stream(3).generator(), dtype=torch.float64))[0]
    H = Q @ torch.diag(values) @ Q.T
    problem = Quadratic((H + H.T) / 2)
    for state in islice(trajectory(problem, GradientFlow(lr, method)), 6):
        truth = torch.linalg.matrix_exp(-lr * state.step * problem.H) @ problem.theta0
        assert (state.theta - truth).norm() <= close * problem.theta0.norm()


def test_halving_the_step_divides_the_error_by_sixteen():
    problem = small()
    truth = last(problem, GradientFlow(1., DormandPrince(1e-12)), 4).theta
    errors = [(last(problem, GradientFlow(1., RK4(a)), 4).theta - truth).norm().item() for a in (.5, .25, .125)]
    assert errors[0] / errors[1] == pytest.approx(16, rel=.25) and errors[1] / errors[2] == pytest.approx(16, rel=.25)


@pytest.mark.parametrize("method, order", [(DormandPrince(1e-3), 5), (Chebyshev(1e-3), 2)], ids=str)
def test_local_errors_have_their_order(method, order):
    "A step's error goes like h^(order + 1), and its estimate is no smaller: ẏ = −y³ has y(h) = y/√(1 + 2hy²)."
    y, errors = torch.tensor([.5, 1., 1.5], dtype=torch.float64), []
    field = lambda y: -y**3
    for h in (.02, .01):
        new, f_new, estimate = method.attempt(field, y, field(y), h, 4 / h)
        errors.append((new - y / (1 + 2 * h * y**2).sqrt()).norm().item())
        assert torch.equal(f_new, field(new)) and estimate.norm() > errors[-1]
    assert 2**(order + .8) < errors[0] / errors[1] < 2**(order + 2)


def test_a_first_step_that_is_far_too_long_is_cut_at_once():
    "A hundredfold too long: twice rejected, and the step found then is not lost to the short rest of the duration."
    rates = torch.linspace(1, 10, 30, dtype=torch.float64)
    first = DormandPrince(1e-6).advance(lambda y: -rates * y, torch.ones_like(rates), -rates, 10., 10., 0.)
    assert first.rejected <= 2 and torch.allclose(first.y, torch.exp(-10 * rates), atol=1e-5)
    again = DormandPrince(1e-6).advance(lambda y: -rates * y, first.y, -rates * first.y, 10., first.step, 0.)
    assert again.rejected == 0 and first.step > .2


def test_peers_agree():
    "SciPy and torchdiffeq, both at a far smaller tolerance."
    problem, time = small(model="fc-tanh:width=8"), 3.
    slope = lambda t, y: -problem.grad_and_loss(torch.as_tensor(y))[0]
    scipys = solve_ivp(lambda t, y: slope(t, y).numpy(), (0, time), problem.theta0.numpy(), "DOP853", rtol=1e-11, atol=1e-11)
    ours = last(problem, GradientFlow(.1, DormandPrince(1e-10)), 30)
    assert np.abs(ours.theta.numpy() - scipys.y[:, -1]).max() < 1e-8
    odeint = pytest.importorskip("torchdiffeq").odeint
    theirs = odeint(slope, problem.theta0, torch.tensor([0., time], dtype=torch.float64), rtol=1e-10, atol=1e-10)[-1]
    assert (ours.theta - theirs).abs().max() < 1e-8


def test_gradients_are_counted_and_shared():
    "A method that ends with an evaluation hands it on: the same gradients in ten ticks as in one, but for the landing."
    problem, calls = small(), 0
    grad_and_loss = problem.grad_and_loss

    def counted(*args):
        nonlocal calls
        calls += 1
        return grad_and_loss(*args)
    problem.grad_and_loss = counted
    for method, each in ((RK4(1e6, .05), 8), (DormandPrince(1e-2), 6), (Chebyshev(1e-2), 2)):
        calls = 0
        state = last(problem, GradientFlow(.1, method), 10)
        assert state.rule.grads == calls == 10 * each + 1 and state.rule.rejected == 0
        assert torch.equal(state.grad, grad_and_loss(state.theta)[0]) and torch.equal(state.loss, grad_and_loss(state.theta)[1])


def test_the_sharpness_is_tracked():
    problem = small()
    for state in islice(trajectory(problem, GradientFlow(.5, measure_every=4)), 0, 40, 4):
        H = torch.func.hessian(lambda t: problem.piece(t, problem.dataset.x, problem.dataset.y, None, problem.n))(state.theta)
        assert state.rule.measured == state.step
        assert torch.linalg.eigvalsh(H)[-1].item() == pytest.approx(state.rule.sharpness, rel=.04)
    assert state.rule.products < 10 * 12


def test_small_steps_of_descent_approach_the_flow():
    problem = small()
    flow = last(problem, GradientFlow(1., DormandPrince(1e-9)), 2).theta
    gaps = [(last(problem, Descent(GD(1 / n)), 2 * n).theta - flow).norm().item() for n in (20, 40, 80)]
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=.1) and gaps[1] / gaps[2] == pytest.approx(2, rel=.05)


def test_a_flow_is_no_rule():
    assert "gradientflow" in FLOWS and "gradientflow" not in RULES and "gd" not in FLOWS
    with pytest.raises(ValueError, match="all examples"):
        from gradnb.move.estimators.minibatch import MiniBatch
        Spec("chebyshev-3-20", "regression", "mse", GradientFlow(.1), 5, MiniBatch(4))


@pytest.mark.parametrize("stepper", [GradientFlow(.1), CentralFlow(GD(.1)), CentralFlow(Momentum(.01))], ids=repr)
def test_what_is_measured_along_a_step_is_measured_along_a_flow(stepper):
    "The flow's own displacement; and a gradient flow has no batches but the whole."
    words = "critical_sharpness", "directional_sharpness", "batch_sharpness:draws=2", "interaction_sharpness:draws=2", "stabilization"
    _, traces = train(small(), stepper, 1, [PROBES.build(w) for w in words], progress=False)
    full, edge = traces["directional_sharpness"].values, traces["batch_sharpness"].columns["threshold"]
    assert np.allclose(traces["batch_sharpness"].values, full[:1]) and np.allclose(traces["interaction_sharpness"].values, full[:1])
    assert np.isfinite(traces["critical_sharpness"].values).all() and np.isfinite(edge).all() == (stepper == CentralFlow(GD(.1)))


def test_noise_is_refused():
    data = load_dataset("chebyshev-3-20")
    noisy = torch.nn.Sequential(torch.nn.Linear(1, 5), torch.nn.Dropout(.5), torch.nn.Linear(5, 1))
    with pytest.raises(ValueError, match="frozen"): last(Problem(noisy, "mse", data), GradientFlow(.1), 0)


@pytest.mark.parametrize("method", [RK4(), DormandPrince(), Chebyshev()], ids=repr)
def test_a_stored_flow_goes_on_bitwise(tmp_path, method):
    spec = Spec("chebyshev-3-20", "regression", "mse", GradientFlow(.2, method, 3), 12, probes="sharpness:every=4", dtype="float64")
    assert Spec.from_json(spec.to_json()) == spec and spec.fields["rule.method"] == type(method).__name__
    whole = Store(tmp_path / "a").run(spec)
    problem, stepper, _ = spec.build()
    half, _ = train(problem, stepper, 7, progress=False)
    rest, traces = train(problem, stepper, 12, state=half, progress=False)
    assert torch.equal(whole.theta, rest.theta)
    assert whole.traces["loss"].values[-1] == traces["loss"].values[-1]
    assert Store(tmp_path / "a").open(spec.hash).spec.rule == replace(spec.rule)


def test_a_goal_stops_a_flow():
    state, traces = train(small(), GradientFlow(1.), 1000, loss_goal=.2, goal_every=1, progress=False)
    assert traces.outcome.kind == "goal" and state.loss < .2 < traces["loss"].values[-2]


def test_a_lost_field_is_said():
    problem = Quadratic(torch.eye(2, dtype=torch.float64))
    field = lambda theta: (theta * float("nan"), theta.sum())
    problem.grad_and_loss = field
    with pytest.raises(RuntimeError, match="not finite"): last(problem, GradientFlow(.1, DormandPrince()), 1)


@pytest.mark.parametrize("method", [RK4(), DormandPrince()], ids=repr)
def test_batch_statistics_settle_once_a_unit(method):
    data, net = load_dataset("digits-100"), torch.nn
    torch_net = net.Sequential(net.Flatten(), net.Linear(64, 6), net.Tanh(), net.BatchNorm1d(6), net.Linear(6, 10)).double()
    problem = Problem(torch_net, "mse", data)
    check_stepper(GradientFlow(.1, method), problem)
    assert last(problem, GradientFlow(.1, method), 5).buffers["3.num_batches_tracked"] == 5
