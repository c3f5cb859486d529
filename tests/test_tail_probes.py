"""Objects of study and probes of the tail index, against the run itself and against closed forms."""
from itertools import islice
from math import isnan, sqrt

import numpy as np
import pytest
import torch

from gradnb.data import Dataset, load_dataset
from gradnb.move.estimators.minibatch import FullBatch, MiniBatch
from gradnb.runs.laws import check_probe
from gradnb.models import build_model
from gradnb.measure.probes.view import PROBES, View
from gradnb.problem import Problem, Quadratic
from gradnb.ground.roles import Batch, Estimator
from gradnb.move.rules.gd import GD
from gradnb.move.steppers import Descent, trajectory
from gradnb.ground.streams import Stream
from gradnb.measure.tail.compat import original_noise_index
from gradnb.measure.tail.estimators import tail_index
from gradnb.measure.tail.magnitudes import TailRefusal
from gradnb.ground.files import SAID
from gradnb.ground.draws import Draws
from gradnb.measure.tail.noise import alive, iterate_differences, noise_index, noise_norms, on_split, paired_noise, partition_grads
from gradnb.measure.tail.stable import stable_sample
from gradnb.runs.training import train


@pytest.fixture(scope="module")
def problem():
    digits = load_dataset("digits-200").to(dtype=torch.float64)
    return Problem(build_model("fc-tanh:width=8,depth=1", digits), "ce", digits)


class Stirred(Estimator):
    "A gradient with stable noise of its own, of unequal scales."
    def __init__(self, alpha, p): self.alpha, self.scale = alpha, torch.logspace(-1.5, 1.5, p, dtype=torch.float64)
    def sample(self, state, problem, stream): return Batch(torch.zeros(0, dtype=torch.int64), noise=stream)
    def estimate(self, state, problem, theta, batch):
        noise = stable_sample(self.alpha, self.scale.shape, batch.noise.generator(), dtype=torch.float64)
        return problem.grad_and_loss(theta)[0] + self.scale * noise, torch.tensor(0.)


def measured(spec, problem, stepper, steps=4, seed=0):
    _, traces = train(problem, stepper, steps, PROBES.build(spec), seed=seed, progress=False)
    return traces[spec.split(":")[0] + ("_test" if "split=test" in spec else "")]


@pytest.mark.parametrize("spec", ["tail_index:every=10,draws=80,groups=layers,surrogates=3", "tail_index:every=10,method=ecf,draws=60",
                                  "noise_norms:every=10,draws=40", "layer_norms:every=5", "original_index:every=10,size=20",
                                  "original_index:every=10,size=20,split=test"])
def test_laws(spec, problem): check_probe(PROBES.build(spec), problem, Descent(GD(.1), MiniBatch(8)))


def test_draws_are_the_views_own(problem):
    "The probe's differences are those of View.grads at the same step."
    stepper = Descent(GD(.1), MiniBatch(8))
    state = next(islice(trajectory(problem, stepper), 3, 4))
    view = View(problem, stepper, state, Stream(5) / "probe")
    grads = view.grads(7)
    again = torch.stack(list(Draws.of(problem, stepper.estimator, state.theta, 7, view.stream / "grads", state.estimator)))
    assert torch.equal(again, grads)
    z = paired_noise(iter(grads))
    assert z.shape == (3, problem.p) and torch.equal(z[1], (grads[2] - grads[3]) / sqrt(2))
    assert torch.equal(paired_noise(grads, torch.tensor([4, 0])), z[:, [4, 0]])


def test_paired_noise_has_the_covariance_of_one_draw():
    g = Stream(0).generator()
    bowl = Quadratic(torch.eye(5, dtype=torch.float64), torch.randn(30, 5, generator=g, dtype=torch.float64))
    z = paired_noise(Draws.of(bowl, MiniBatch(4), bowl.theta0, 8000, Stream(1)))
    expected = bowl.batch_variance(4)
    total = z.square().sum(1)
    assert abs(total.mean() - expected) < 4 * total.std() / sqrt(len(z))
    assert (z.mean(0).abs() < 4 * z.std(0) / sqrt(len(z))).all()


