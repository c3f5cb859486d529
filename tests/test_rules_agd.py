"Automatic gradient descent against its equations written out in loops, and its start."
from itertools import product
from math import exp, log, sqrt

import pytest
import torch
from torch import nn

from gradnb.models.inits import agd_init, unit_of
from gradnb.ground.layout import Layout
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
            slices += [(n, (slice(None), slice(None), i, j), sqrt(g.shape[0] / g.shape[1]) / g[0, 0].numel())
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
