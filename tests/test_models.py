"Models: parameter counts by formula, initialisation against its distribution, seeds, and sizes that make no sense."
import itertools
from inspect import signature
import pytest
import torch
from scipy import stats
from torch import nn
from gradnb.data import Dataset, load_dataset
from gradnb.models import MODELS, build_model
from gradnb.problem import Problem

FAMILY = {"fc-relu": nn.ReLU, "fc-tanh": nn.Tanh, "fc-elu": nn.ELU, "fc-hardtanh": nn.Hardtanh,
          "fc-softplus": nn.Softplus}


def data(in_shape=(1, 8, 8), classes=10, dtype=torch.float32):
    x = torch.zeros(2, *in_shape, dtype=dtype)
    y = torch.zeros(2, dtype=torch.int64) if classes else torch.zeros(2, 3, dtype=dtype)
    return Dataset(x, y, x, y, classes)


def tokens(words=5, length=6, n=2):
    x = torch.arange(n * length).reshape(n, length) % words
    return Dataset(x, x, x, x, words, words=words)


def reads_tokens(name): return "words" in signature(MODELS[name]).parameters


def small(name):
    "A call of the model with sizes that make it small."
    sizes = dict(width=4, depth=2, blocks=1, layers=1, heads=2)
    mine = {k: v for k, v in sizes.items() if k in signature(MODELS[name]).parameters}
    return f"{name}:" + ",".join(f"{k}={v}" for k, v in mine.items()), tokens() if reads_tokens(name) else data((3, 32, 32))


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
        call, there = small(name)
        a = build_model(call, there, seed=3).state_dict()
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(7)
        b, c = build_model(call, there, seed=3).state_dict(), build_model(call, there, seed=4).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


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
    ("fc-tan", {}, ValueError, "Did you mean"), ("resnet33", {}, ValueError, "Known: alexnet"),
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


@pytest.mark.parametrize("name, shape, params", [
    ("cnn-relu", (3, 32, 32), 30_634), ("cnn-avgpool-elu", (3, 32, 32), 30_634), ("cnn-bn-tanh", (3, 32, 32), 30_762),
    ("resnet32", (3, 32, 32), 464_250), ("vgg11", (3, 32, 32), 9_750_922), ("vgg11-bn", (3, 32, 32), 9_756_426),
    ("deeplinear", (50,), 19 * 50**2 + 500), ("alexnet", (3, 32, 32), 451_146), ("fcn", (3, 32, 32), 1_313_280),
    ("vgg16-agd", (3, 32, 32), 14_715_584), ("preact-resnet18", (3, 32, 32), 11_164_352), ("preact-resnet50", (3, 32, 32), 23_467_712)])
def test_counts_of_the_studies(name, shape, params): assert count(build_model(name, data(shape))) == params


@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_in_float64_and_its_outputs_have_one_row_an_example(name):
    call, there = small(name)
    there = there.to(dtype=torch.float64)
    net = build_model(call, there).double()
    assert {p.dtype for p in net.parameters()} == {torch.float64} and net.training
    out = net(there.x)
    assert out.dtype == torch.float64 and out.isfinite().all() and out.shape[0] == 2 and out.shape[-1] == there.outputs
    assert not any(getattr(m, "num_batches_tracked", torch.tensor(0)) > 1 for m in net.modules())


@pytest.mark.parametrize("name", [name for name in MODELS if not reads_tokens(name) and name not in ("fc", "fcn")])
def test_wrong_kind_of_data_is_named(name):
    with pytest.raises(TypeError, match=f"model {name!r} reads numbers, but dataset .* holds tokens; models for it"):
        build_model(name, tokens())


@pytest.mark.parametrize("ours, theirs", [("vgg11", "vgg11"), ("vgg16", "vgg16"), ("vgg13-bn", "vgg13_bn")])
def test_vgg_is_torchvisions(ours, theirs):
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng(): their = getattr(torchvision.models, theirs)(num_classes=1).features
    mine = build_model(ours, data((3, 32, 32)))
    parameters = [p for n, p in mine.named_parameters() if n.startswith(("conv", "norm"))]
    assert [p.shape for p in parameters] == [p.shape for p in their.parameters()]
    with torch.no_grad():
        for a, b in zip(their.parameters(), parameters): a.copy_(b)
        x = torch.linspace(-2, 2, 3 * 3 * 32 * 32).sin().reshape(3, 3, 32, 32)
        body = mine[:list(dict(mine.named_children())).index("flatten")]
        torch.testing.assert_close(body(x), their(x))


