"An estimator around a torch optimizer: the run that it would be inside, what it leaves alone, and how it resumes."
import copy
import io
from itertools import islice

import pytest
import torch
from torch import nn

from gradnb import optim
from gradnb.data import load_dataset
from gradnb.move.faces.estimated import Estimated
from gradnb.move.estimators.minibatch import FullBatch, MiniBatch
from gradnb.move.estimators.sam import SAM
from gradnb.models import build_model
from gradnb.problem import Problem
from gradnb.move.rules.fromtorch import FromTorch
from gradnb.move.rules.lamb import LAMB
from gradnb.move.steppers import Descent, trajectory


def start(dtype=torch.float64):
    digits = load_dataset("digits-200").to(dtype=dtype)
    net = build_model("fc-tanh:width=10,depth=1", digits)
    return net, Problem(net, "ce", digits)


@pytest.mark.parametrize("estimator", [FullBatch(), MiniBatch(16), SAM(.1, MiniBatch(16))], ids=repr)
@pytest.mark.parametrize("seed", [0, 3])
def test_it_is_the_run_inside(estimator, seed):
    net, problem = start()
    run = Estimated(torch.optim.Adam(net.parameters(), lr=.01), problem, estimator, seed)
    before = torch.get_rng_state()
    for state in islice(trajectory(problem, Descent(FromTorch(torch.optim.Adam, lr=.01), estimator), seed=seed), 8):
        assert torch.equal(state.theta, run.theta) and torch.equal(state.loss, run.step())
    assert torch.equal(before, torch.get_rng_state())


def test_with_a_face_and_a_scheduler():
    net, problem = start()
    optimizer = optim.LAMB(net.parameters(), lr=.02, foreach=True)
    run, scheduler = Estimated(optimizer, problem, MiniBatch(16)), torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.)
    for state in islice(trajectory(problem, Descent(LAMB(.02), MiniBatch(16))), 8):
        assert torch.equal(state.theta, run.theta)
        run.step()
        scheduler.step()


def test_dropout_and_batchnorm_as_inside():
    digits = load_dataset("digits-200").to(dtype=torch.float64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(.3), nn.Linear(12, 10)).double()
    inner, outer = Problem(copy.deepcopy(net), "ce", digits), Problem(net, "ce", digits)
    run = Estimated(torch.optim.SGD(net.parameters(), lr=.1), outer, MiniBatch(16))
    for state in islice(trajectory(inner, Descent(FromTorch(torch.optim.SGD, lr=.1), MiniBatch(16))), 5):
        assert torch.equal(state.theta, run.theta)
        assert state.buffers and all(torch.equal(b, net.get_buffer(k)) for k, b in state.buffers.items())
        run.step()
    assert net[2].num_batches_tracked == 5


def test_gradients_of_the_loop_outside_stay():
    net, problem = start()
    run = Estimated(torch.optim.SGD(net.parameters(), lr=.1), problem, MiniBatch(16))
    first, *rest = net.parameters()
    first.grad = torch.ones_like(first)
    run.step()
    assert torch.equal(first.grad, torch.ones_like(first)) and all(p.grad is None for p in rest)


def test_it_resumes_from_a_file():
    (net, problem), (twin_net, twin_problem) = start(), start()
    run = Estimated(optim.LAMB(net.parameters(), lr=.02), problem, MiniBatch(16), seed=5)
    for _ in range(4): run.step()
    file = io.BytesIO()
    torch.save((run.state_dict(), net.state_dict()), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    twin_net.load_state_dict(weights)
    twin = Estimated(optim.LAMB(twin_net.parameters()), twin_problem, MiniBatch(16))
    twin.load_state_dict(state)
    for _ in range(3): assert torch.equal(run.step(), twin.step())
    assert torch.equal(run.theta, twin.theta)
