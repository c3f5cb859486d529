"Automatic gradient descent against its equations written out in loops, and its start."
from dataclasses import replace
from itertools import product
from math import exp, log, prod, sqrt

import pytest
import torch
from torch import nn

from gradnb import Spec
from gradnb.models.inits import INITS, agd_init, unit_of
from gradnb.ground.layout import Layout
from gradnb.measure.thresholds.metrics import METRICS
from gradnb.move.rules.agd import AutomaticGradientDescent
from gradnb.ground.streams import Stream

SHAPES = {"conv": (6, 3, 3, 2), "in": (20, 30), "words": (12, 5), "out": (4, 20)}
ROLES = {"conv": "conv", "in": "matrix", "words": "embedding", "out": "matrix"}


def draws(seed, dtype=torch.float64, shapes=SHAPES):
    gen = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*s, generator=gen, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def by_hand(blocks, grads, gain=1., L=4):
    "Algorithm 1, one slice after another."
    slices = []
    for n, g in grads.items():
        if ROLES[n] == "matrix": slices.append((n, (...,), sqrt(g.shape[0] / g.shape[1])))
        if ROLES[n] == "embedding": slices += [(n, (i,), sqrt(g.shape[1])) for i in range(len(g))]
        if ROLES[n] == "conv":
            slices += [(n, (slice(None), slice(None), i, j), sqrt(g.shape[0] / g.shape[1]) / sqrt(g[0, 0].numel()))
                       for i, j in product(range(g.shape[2]), range(g.shape[3]))]
    frobenius = lambda g: sqrt(sum(v ** 2 for v in g.flatten().tolist()))
    G = sum(scale * frobenius(grads[n][where]) for n, where, scale in slices) / L
    eta = log((1 + sqrt(1 + 4 * G)) / 2)
    out = {n: b.clone() for n, b in blocks.items()}
    for n, where, scale in slices:
        if norm := frobenius(grads[n][where]): out[n][where] -= gain * eta / L * scale * grads[n][where] / norm
    return out, eta, G


