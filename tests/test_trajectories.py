"""Projections against dense matrices and exact distances, crossings against paper, self-stabilization against finite differences."""
from itertools import islice

import numpy as np
import pytest
import torch

from gradnb.cli import main
from gradnb.data import load_dataset
from gradnb.move.flows.gradient import GradientFlow
from gradnb.move.flows.integrators import DormandPrince
from gradnb.models import build_model
from gradnb.problem import Problem
from gradnb.move.rules.gd import GD
from gradnb.runs import Store
from gradnb.measure.selfstabilization import self_stabilization
from gradnb.move.steppers import Descent, trajectory
from gradnb.ground.streams import Stream
from gradnb.ground.traces import Trace, as_row
from gradnb.measure.trajectories import Projection, first_crossing, projected_distance


@pytest.mark.parametrize("groups, size", [(1, 8), (4, 8), (3, 30)])
def test_a_projection_is_a_sparse_matrix_with_unit_columns(groups, size):
    "Column by column: r entries of ±1/√r, one in each group; and the map is the product with that matrix."
    p, R = 40, Projection(size, Stream(2), groups)
    dense = torch.stack([R(e) for e in torch.eye(p)], 1)
    assert torch.equal((dense != 0).reshape(groups, size // groups, p).sum(1), torch.ones(groups, p, dtype=torch.int64))
    assert torch.allclose(dense[dense != 0].abs(), torch.tensor(groups**-.5, dtype=torch.float64))
    x = torch.randn(p, generator=Stream(1).generator(), dtype=torch.float64)
    assert torch.allclose(R(x), dense @ x, atol=1e-12)
    assert torch.equal(R(x), Projection(size, Stream(2), groups)(x)) and not torch.equal(R(x), Projection(size, Stream(3), groups)(x))


@pytest.mark.parametrize("spread", ["dense", "sparse"])
def test_squared_lengths_are_unbiased_and_as_sure_as_said(spread):
    x = torch.randn(3000, generator=Stream(1).generator(), dtype=torch.float64)
    if spread == "sparse": x[5:] = 0
    size, draws = 64, 300
    squares = np.array([float(Projection(size, Stream(i) / "R")(x).square().sum() / x.square().sum()) for i in range(draws)])
    assert abs(squares.mean() - 1) < 4 * squares.std() / draws**.5
    assert squares.std() < 1.2 * (2 / size)**.5
    d, error = projected_distance(np.zeros((2, size)), np.ones((2, size)))
    assert np.allclose(d, size**.5) and np.allclose(error / d, (2 * size)**-.5)


def test_crossings():
    steps, values = np.array([0, 5, 10, 20]), np.array([1., 3., 2.5, 6.])
    assert first_crossing(steps, values, 2.)[:1] == (2.5,) and first_crossing(steps, values, 2.)[2:] == (0., 5.)
    assert first_crossing(steps, values, np.array([2., 4., 4., 4.])).value == pytest.approx(10 + 10 * 1.5 / 3.5)
    assert first_crossing(steps, values, 5.5, 1.).high == np.inf
    assert first_crossing(steps, values, 7.) is None and first_crossing(steps[:0], values[:0], 1.) is None


def network():
    data = load_dataset("chebyshev-4-20")
    return Problem(build_model("regression", data).double(), "mse", data)


def test_alpha_and_beta_by_finite_differences():
    "∇S by differences of the top eigenvalue of dense Hessians along −∇L and along ∇S itself, both across u."
    problem = network()
    theta = next(islice(trajectory(problem, Descent(GD(.2))), 300, None)).theta
    found = self_stabilization(problem, theta, tol=1e-10)
    hessian = torch.func.hessian(lambda t: problem.piece(t, problem.dataset.x, problem.dataset.y, None, problem.n))
    top = lambda t: torch.linalg.eigvalsh(hessian(t))[-1]
    slope = lambda d: float((top(theta + 1e-5 * d) - top(theta - 1e-5 * d)) / 2e-5)
    across = lambda v: v - (v @ found.vector) * found.vector
    assert found.sharpness == pytest.approx(float(top(theta)), rel=1e-8)
    assert slope(-across(problem.grad_and_loss(theta)[0])) == pytest.approx(found.alpha, rel=1e-4)
    rise = across(problem.curvature_grad(theta, found.vector, found.vector))
    assert slope(rise) == pytest.approx(found.beta, rel=1e-4)


def test_alpha_is_the_rate_of_progressive_sharpening():
    problem = network()
    near = list(islice(trajectory(problem, GradientFlow(.02, DormandPrince(1e-10))), 401))[-3:]
    before, now, after = (self_stabilization(problem, s.theta, tol=1e-10) for s in near)
    assert (after.sharpness - before.sharpness) / .04 == pytest.approx(now.alpha, rel=.02)


def test_gradnb_flow(tmp_path, capsys):
    line = "flow --dataset chebyshev-3-20 --model regression --loss mse --dtype float64".split()
    assert main([*line, *f"--tick 0.5 --max-time 3 --method dormandprince:tol=1e-8 --probe flow --store {tmp_path}".split()]) == 0
    run, = Store(tmp_path).list(rule="GradientFlow")
    assert (run.spec.steps, run.spec.rule) == (6, GradientFlow(.5, DormandPrince(1e-8)))
    assert main([*line, *f"--lr 0.05 --central momentum:beta=0.5 --start 3 --stable --steps 5 --store {tmp_path}".split()]) == 0
    run, = Store(tmp_path).list(rule="CentralFlow")
    assert run.spec.fields["rule.rule.beta"] == .5 and run.spec.rule.critical is None and run.status == "finished"
    for words, said in (("--lr 0.1 --start 3", "--central"), ("--lr 0.1 --central gd --method rk4", "gradient flow"),
                        ("--lr 0.1 --central lamb", "no central flow"), ("--lr 0.1 --max-time -1", "positive"),
                        ("--lr 0.1 --max-time inf", "finite"), ("--lr 0.1 --max-time 1 --steps 9", "one of them"),
                        ("--lr 0.1 --max-time 0.25", "no multiple"), ("--lr 0.1 --probe update_radius", "is a flow"),
                        ("--lr 0.1 --probe preconditioned_sharpness", "is a flow"), ("--lr 0.1 --acc-goal 0.9", "no classes")):
        assert main([*line, *words.split(), "--store", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 10, 30, 51])
def test_any_number_of_projections_keeps_distances(size):
    ends = [torch.zeros(400, dtype=torch.float64), torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)]
    square = [projected_distance(*(Projection(size, Stream(i))(v).numpy() for v in ends))[0]**2 for i in range(300)]
    assert np.mean(square) == pytest.approx(ends[1].square().sum().item(), abs=4 * np.std(square) / 300**.5)


def test_a_column_that_is_called_step_is_not_the_step():
    trace = Trace("mine")
    for k in (3, 5): trace.append(k, as_row({"step": -k, "value": 2.}))
    assert trace.frame().to_dict("list") == {"step": [3, 5], "mine.step": [-3, -5], "value": [2, 2]}