def test_a_partition_is_the_data_in_order(problem):
    grads = list(partition_grads(problem, problem.theta0, 60))
    assert len(grads) == 3
    for i, g in enumerate(grads):
        assert torch.equal(g, problem.grad_and_loss(problem.theta0, Batch(torch.arange(60 * i, 60 * i + 60)))[0])
    assert len(list(partition_grads(problem, problem.theta0, 60, most=2))) == 2
    test = on_split(problem, "test")
    d = problem.dataset
    assert on_split(problem, "train") is problem and torch.equal(test.dataset.x, d.x_test) and problem.dataset is d
    one = problem.per_example(problem.outputs(problem.theta0, d.x_test[:50]), d.y_test[:50]).mean()
    assert test.loss(problem.theta0, Batch(torch.arange(50))).item() == pytest.approx(one.item())


def test_iterate_differences(problem):
    stepper = Descent(GD(.1), MiniBatch(8))
    thetas = [s.theta.clone() for s in islice(trajectory(problem, stepper), 13)]
    for lag in (1, 3):
        rows = iterate_differences(trajectory(problem, stepper), 4, lag)
        assert torch.equal(rows, torch.stack([thetas[lag * (i + 1)] - thetas[lag * i] for i in range(4)]))


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8, 2.])
def test_the_probe_finds_the_index_and_its_surrogate_finds_two(alpha):
    "Bar A8: the index of stable noise with unequal scales, and 2.0 ± 0.15 for the Gaussian surrogate."
    bowl = Quadratic(torch.eye(400, dtype=torch.float64))
    row = measured("tail_index:every=9,draws=348", bowl, Descent(GD(.01), Stirred(alpha, 400)), 0).columns
    value, low, high, gaussian = (row[k][0] for k in ("value", "low", "high", "gaussian"))
    assert abs(value - alpha) < .05 and low - .02 < alpha < high + .02
    assert abs(gaussian - 2) < .15
    assert (row["p_value"][0] < .01) == (alpha < 2)
    fit = measured("tail_index:every=9,draws=348,method=mle,surrogates=0", bowl, Descent(GD(.01), Stirred(alpha, 400)), 0).columns
    assert abs(fit["value"][0] - alpha) < .05 and isnan(fit["gaussian"][0])


def test_a_sample_of_coordinates_stands_for_all():
    bowl = Quadratic(torch.eye(2000, dtype=torch.float64))
    stepper = Descent(GD(.01), Stirred(1.5, 2000))
    some, whole = (measured(f"tail_index:every=9,draws=160,surrogates=0,coordinates={c}", bowl, stepper, 0).columns for c in (300, 2000))
    assert some["value"][0] != whole["value"][0] and abs(some["value"][0] - whole["value"][0]) < 4 * some["stderr"][0]


def test_layers_have_columns_of_their_own(problem):
    found = measured("tail_index:every=9,draws=80,groups=layers,surrogates=3", problem, Descent(GD(.1), MiniBatch(8)), 0).columns
    names = problem.layout.names
    assert {"value", "p_value", "zeros", *names, *(f"{n}.gaussian" for n in names)} <= set(found)
    z = paired_noise(Draws.of(problem, MiniBatch(8), problem.theta0, 80, Stream(0) / "probe" / "tail_index" / 0 / "grads"))
    part = alive(problem.layout.split(z)[2].flatten(1))
    assert found[names[2]][0] == pytest.approx(tail_index(part, "mohammadi").value)


def test_refused_numbers_are_nan_and_dead_coordinates_are_counted():
    z = stable_sample(1.5, (100, 50), Stream(0).generator(), dtype=torch.float64)
    z[:, :10] = 0
    row = noise_index(z, Stream(1))
    assert row["dead"] == pytest.approx(.2) and row["zeros"] == 0 and row["value"] == tail_index(z[:, 10:], "mohammadi").value
    z[:8] = 0
    SAID.clear()
    with pytest.warns(RuntimeWarning, match="no tail index.*8.0% of the values are exactly zero"): row = noise_index(z, Stream(1))
    assert row["zeros"] == pytest.approx(.08) and isnan(row["value"]) and isnan(row["gaussian"])
    with pytest.raises(TailRefusal): tail_index(alive(z), "mohammadi")
    assert all(map(isnan, list(noise_index(torch.zeros(100, 3), Stream(1)).values())[:-1]))


def test_a_gradient_without_noise_has_no_index(problem):
    found = measured("tail_index:every=9,draws=80", problem, Descent(GD(.1), FullBatch()), 0).columns
    assert isnan(found["value"][0]) and found["dead"][0] == 1


