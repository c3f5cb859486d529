"Dropout and BatchNorm: training agrees with a plain torch loop, resumes bitwise, and is not disturbed by measuring."
import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from gradnb import Batch, Descent, FullBatch, GD, MiniBatch, Momentum, PROBES, Problem, Stream, build_model, load_dataset, train, trajectory
from gradnb.runs.laws import check_stepper

DIGITS = load_dataset("digits-200")


def network(dropout=0.3, batchnorm=True, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12) if batchnorm else nn.Identity(), nn.Tanh(),
                             nn.Dropout(dropout), nn.Linear(12, 10)).to(dtype)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_batchnorm_trains_as_a_plain_loop():
    plain = network(dropout=0.)
    problem = Problem(copy.deepcopy(plain), "ce", DIGITS)
    opt = torch.optim.SGD(plain.parameters(), lr=.1, momentum=.9)
    for state, _ in zip(trajectory(problem, Descent(Momentum(.1, .9), MiniBatch(20))), range(8)):
        idx = Descent(GD(.1), MiniBatch(20)).estimator.sample((), problem, Stream(0) / "train" / state.step / "batch").idx
        plain.eval()
        with torch.no_grad():
            expected = nn.functional.cross_entropy(plain(DIGITS.x_test.double()), DIGITS.y_test)
        torch.testing.assert_close(torch.tensor(problem.frozen(state.buffers).evaluate(state.theta, "test").loss).double(), expected)
        assert torch.equal(state.buffers["2.running_var"], plain[2].running_var)
        assert state.buffers["2.num_batches_tracked"] == state.step
        plain.train()
        opt.zero_grad()
        nn.functional.cross_entropy(plain(problem.dataset.x[idx]), problem.dataset.y[idx]).backward()
        opt.step()


def test_the_module_and_the_generator_stay_as_they_were():
    module, rng = network(), torch.get_rng_state()
    before = copy.deepcopy(module.state_dict())
    train(Problem(module, "ce", DIGITS, chunk_size=32), Descent(GD(.1), MiniBatch(40)), 5, [PROBES.build("sharpness:every=2")], progress=False)
    assert same(before, module.state_dict()) and torch.equal(rng, torch.get_rng_state()) and module.training


def test_probes_do_not_disturb_and_runs_resume_bitwise():
    problem, stepper = Problem(network(), "ce", DIGITS), Descent(Momentum(.1, .9), MiniBatch(30))
    probes = [PROBES.build(p) for p in ("sharpness:every=3", "sharpness:every=3,frozen=true", "test:every=2")]
    alone, _ = train(problem, stepper, 9, progress=False)
    measured, traces = train(problem, stepper, 9, probes, progress=False)
    half, _ = train(problem, stepper, 5, progress=False)
    resumed, _ = train(problem, stepper, 9, state=half, progress=False)
    for other in (measured, resumed):
        assert torch.equal(alone.theta, other.theta) and same(alone.buffers, other.buffers) and same(alone.settled, other.settled)
    assert set(traces) == {"loss", "sharpness", "frozen_sharpness", "test"}
    assert not (traces["sharpness"].columns["value"] == traces["frozen_sharpness"].columns["value"]).any()


def test_two_rules_see_the_same_masks():
    problem = Problem(network(batchnorm=False), "ce", DIGITS)
    first = [next(trajectory(problem, Descent(rule, FullBatch()))) for rule in (GD(.1), Momentum(.3, .9))]
    assert torch.equal(first[0].grad, first[1].grad)
    assert not torch.equal(first[0].grad, problem.grad_and_loss(problem.theta0)[0])


def test_noise_averages_to_no_bias_of_a_linear_output():
    "E over masks of a linear network's outputs is the network without Dropout."
    module = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(64, 10)).double()
    problem = Problem(module, "mse", DIGITS)
    outs = torch.stack([problem.outputs(problem.theta0, problem.dataset.x[:4], Stream(k)) for k in range(2000)])
    z = (outs.mean(0) - problem.outputs(problem.theta0, problem.dataset.x[:4])) / (outs.std(0) / 2000**.5)
    assert z.square().mean() < 1.6 and z.abs().max() < 4.5