@pytest.mark.parametrize("gain, depth", [(1., None), (10., None), (.5, 7)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_by_hand(gain, depth, dtype, tolerance):
    blocks, rule = draws(0, dtype), AutomaticGradientDescent(gain, depth)
    state, truth = rule.init(blocks, ROLES), draws(0, dtype)
    for k in range(1, 6):
        grads = draws(k, dtype)
        grads["words"][3] = 0                                           # a word that did not occur
        blocks, state = rule.step(state, blocks, grads)
        truth, eta, G = by_hand(truth, grads, gain, depth or 4)
        assert abs(state.G.item() / G - 1) < 10 * tolerance and abs(state.eta.item() / eta - 1) < 10 * tolerance
        assert abs((exp(eta) - 1) * exp(eta) / G - 1) < 1e-12
        assert all((blocks[n] - truth[n]).abs().max() < 10 * tolerance for n in blocks)
        assert torch.equal(blocks["words"][3], draws(0, dtype)["words"][3])


def test_thirty_steps_of_the_authors_program():
    "Stored: github.com/jxbz/agd at 1f8454d, AGD(net, gain=3).step() in float64 on the weights and gradients made here."
    shapes = {"a": (6, 3, 3, 2), "b": (4, 6, 2, 2), "c": (5, 16)}
    count = lambda shape: torch.arange(prod(shape), dtype=torch.float64)
    blocks, rule = {n: count(s).cos().view(s) for n, s in shapes.items()}, AutomaticGradientDescent(gain=3.)
    state, etas = rule.init(blocks, {}), []
    for k in range(30):
        grads = {n: (count(s) * (k + 1) + i).sin().view(s) * 2. ** (k % 7 - 3) for i, (n, s) in enumerate(shapes.items())}
        blocks, state = rule.step(state, blocks, grads)
        etas.append(state.eta.item())
    assert [etas[0], etas[4], etas[29]] == pytest.approx([.4264163525432991, 1.423130836509394, .6266600804206782], rel=1e-14)
    theirs = {"a": (1., .12674317689680042, .8352906511891167, 10.87156503938461),
              "b": (-2.3069878205436463, .6416362418284941, 1.0955650794518628, 9.469093296495984),
              "c": (-1.7225727866183806, 1.0443208737837795, -1.1062875087706951, 7.355992576216557)}
    for n, w in blocks.items():
        assert [*w.flatten()[[0, 7, -1]].tolist(), w.norm().item()] == pytest.approx(theirs[n], rel=1e-14, abs=1e-14)


STARTS = {(64, 3, 3, 3): 1.5396007178390023, (128, 64, 3, 3): .47140452079103223, (256, 256, 3, 2): .40824829046386385,
          (6, 4, 1, 1): 1.2247448713915894, (10, 512): .13975424859373692}


@pytest.mark.parametrize("shape", STARTS, ids=str)
def test_the_start_of_the_authors_program(shape):
    "Stored: the spectral norms of a slice after AGD(net).init_weights() there, in float64."
    layout = Layout(("w",), (shape,), ("conv" if len(shape) > 2 else "matrix",))
    w = layout.named(agd_init(layout, Stream(0), torch.float64))["w"]
    for s in w.reshape(*shape[:2], -1).unbind(-1): assert torch.linalg.matrix_norm(s, 2).item() == pytest.approx(STARTS[shape], rel=1e-13)


@pytest.mark.parametrize("kernel, size", [("root", 1 / 6 ** .5), ("none", 1.), ("sum", 1 / 6)])
def test_whose_unit_a_kernel_has(kernel, size):
    "The start, the step and the metric of one choice agree; matrices have none."
    layout = Layout(("conv", "out"), ((8, 2, 3, 2), (4, 16)), ("conv", "matrix"))
    start = layout.named(INITS["agd" if kernel == "root" else f"agd-{kernel}"](layout, Stream(0), torch.float64))
    assert torch.linalg.matrix_norm(start["conv"][:, :, 2, 1], 2).item() == pytest.approx(2 * size, rel=1e-12)
    assert torch.linalg.matrix_norm(start["out"], 2).item() == pytest.approx(.5, rel=1e-12)
    rule, grads = AutomaticGradientDescent(kernel=kernel), {n: w.cos() for n, w in start.items()}
    out, state = rule.step(rule.init(start, {}), start, grads)
    moved = lambda n: (out[n] - start[n])[(..., 2, 1) if n == "conv" else ...].norm().item()
    assert moved("conv") / moved("out") == pytest.approx(4 * size, rel=1e-10)
    _, inverse, _ = METRICS["AutomaticGradientDescent"](rule, state, start, grads)
    for n in start: assert torch.allclose(out[n], start[n] - inverse[n] * grads[n], rtol=1e-12)
    if kernel == "none":
        with pytest.raises(ValueError, match="kernel of AutomaticGradientDescent"): AutomaticGradientDescent(kernel="rot")


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1., 1e15])
def test_step_does_not_depend_on_the_gradients_proportions(size):
    blocks, grads, rule = draws(0), draws(1), AutomaticGradientDescent()
    grads["in"] *= size
    out, state = rule.step(rule.init(blocks, ROLES), blocks, grads)
    for n in ("in", "out"):
        moved = (out[n] - blocks[n]).norm().item()
        assert abs(moved / (state.eta.item() / 4 * unit_of("matrix", SHAPES[n]).scale) - 1) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_gradients_move_nothing(dtype):
    blocks, rule = draws(0, dtype), AutomaticGradientDescent(vectors=True)
    blocks["bias"], roles = torch.ones(7, dtype=dtype), ROLES | {"bias": "vector"}
    dead = {n: torch.zeros_like(b) for n, b in blocks.items()}
    out, state = rule.step(rule.init(blocks, roles), blocks, dead)
    assert all(torch.equal(out[n], blocks[n]) for n in blocks) and state.eta == 0
    grads = draws(1, dtype) | {"bias": dead["bias"]}
    out, state = rule.step(state, blocks, grads)
    assert torch.equal(out["bias"], blocks["bias"]) and not torch.equal(out["in"], blocks["in"])
    out, _ = rule.step(state, blocks, dead | {"bias": torch.ones(7, dtype=dtype)})
    assert torch.equal(out["bias"], blocks["bias"])