def test_resnet50_is_torchvisions_with_scales_of_one():
    from torchvision.models import resnet50
    with torch.random.fork_rng(): their = resnet50(num_classes=7)
    mine = build_model("resnet50", data((3, 64, 64), 7))
    their.load_state_dict(mine.state_dict(), strict=False)
    torch.nn.init.zeros_(their.fc.bias)
    x = torch.linspace(-2, 2, 2 * 3 * 64 * 64).sin().reshape(2, 3, 64, 64)
    torch.testing.assert_close(mine(x), their(x))


@pytest.mark.parametrize("name, layer, std", [
    ("vgg11:width=16", "conv3.weight", (2 / (9 * 64))**.5), ("resnet32", "stage2_1.conv1.weight", (2 / (9 * 32))**.5),
    ("resnet", "stage3_1.conv2.weight", (2 / (9 * 64))**.5), ("deeplinear", "fc2.weight", 50**-.5)])
def test_gaussian_inits(name, layer, std):
    net = build_model(name, data((3, 32, 32)))
    assert stats.kstest(drawn(net, layer), stats.norm(0, std).cdf).pvalue > 1e-4


@pytest.mark.parametrize("norm", ["batch", "group", None])
def test_residual_blocks_start_as_their_shortcut(norm):
    net = build_model("resnet32:blocks=2,width=8", data((3, 16, 16)), norm=norm)
    x = torch.linspace(-1, 1, 4 * 8 * 16 * 16).sin().reshape(4, 8, 16, 16)
    assert torch.equal(net.stage1_1(x), x.relu())
    torch.testing.assert_close(net.stage2_0(x)[:, :8], net.stage2_0.shortcut.norm(x[:, :, ::2, ::2]).relu())
    assert not net.stage2_0(x)[:, 8:].any()


def test_dropout_is_silent_in_evaluation():
    net = build_model("alexnet:width=4", data((3, 32, 32)))
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
    assert [m.p for m in net if isinstance(m, nn.Dropout)] == [.5, .5]
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("name", [name for name in MODELS if reads_tokens(name)])
def test_models_of_texts(name):
    call, there = small(name)
    net = build_model(call, there).double().eval()
    with pytest.raises(TypeError, match=f"model {name!r} reads tokens, but dataset 'custom' holds numbers"): build_model(name, data())
    later = there.x.clone()
    later[:, 4:] = (later[:, 4:] + 1) % 5
    with torch.no_grad():
        for p in net.parameters(): p.add_(torch.linspace(-.1, .1, p.numel(), dtype=p.dtype).sin().reshape(p.shape))
    blind = torch.allclose(net(there.x)[:, :4], net(later)[:, :4])
    assert blind != (name == "transformer")        # the central flows' transformer looks ahead, as in its source
    assert not torch.allclose(net(there.x)[:, 4:], net(later)[:, 4:])


@pytest.mark.parametrize("name, data_name, chunk", [
    ("gpt", "sorting-6:length=3", None), ("transformer", "sorting-6:length=3", 4), ("transformer-eos", "copying-6:length=3", None),
    ("lstm", "sorting-6:length=3", 4), ("mamba", "copying-6:length=3", None), ("vit:patch=4,head=4,hidden=8", "digits-6", 4),
    ("mlp", "digits-6", None), ("cnn", "digits-6", 4), ("resnet", "digits-6", None), ("cnn-avgpool-tanh", "digits-6", None)])
def test_derivatives_of_a_problem(name, data_name, chunk):
    there = load_dataset(data_name).to(dtype=torch.float64)
    sizes = {k: v for k, v in dict(width=4, layers=1, heads=2, blocks=1).items() if k in signature(MODELS[name.partition(":")[0]]).parameters}
    net = build_model(name, there, **sizes).double().eval()
    p = Problem(net, "ce", there, chunk)
    gen = torch.Generator().manual_seed(0)
    theta = p.theta0 + .1 * torch.randn(p.p, generator=gen, dtype=torch.float64)
    v = torch.randn(p.p, generator=gen, dtype=torch.float64)
    v, eps = v / v.norm(), 1e-5
    at = p.at(theta)
    torch.testing.assert_close(at.hvp(v), (p.at(theta + eps * v).grad - p.at(theta - eps * v).grad) / (2 * eps), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(p.example_grads(theta).mean(0), at.grad)
    third = (p.at(theta + eps * v).hvp(v) - p.at(theta - eps * v).hvp(v)) / (2 * eps)
    torch.testing.assert_close(at.curvature_grad(v, v), third, atol=1e-5, rtol=1e-4)