def test_norms_are_norms(problem):
    stepper = Descent(GD(.1), MiniBatch(8))
    found = measured("noise_norms:every=9,draws=60", problem, stepper, 0).columns
    z = paired_noise(Draws.of(problem, MiniBatch(8), problem.theta0, 60, Stream(0) / "probe" / "noise_norms" / 0 / "grads"))
    np.testing.assert_allclose(found["norms"][0], noise_norms(z).numpy(), rtol=1e-12)
    layers = measured("layer_norms", problem, stepper, 3).columns
    for k, state in enumerate(islice(trajectory(problem, stepper), 4)):
        for name, w, g in zip(problem.layout.names, problem.layout.split(state.theta), problem.layout.split(state.grad)):
            assert layers[name][k] == pytest.approx(w.norm().item()) and layers[f"{name}.grad"][k] == pytest.approx(g.norm().item())


def test_the_index_on_the_test_set(problem):
    "That of a problem whose training set it is, from the same batches."
    d = problem.dataset
    swapped = Problem(problem.module, "ce", type(d)(d.x_test, d.y_test, d.x, d.y, d.classes))
    here, there = (View(p, descent := Descent(GD(.1), MiniBatch(8)), next(trajectory(p, descent, problem.theta0)), Stream(3)) for p in (problem, swapped))
    spec = "tail_index:draws=80,surrogates=3"
    test = PROBES.build(f"{spec},split=test")
    assert test.name == "tail_index_test" and test.measure(here) == PROBES.build(spec).measure(there)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_original_number(problem, split):
    found = measured(f"original_index:size=20,every=9,split={split}", problem, Descent(GD(.1), MiniBatch(8)), 0).columns
    d = problem.dataset
    x, y = (d.x, d.y) if split == "train" else (d.x_test, d.y_test)
    other = Problem(problem.module, "ce", type(d)(x, y, x, y, d.classes))
    grads = torch.stack(list(partition_grads(other, problem.theta0, 20, 200)))
    assert found["value"][0] == pytest.approx(original_noise_index(grads), rel=1e-9)
    assert abs(found["gaussian"][0] - found["value"][0]) < .3 and found["gaussian_low"][0] < found["gaussian"][0] < found["gaussian_high"][0]


@pytest.mark.parametrize("spec, words", [
    ("tail_index:draws=79", "tail_index: draws=79 are too few for 20 blocks of 2 differences; take draws=80 or more"),
    ("tail_index:surrogates=2", "tail_index needs a whole number 3 ≤ surrogates"), ("original_index:surrogates=0", "original_index needs a whole number 3 ≤ surrogates"),
    ("tail_index:draws=100,m=4", "take draws=160 or more"), ("tail_index:groups=all", "got 'all'"),
    ("tail_index:method=moh", "no tail estimator 'moh'"), ("noise_norms:draws=10", "take draws=40 or more"),
    ("original_index:split=valid", "got 'valid'"), ("tail_index:split=valid", "got 'valid'")])
def test_refusals(spec, words):
    with pytest.raises(ValueError, match=words): PROBES.build(spec)


def test_batches_larger_than_the_data_are_refused(problem):
    with pytest.raises(ValueError, match="a batch of 3000 needs as many examples, and there are 200; take a smaller size"):
        measured("original_index:size=3000", problem, Descent(GD(.1), MiniBatch(8)), 0)


@pytest.mark.parametrize("shape, classes", [((1, 28, 28), 10), ((3, 32, 32), 10), ((3, 32, 32), 100)], ids=["mnist", "cifar10", "cifar100"])
def test_the_networks_of_2019_on_its_data(shape, classes):
    "Both networks with both losses on all three; the original had no fc for CIFAR-100 and no alexnet for MNIST."
    g = Stream(0).generator()
    x, y = torch.randn(12, *shape, generator=g), torch.randint(classes, (12,), generator=g)
    for name, loss in (("fc:width=6,depth=4", "ce"), ("fc:width=6,depth=4", "linear_hinge"), ("alexnet:width=4", "ce"), ("alexnet:width=4", "linear_hinge")):
        data = Dataset(x, y, x, y, classes)
        problem = Problem(build_model(name, data), loss, data)
        row = measured("original_index:every=9,size=2", problem, Descent(GD(.1), MiniBatch(4)), 0).columns
        assert 0 < row["value"][0] < 4 and problem.outputs(problem.theta0, x).shape == (12, classes)
        if name.startswith("fc"): assert problem.p == x[0].numel() * 6 + 2 * 36 + 6 * classes