def test_a_vector_moves_within_its_bound_and_leaves_the_matrices_alone():
    blocks, grads, plain = draws(0), draws(1), AutomaticGradientDescent()
    expected, state = plain.step(plain.init(blocks, ROLES), blocks, grads)
    rule, bias = AutomaticGradientDescent(vectors=True), {"bias": torch.zeros(9, dtype=torch.float64)}
    for size in (1e-12, 1., 1e12):
        g = grads | {"bias": torch.full((9,), size, dtype=torch.float64)}
        out, after = rule.step(rule.init(blocks | bias, ROLES), blocks | bias, g)
        assert all(torch.equal(out[n], expected[n]) for n in blocks)
        assert torch.allclose(out["bias"], torch.full((9,), -after.eta.item() / 4, dtype=torch.float64), rtol=1e-12)


def test_a_nan_is_not_hidden():
    blocks, rule = draws(0), AutomaticGradientDescent()
    grads = draws(1)
    grads["in"][0, 0] = torch.nan
    out, state = rule.step(rule.init(blocks, ROLES), blocks, grads)
    assert state.G.isnan() and out["in"].isnan().any() and out["out"].isnan().any()


def test_refusals():
    rule, loose, bias = AutomaticGradientDescent(), AutomaticGradientDescent(vectors=True), {"bias": torch.ones(3)}
    with pytest.raises(ValueError, match="only vectors: .'bias'."): loose.step(loose.init(bias, {}), bias, bias)
    with pytest.raises(ValueError, match="block 'bias' has shape .3,.; build the network with bias=False"): rule.init(bias, {})
    with pytest.raises(ValueError, match=r"shape \(20, 30\) cannot have the role 'conv'"): rule.init(draws(0), ROLES | {"in": "conv"})
    with pytest.raises(ValueError, match="gain=nan"): AutomaticGradientDescent(float("nan"))
    with pytest.raises(ValueError, match="takes no learning rate, got lr=0.1"): AutomaticGradientDescent(lr=.1)


def test_the_start_is_a_function_of_the_stream_and_orthogonal_whatever_the_shape():
    net = nn.Sequential(nn.Conv1d(4, 9, 3), nn.Conv2d(9, 4, (3, 2)), nn.Linear(40, 6), nn.Linear(6, 40), nn.LayerNorm(40))
    layout, before = Layout.of(net), torch.get_rng_state()
    a, b = (agd_init(layout, Stream(k), torch.float64) for k in (0, 1))
    assert torch.equal(a, agd_init(layout, Stream(0), torch.float64)) and not torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())
    for name, w in layout.named(a).items():
        if w.ndim == 1: continue
        for s in w.reshape(*w.shape[:2], -1).unbind(-1):
            assert torch.allclose(torch.linalg.svdvals(s), torch.tensor(unit_of("conv" if w.ndim > 2 else "matrix", w.shape).scale,
                                                                        dtype=torch.float64), rtol=1e-12), name
    assert layout.named(a)["4.weight"].eq(1).all() and layout.named(a)["4.bias"].eq(0).all()


def test_runs_stored_before_keep_what_they_did():
    "A spec without the field is of the time when a kernel's positions shared by the sum; its name stays."
    spec = Spec("digits-50", "vgg11-agd", "mse", AutomaticGradientDescent(kernel="sum"), 5)
    assert "kernel" not in spec.to_json() and Spec.from_json(spec.to_json()).rule.kernel == "sum"
    now = replace(spec, rule=AutomaticGradientDescent())
    assert now.hash != spec.hash and Spec.from_json(now.to_json()) == now
