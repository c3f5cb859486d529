"Models: parameter counts by formula, initialisation against its distribution, seeds, and sizes that make no sense."
import itertools
import pytest
import torch
from scipy import stats
from torch import nn
from gradnb.data import Dataset, load_dataset
from gradnb.models import MODELS, build_model

FAMILY = {"fc-relu": nn.ReLU, "fc-tanh": nn.Tanh, "fc-elu": nn.ELU, "fc-hardtanh": nn.Hardtanh,
          "fc-softplus": nn.Softplus}


def data(in_shape=(1, 8, 8), classes=10, dtype=torch.float32):
    x = torch.zeros(2, *in_shape, dtype=dtype)
    y = torch.zeros(2, dtype=torch.int64) if classes else torch.zeros(2, 3, dtype=dtype)
    return Dataset(x, y, x, y, classes)


def count(net): return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name, w, d, shape", list(itertools.product(FAMILY, (1, 7), (1, 2, 4), ((5,), (3, 4, 4)))))
def test_fully_connected(name, w, d, shape):
    net, n_in = build_model(f"{name}:width={w}", data(shape, 6), depth=d), torch.zeros(shape).numel()
    assert count(net) == (n_in + 1) * w + (d - 1) * (w + 1) * w + (w + 1) * 6
    acts = [m for m in net if not isinstance(m, (nn.Linear, nn.Flatten))]
    assert [type(m) for m in acts] == [FAMILY[name]] * d and isinstance(net[-1], nn.Linear)
    assert net(torch.zeros(9, *shape)).shape == (9, 6)


@pytest.mark.parametrize("name, params", [
    ("fc-relu", 656_810), ("fc-tanh:depth=1", 616_610), ("fc-tanh:depth=2", 656_810), ("fc-tanh:depth=3", 697_010),
    ("fc-tanh:depth=4", 737_210)])
def test_counts_on_cifar(name, params): assert count(build_model(name, data((3, 32, 32)))) == params


@pytest.mark.parametrize("w, d", list(itertools.product((1, 4, 100), (2, 3, 10))))
def test_bias_free(w, d):
    net = build_model("fc", data((1, 28, 28)), width=w, depth=d)
    assert count(net) == 784 * w + (d - 2) * w * w + 10 * w
    assert all(m.bias is None for m in net if isinstance(m, nn.Linear))
    assert sum(isinstance(m, nn.ReLU) for m in net) == d - 1


def test_default_of_the_tail_index_study(): assert count(build_model("fc", data((1, 28, 28)))) == 89_400


def test_regression_network():
    net = build_model("regression", load_dataset("chebyshev-3-20"))
    assert [tuple(p.shape) for p in net.parameters()] == [(100, 1), (100,), (1, 100)] and count(net) == 300
    assert isinstance(net.act1, nn.Tanh) and not net.fc1.bias.any()


def drawn(net, layer): return net.get_parameter(layer).detach().flatten().numpy()


@pytest.mark.parametrize("layer", ["fc1.weight", "fc1.bias"])
def test_default_init_is_uniform_on_one_over_root_of_inputs(layer):
    net = build_model("fc-tanh:width=400", data((64,)))
    assert stats.kstest(drawn(net, layer), stats.uniform(-1 / 8, 1 / 4).cdf).pvalue > 1e-4


@pytest.mark.parametrize("layer, gain", [("fc1.weight", 1.9), ("out.weight", 1.0)])
def test_regression_init_is_xavier_normal(layer, gain):
    net = build_model("regression:width=3000", load_dataset("chebyshev-3-20"))
    assert stats.kstest(drawn(net, layer), stats.norm(0, gain * (2 / 3001)**0.5).cdf).pvalue > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_same_weights(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        a = build_model(name, data(), seed=3).state_dict()
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(7)
        b, c = build_model(name, data(), seed=3).state_dict(), build_model(name, data(), seed=4).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["out.weight"], c["out.weight"])


def test_generator_comes_back_after_an_error():
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with pytest.raises(ValueError): build_model("fc-tanh", data(), width=0)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_default_dtype() == dtype


def test_weights_do_not_depend_on_the_default_dtype():
    a = build_model("fc-tanh", data())
    torch.set_default_dtype(torch.float64)
    try: b = build_model("fc-tanh", data())
    finally: torch.set_default_dtype(torch.float32)
    assert b.fc1.weight.dtype == torch.float32 and torch.equal(a.fc1.weight, b.fc1.weight)


def test_float64_starts_at_the_same_point():
    a, b = (build_model("fc-relu", data(dtype=t)) for t in (torch.float32, torch.float64))
    assert b.fc1.weight.dtype == torch.float64 and torch.equal(a.fc1.weight.double(), b.fc1.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_starts_at_the_same_point_and_leaves_its_generator():
    before = torch.cuda.get_rng_state()
    a, b = build_model("fc-relu", data()), build_model("fc-relu", data().to("cuda"))
    assert b.fc1.weight.is_cuda and torch.equal(a.fc1.weight, b.fc1.weight.cpu())
    with torch.device("cuda"): c = build_model("fc-relu", data().to("cpu"))
    assert not c.fc1.weight.is_cuda and torch.equal(a.fc1.weight, c.fc1.weight)
    assert torch.equal(before, torch.cuda.get_rng_state())


@pytest.mark.parametrize("call, sizes, error, says", [
    ("fc-tan", {}, ValueError, "Did you mean"), ("resnet32", {}, ValueError, "Known: fc"),
    ("fc-tanh:widht=3", {}, ValueError, "width"), ("fc-tanh:3", {}, ValueError, "VALUE"),
    ("fc-tanh:width=0", {}, ValueError, "at least 1, got 0"), ("fc-tanh:depth=0", {}, ValueError, "at least 1, got 0"),
    ("fc-tanh:width=-5", {}, ValueError, "got -5"), ("fc:depth=1", {}, ValueError, "at least 2, got 1"),
    ("regression:depth=2", {}, ValueError, "depth"), ("regression:width=0", {}, ValueError, "width"),
    ("fc-tanh:width=abc", {}, TypeError, "'abc'"), ("fc-tanh:width=2.5", {}, TypeError, "2.5"),
    ("fc-tanh", {"width": True}, TypeError, "True"), ("fc-tanh", {"widht": 3}, ValueError, "widht"),
    ("fc-tanh:width=3", {"width": 4}, ValueError, "twice"),
])
def test_refused(call, sizes, error, says):
    with pytest.raises(error, match=says): build_model(call, data(), **sizes)


def test_a_name_is_no_dataset():
    with pytest.raises(TypeError, match="load_dataset"): build_model("fc-tanh", "digits")


def test_regression_targets_give_as_many_outputs():
    assert build_model("fc-tanh", data(classes=None)).out.out_features == 3