@pytest.mark.parametrize("frozen", [False, True])
def test_curvature_in_both_modes_is_the_dense_hessian(frozen):
    problem = Problem(network(), "ce", DIGITS)
    q = problem.frozen(problem.settle(problem.theta0, problem.buffers)) if frozen else problem
    module = network(dropout=0.)
    if frozen:
        with torch.no_grad(): module(problem.dataset.x)
        module.eval()
    names = problem.layout.names

    def loss(t): return nn.functional.cross_entropy(torch.func.functional_call(module, problem.layout.named(t), (problem.dataset.x,)),
                                                    problem.dataset.y)
    v = torch.randn(problem.p, generator=Stream(5).generator(), dtype=torch.float64)
    _, expected = torch.autograd.functional.vhp(loss, problem.theta0, v)
    torch.testing.assert_close(q.hvp(problem.theta0, v), expected)
    assert names == tuple(n for n, _ in module.named_parameters())


def test_ghost_batches_are_chunks():
    "Chunks normalise by their own statistics, and move the running ones in turn."
    problem, module = Problem(network(dropout=0.), "ce", DIGITS, chunk_size=50), network(dropout=0.)
    losses = [nn.functional.cross_entropy(module(x), y) for x, y in zip(problem.dataset.x.split(50), problem.dataset.y.split(50))]
    torch.testing.assert_close(problem.loss(problem.theta0), torch.stack(losses).mean().detach())
    assert same(problem.settle(problem.theta0, problem.buffers), dict(module.named_buffers()))


def test_laws_hold_with_noise():
    problem = Problem(network(), "ce", DIGITS)
    check_stepper(Descent(GD(.05), MiniBatch(16)), problem)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_stream_is_a_mask(a, b):
    problem = Problem(network(batchnorm=False), "ce", DIGITS)
    loss = [float(problem.loss(problem.theta0, Batch(torch.arange(20), noise=Stream(s)))) for s in (a, b, a)]
    assert loss[0] == loss[2] and (loss[0] == loss[1]) == (a == b)


def test_a_single_example_of_a_coupled_network_is_refused_and_frozen_it_is_not():
    problem = Problem(network(), "ce", DIGITS)
    with pytest.raises(TypeError, match="problem.frozen"): problem.example_grads(problem.theta0)
    assert problem.frozen().example_grads(problem.theta0, Batch(torch.arange(3))).shape == (3, problem.p)


def test_augmentation_is_the_batchs_own_whatever_the_chunks():
    from dataclasses import replace
    data = replace(DIGITS, augment=lambda x, gen: x + torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x))
    whole, parts = (Problem(network(0., False), "ce", data, chunk_size=c) for c in (None, 7))
    batch = Batch(torch.arange(30), noise=Stream(3))
    torch.testing.assert_close(whole.loss(whole.theta0, batch), parts.loss(parts.theta0, batch))
    assert whole.loss(whole.theta0, batch) != whole.loss(whole.theta0, batch._replace(noise=None))
    assert torch.equal(whole.frozen().loss(whole.theta0, batch), whole.loss(whole.theta0, batch._replace(noise=None)))


def test_third_derivatives_that_torch_gets_wrong_are_refused():
    problem = Problem(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LayerNorm(4), nn.Linear(4, 10)), "ce", DIGITS)
    with pytest.raises(TypeError, match="gradnb.models.norms"): problem.curvature_grad(problem.theta0, problem.theta0, problem.theta0)


def test_layers_of_a_frozen_network_see_its_running_statistics():
    data = load_dataset("digits-40")
    problem = Problem(build_model("fc-bn-tanh:width=8,depth=1", data).double(), "ce", data)
    buffers = {k: b + 0.7 if b.is_floating_point() else b for k, b in problem.buffers.items()}
    frozen, one = problem.frozen(buffers), lambda t, i: frozen.piece(t, *next(frozen.chunks(Batch(torch.tensor([i])))))
    truth = torch.stack([torch.func.grad(one)(problem.theta0, i) for i in range(5)])
    got = next(frozen.layer_io(problem.theta0)).example_grads()[:5]
    torch.testing.assert_close(got, truth)
    assert all(torch.equal(b, problem.buffers[k]) for k, b in problem.module.named_buffers())
