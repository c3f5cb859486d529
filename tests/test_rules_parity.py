"""LAMB, LARS, Signum, Lion, Muon, schedule-free rules, AdEMAMix, Prodigy, Shampoo and SOAP against pytorch_optimizer, timm and torch over thirty steps; and pairs that must differ.

The network has one matrix of norm above 10, where φ binds, and a loss steep enough for the global clip to bind.
"""
from dataclasses import replace
from functools import partial

import pytest
import pytorch_optimizer as po
import torch
from torch import nn

from gradnb.move.rules.ademamix import AdEMAMix
from gradnb.move.rules.lamb import LAMB
from gradnb.move.rules.lars import LARS
from gradnb.move.rules.muon import ODD, Muon, newton_schulz
from gradnb.move.rules.prodigy import Prodigy
from gradnb.move.rules.schedulefree import ScheduleFreeAdamW, ScheduleFreeSGD
from gradnb.move.rules.shampoo import Shampoo
from gradnb.move.rules.sign import Lion, Signum
from gradnb.move.rules.soap import SOAP


def timm_optimizer(name):
    "An optimizer of timm's, where timm is installed."
    module = pytest.importorskip(f"timm.optim.{name.lower()}", reason="timm is not installed")
    return getattr(module, name)


def schedulefree(name):
    "The authors' optimizer, at the point where gradients are taken."
    cls = getattr(pytest.importorskip("schedulefree"), f"{name}ScheduleFree")
    def build(params, **more):
        optimizer = cls(list(params), **more)
        optimizer.train()
        return optimizer
    return build


class OneEps(po.ScheduleFreeAdamW):
    "Without the 1e-15 that theirs adds under the root as well, and the authors' does not."
    apply_ams_bound_foreach = staticmethod(partial(po.ScheduleFreeAdamW.apply_ams_bound_foreach, exp_avg_sq_eps=0.))


def patched(optimizer, patch, undo):
    "An optimizer whose steps are taken under a patch."
    step = optimizer.step
    def inside():
        patch()
        try: step()
        finally: undo()
    optimizer.step = inside
    return optimizer


def shampoo_po(params, every, **more):
    "Its roots are zero until step `every`; that is made the first."
    optimizer = po.Shampoo(params, preconditioning_compute_steps=every, **more)
    optimizer.param_groups[0]["step"] = every - 1
    return optimizer


def soap_po(params, **more):
    "It finds its bases in single precision; here in that of the parameters."
    params = list(params)
    single = torch.float32
    return patched(po.SOAP(params, **more), lambda: setattr(torch, "float32", params[0].dtype), lambda: setattr(torch, "float32", single))


def prodigy_po(params, **more):
    "Its sums are of torch's default type, whatever the parameters'; here that is double precision."
    return patched(po.Prodigy(params, **more), lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32))


def prodigyopt(params, **more): return pytest.importorskip("prodigyopt").Prodigy(params, **more)


def network(dtype):
    gen = torch.Generator().manual_seed(0)
    draw = lambda *shape, scale: nn.Parameter(torch.randn(*shape, generator=gen, dtype=torch.float64).mul_(scale).to(dtype))
    weights = {"w1": draw(64, 20, scale=.5), "b1": draw(64, scale=.1), "w2": draw(64, 64, scale=.15), "b2": draw(64, scale=.1),
               "w3": draw(5, 64, scale=.12), "b3": draw(5, scale=.1)}
    assert weights["w1"].norm() > 10 and weights["w2"].norm() < 10
    x, y = (torch.randn(50, k, generator=gen, dtype=torch.float64).to(dtype) for k in (20, 5))

    def loss(w):
        h = torch.tanh(x @ w["w1"].T + w["b1"])
        h = torch.tanh(h @ w["w2"].T + w["b2"])
        return 20 * (h @ w["w3"].T + w["b3"] - y).square().mean()
    return weights, loss


def ours(rule, dtype, steps=30):
    blocks, loss = network(dtype)
    state = rule.init(blocks, {})
    for _ in range(steps):
        blocks = {n: b.detach().requires_grad_() for n, b in blocks.items()}
        grads = dict(zip(blocks, torch.autograd.grad(loss(blocks), blocks.values())))
        with torch.no_grad(): blocks, state = rule.step(state, blocks, grads)
    return torch.cat([b.flatten() for b in blocks.values()])


def theirs(build, dtype, steps=30, penalty=0.):
    params, loss = network(dtype)
    optimizer = build(params.values())
    for _ in range(steps):
        optimizer.zero_grad()
        (loss(params) + penalty / 2 * sum(p.square().sum() for p in params.values())).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params.values()])


def lamb_po(**more): return lambda p, lr=.02: po.Lamb(p, lr=lr, **more)
def lamb_timm(**more): return lambda p: timm_optimizer("Lamb")(p, lr=.02, **more)
def lars_po(**more): return lambda p: po.LARS(p, lr=.5, **more)
def lars_timm(**more): return lambda p: timm_optimizer("Lars")(p, lr=.5, **more)
def in_u(**more): return lamb_po(weight_decouple=False, adam_debias=True, **more)


EQUAL = {
    "cybertronai": (LAMB.cybertronai(.02, ratio_eps=1e-6), in_u()),
    "cybertronai, decay": (LAMB.cybertronai(.02, weight_decay=.01, ratio_eps=1e-6), in_u(weight_decay=.01)),
    "cybertronai, one tensor at a time": (LAMB.cybertronai(.02, weight_decay=.01, ratio_eps=1e-6), in_u(weight_decay=.01, foreach=False)),
    "cybertronai, its Adam": (LAMB.cybertronai(.005, adapt="none"), lambda p: in_u(adam=True)(p, lr=.005)),
    "no averaging": (LAMB.cybertronai(.02, ratio_eps=1e-6, grad_averaging=False), in_u(grad_averaging=False)),
    "pytorch_optimizer": (LAMB.pytorch_optimizer(.02), lamb_po()),
    "pytorch_optimizer, decay": (LAMB.pytorch_optimizer(.02, weight_decay=.01), lamb_po(weight_decay=.01)),
    "pytorch_optimizer, eps": (LAMB.pytorch_optimizer(.02, eps=1e-3), lamb_po(eps=1e-3)),
    "pytorch_optimizer, eps, decay": (LAMB.pytorch_optimizer(.02, eps=.1, weight_decay=.01), lamb_po(eps=.1, weight_decay=.01)),
    "timm": (LAMB.timm(.02), lamb_timm()),
    "timm, one tensor at a time": (LAMB.timm(.02), lamb_timm(foreach=False)),
    "apex": (LAMB.apex(.02), lamb_timm()),
    "pre_norm": (LAMB.pytorch_optimizer(.02, max_grad_norm=1.), lamb_po(pre_norm=True)),
    "timm, always": (LAMB.timm(.02, weight_decay=0., adapt="all", max_grad_norm=None),
                     lamb_timm(weight_decay=0., always_adapt=True, max_grad_norm=None)),
    "nvlamb": (LAMB.nvlamb(.02, weight_decay=0.), lamb_timm(weight_decay=0., always_adapt=True)),
    "paper": (LAMB.paper(.02), lamb_timm(max_grad_norm=None)),
    "LAMBC": (LAMB.timm(.02, ratio_high=1.), lamb_timm(trust_clip=True)),
    "timm, decoupled": (LAMB.timm(.02, decay="outside"), lamb_timm(decoupled_decay=True)),
    "Adam": (LAMB.timm(.02, weight_decay=0., max_grad_norm=None), lambda p: torch.optim.Adam(p, lr=.02, eps=1e-6)),
    "LARS": (LARS.pytorch_optimizer(.5), lars_po()),
    "LARS, decay": (LARS.pytorch_optimizer(.5, weight_decay=.01), lars_po(weight_decay=.01)),
    "LARS, Nesterov": (LARS.pytorch_optimizer(.5, weight_decay=.01, nesterov=True), lars_po(weight_decay=.01, nesterov=True)),
    "LARS, timm": (LARS.timm(.5, beta=.9, weight_decay=.01), lars_timm(momentum=.9, weight_decay=.01)),
    "LARS, timm, always": (LARS.timm(.5, beta=.9, adapt="all"), lars_timm(momentum=.9, always_adapt=True)),
    "LARC": (LARS.timm(.5, weight_decay=.01, trust=.2, clip=True), lars_timm(weight_decay=.01, trust_coeff=.2, trust_clip=True)),
    "LARS at constant rate, inside": (LARS(.5, adapt="matrices", weight_decay=.01), lars_po(weight_decay=.01)),
    "signSGD": (Signum(.002, 0.), lambda p: po.SignSGD(p, lr=.002, momentum=0.)),
    "Signum": (Signum(.002), lambda p: po.SignSGD(p, lr=.002)),
    "Signum, decay": (Signum(.002, .8, .1), lambda p: po.SignSGD(p, lr=.002, momentum=.8, weight_decay=.1)),
    "Lion": (Lion(.002), lambda p: po.Lion(p, lr=.002)),
    "Lion, decay": (Lion(.002, .8, .95, .1), lambda p: po.Lion(p, lr=.002, betas=(.8, .95), weight_decay=.1)),
    "AdEMAMix": (AdEMAMix(.01), lambda p: po.AdEMAMix(p, lr=.01)),
    "AdEMAMix, decay": (AdEMAMix(.01, .8, .99, .999, 3., weight_decay=.1), lambda p: po.AdEMAMix(p, lr=.01, betas=(.8, .99, .999), alpha=3., weight_decay=.1, weight_decouple=True)),
    "AdEMAMix, warm-up": (AdEMAMix(.01, warmup=20), lambda p: po.AdEMAMix(p, lr=.01, t_alpha_beta3=20)),
    "schedule-free SGD": (ScheduleFreeSGD(.05), lambda p: po.ScheduleFreeSGD(p, lr=.05)),
    "schedule-free SGD, weighed": (ScheduleFreeSGD(.05, .7, 5, .01, 1.5, 1.), lambda p: po.ScheduleFreeSGD(p, lr=.05, momentum=.7, warmup_steps=5, weight_decay=.01, r=1.5, weight_lr_power=1.)),
    "schedule-free AdamW": (ScheduleFreeAdamW(.01), lambda p: OneEps(p, lr=.01)),
    "schedule-free AdamW, weighed": (ScheduleFreeAdamW(.01, .8, .99, 1e-6, 5, r=1.5, power=1.),
                                     lambda p: OneEps(p, lr=.01, betas=(.8, .99), eps=1e-6, warmup_steps=5, r=1.5, weight_lr_power=1.)),
    "schedule-free SGD, by its authors": (ScheduleFreeSGD(.05, .7, 5, .01, 1.5, 1.),
                                          lambda p: schedulefree("SGD")(p, lr=.05, momentum=.7, warmup_steps=5, weight_decay=.01, r=1.5, weight_lr_power=1.)),
    "schedule-free AdamW, by its authors": (ScheduleFreeAdamW(.01, .8, .99, 1e-6, 5, .1), lambda p: schedulefree("AdamW")(p, lr=.01, betas=(.8, .99), eps=1e-6, warmup_steps=5, weight_decay=.1)),
    "Prodigy": (Prodigy(), lambda p: prodigy_po(p)),
    "Prodigy, decay": (Prodigy(.5, .8, .99, 1e-6, .1, 1e-3, 2., safeguard=True),
                       lambda p: prodigy_po(p, lr=.5, betas=(.8, .99), eps=1e-6, weight_decay=.1, d0=1e-3, d_coef=2., safeguard_warmup=True)),
    "Prodigy, by its authors": (Prodigy(d0=1e-3, weight_decay=.01, bias_correction=True), lambda p: prodigyopt(p, d0=1e-3, weight_decay=.01, use_bias_correction=True)),
    "Shampoo": (Shampoo(.05, eps=.1), lambda p: po.Shampoo(p, lr=.05, matrix_eps=.1)),
    "Shampoo, decay, every third step": (Shampoo(.05, eps=.1, every=3, weight_decay=.1), lambda p: shampoo_po(p, 3, lr=.05, matrix_eps=.1, weight_decay=.1, weight_decouple=True)),
    "SGD": (LARS.timm(.05, beta=.9), lambda p: torch.optim.SGD(p, lr=.05, momentum=.9)),
}


LOOSE = {"pre_norm": 1e-7}      # their norm is float32, with an eps


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", EQUAL)
def test_thirty_steps(name, dtype, tolerance):
    rule, peer = EQUAL[name]
    tolerance = max(tolerance, LOOSE.get(name, 0.))
    a, b = ours(rule, dtype), theirs(peer, dtype)
    start = torch.cat([p.detach().flatten() for p in network(dtype)[0].values()])
    assert (b - start).abs().max() > 1e-3
    assert (a - b).abs().max() <= tolerance * max(1, b.abs().max().item())


@pytest.mark.parametrize("rate", ["inside", "outside"])
def test_lars_under_a_schedule(rate):
    "By its two recursions, with a learning rate that drops."
    blocks, loss = network(torch.float64)
    w = {n: b.detach().clone() for n, b in blocks.items()}
    rule, v = LARS(1., weight_decay=.01, rate=rate), {n: torch.zeros_like(b) for n, b in w.items()}
    state = rule.init(w, {})
    for lr in (1., 1., .1, .1):
        blocks = {n: b.detach().requires_grad_() for n, b in w.items()}
        grads = dict(zip(blocks, torch.autograd.grad(loss(blocks), blocks.values())))
        out, state = replace(rule, lr=lr).step(state, w, grads)
        for n, g in grads.items():
            r = 1e-3 * w[n].norm() / (g.norm() + .01 * w[n].norm())
            v[n] = .9 * v[n] + (lr if rate == "inside" else 1.) * r * (g + .01 * w[n])
            w[n] = w[n] - (1. if rate == "inside" else lr) * v[n]
        for n in w: assert torch.allclose(out[n], w[n], rtol=1e-13, atol=1e-15)


def test_numbers_of_optaxs_documentation():
    "optax.lamb(0.003) on Σx² from (1, 2, 3): the values that its docstring prints."
    blocks, rule = {"x": torch.tensor([1., 2., 3.])}, LAMB(.003)
    state, seen = rule.init(blocks, {}), []
    for _ in range(5):
        blocks, state = rule.step(state, blocks, {"x": 2 * blocks["x"]})
        seen.append(round(blocks["x"].square().sum().item(), 1))
    assert seen == [13.9, 13.8, 13.8, 13.7, 13.6]


def test_decay_in_the_gradient_is_a_penalty():
    "Apex's other mode; timm's LAMB has none, but it can be given the penalised loss."
    rule, peer = LAMB(.02, decay="l2", weight_decay=.1), lamb_timm(weight_decay=0., always_adapt=True, max_grad_norm=None)
    assert (ours(rule, torch.float64) - theirs(peer, torch.float64, penalty=.1)).abs().max() < 1e-12
    assert (ours(rule, torch.float64) - theirs(peer, torch.float64)).abs().max() > 1e-4


DIFFERENT = {
    "pytorch_optimizer is not cybertronai": (LAMB.cybertronai(.02, weight_decay=.01), lamb_po(weight_decay=.01), 1e-2),
    "cybertronai is not the paper": (LAMB.paper(.02, weight_decay=0.), in_u(), 1e-2),
    "the global clip binds": (LAMB.nvlamb(.02), lamb_timm(max_grad_norm=None), 1e-6),
    "timm does not adapt what does not decay": (LAMB.paper(.02, weight_decay=0.), lamb_timm(weight_decay=0.), 1e-2),
    "decay inside is not outside": (LAMB.timm(.02, weight_decay=.1), lamb_timm(weight_decay=.1, decoupled_decay=True), 1e-4),
    "the eps of the ratio": (LAMB.cybertronai(.02), in_u(), 1e-12),
    "without correction it is not Adam": (LAMB(.02, adapt="decayed", bias_correction="none"),
                                          lambda p: torch.optim.Adam(p, lr=.02, eps=1e-6), .1),
    "its Adam has no bias correction": (LAMB.cybertronai(.02, adapt="none"), lambda p: torch.optim.Adam(p, lr=.02, eps=1e-6), .1),
    "LARS adapts vectors or not": (LARS(.5, rate="outside"), lars_po(), 1e-3),
}


@pytest.mark.parametrize("rule, peer, least", DIFFERENT.values(), ids=DIFFERENT)
def test_must_differ(rule, peer, least):
    assert (ours(rule, torch.float64) - theirs(peer, torch.float64)).abs().max() > least


def matrices(rule, dtype, steps=30):
    "The matrices of the network, which alone are moved, by a rule of ours or an optimizer."
    params, loss = network(dtype)
    moved = {n: p for n, p in params.items() if p.ndim == 2}
    blocks = {n: p.detach().clone() for n, p in moved.items()}
    state, peer = (None, rule(moved.values())) if callable(rule) else (rule.init(blocks, {}), None)
    for _ in range(steps):
        for p in params.values(): p.grad = None
        loss(params).backward()
        if peer is not None: peer.step(); continue
        blocks, state = rule.step(state, blocks, {n: p.grad for n, p in moved.items()})
        with torch.no_grad():
            for n, p in moved.items(): p.copy_(blocks[n])
    return torch.cat([p.detach().flatten() for p in moved.values()])


SOAPS = {
    "default": (SOAP(.01), dict(lr=.01)),
    "vectors, one-sided": (SOAP(.01, .8, .9, 1e-6, .1, 4, .95, True, 20),
                           dict(lr=.01, betas=(.8, .9), shampoo_beta=.95, eps=1e-6, weight_decay=.1, precondition_frequency=4, precondition_1d=True, max_precondition_dim=20)),
    "no correction": (SOAP(.01, every=1, bias_correction=False), dict(lr=.01, precondition_frequency=1, correct_bias=False)),
}

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", SOAPS)
def test_soap(name, dtype, tolerance):
    "On gradients that are drawn: those of a small network span few directions, and in the null space of a factor a rounding turns the basis; a vector's first factor has rank 1, so the vector is of two entries."
    (rule, words), gen = SOAPS[name], torch.Generator().manual_seed(0)
    draw = lambda: {n: torch.randn(*s, generator=gen, dtype=torch.float64).to(dtype) for n, s in dict(a=(24, 12), b=(12, 12), c=(5, 9), v=(2,), conv=(4, 3, 2, 2)).items()}
    blocks = start = draw()
    params = {n: nn.Parameter(b.clone()) for n, b in blocks.items()}
    optimizer, state = soap_po(params.values(), **words), rule.init(blocks, {})
    for _ in range(30):
        grads = draw()
        for n, p in params.items(): p.grad = grads[n].clone()
        blocks, state = rule.step(state, blocks, grads)
        optimizer.step()
    for n, p in params.items():
        assert (p - start[n]).abs().max() > 1e-2
        assert (p - blocks[n]).abs().max() <= tolerance, n


GRAFTS = {g: po.optimizer.shampoo.LayerWiseGrafting[g.upper()] for g in ("sgd", "adagrad", "rmsprop", "none")}

@pytest.mark.parametrize("graft", GRAFTS)
def test_shampoo_with_momentum_and_grafting(graft):
    "The distributed Shampoo of pytorch_optimizer, on matrices; its factors forget their ε, which is given back here before each step."
    eps, beta2 = .1, .9
    def build(params):
        optimizer = po.ScalableShampoo(params, lr=.01, betas=(.9, beta2), start_preconditioning_step=1, preconditioning_compute_steps=1, shape_interpretation=False,
                                       graft_type=GRAFTS[graft], matrix_eps=eps, use_svd=True, nesterov=graft == "sgd", decoupled_weight_decay=True, weight_decay=.1)
        def constant():
            optimizer.init_group(optimizer.param_groups[0])
            for held in optimizer.state.values():
                for A in held["pre_conditioner"].statistics: A.diagonal().add_(eps * (1 / beta2 - 1))
        return patched(optimizer, constant, lambda: None)
    rule = Shampoo(.01, .9, beta2, eps, graft=graft, nesterov=graft == "sgd", weight_decay=.1)
    a, b = matrices(rule, torch.float64), matrices(build, torch.float64)
    assert (b - matrices(Muon(0.), torch.float64)).abs().max() > 1e-2
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_shampoo_by_its_definition_in_three_dimensions():
    "Algorithm 2 with roots from scipy, every third step."
    from scipy.linalg import fractional_matrix_power
    gen = torch.Generator().manual_seed(0)
    w, rule = torch.randn(3, 4, 2, generator=gen, dtype=torch.float64), Shampoo(.1, eps=.01, every=3)
    blocks, state, sums, there = {"w": w}, rule.init({"w": w}, {}), [.01 * torch.eye(d, dtype=torch.float64) for d in w.shape], w.clone()
    for k in range(8):
        g = torch.randn(*w.shape, generator=gen, dtype=torch.float64)
        blocks, state = rule.step(state, blocks, {"w": g})
        for A, letters in zip(sums, ("iab,jab->ij", "aib,ajb->ij", "abi,abj->ij")): A += torch.einsum(letters, g, g)
        if k % 3 == 0: roots = [torch.from_numpy(fractional_matrix_power(A.numpy(), -1 / 6)) for A in sums]
        there -= .1 * torch.einsum("abc,ai,bj,ck->ijk", g, *roots)
    assert torch.allclose(blocks["w"], there, rtol=1e-12, atol=1e-12)


MUON = [dict(), dict(lr=.02, weight_decay=0., nesterov=False), dict(lr=.01, momentum=.5, ns_steps=3), dict(lr=.01, adjust_lr_fn="match_rms_adamw"),
        dict(lr=.01, adjust_lr_fn="spectral_unclamped"), dict(lr=.01, ns_coefficients=ODD["cubic"], ns_steps=12)]
THEIR_WORDS = {"momentum": "beta", "ns_steps": "steps", "match_rms_adamw": "rms", "spectral_unclamped": "spectral", "adjust_lr_fn": "scale"}

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", MUON, ids=str)
def test_muon_is_torchs(words, dtype, monkeypatch):
    "Bit for bit in bfloat16, which is where torch finds the polar factor; in others to rounding, with that conversion taken out of its code."
    ours = {THEIR_WORDS.get(k, k): THEIR_WORDS.get(v, v) for k, v in words.items() if k != "ns_coefficients"}
    rule = Muon.torch(**ours, polar="cubic" if "ns_coefficients" in words else "jordan")
    low = dtype == torch.bfloat16
    dtype = torch.float64 if low else dtype
    if not low:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        rule = replace(rule, precision="own")
    a, b = matrices(rule, dtype), matrices(lambda p: torch.optim.Muon(p, **words), dtype)
    assert (b - matrices(Muon(0.), dtype)).abs().max() > 1e-3
    assert (a - b).abs().max() <= (0 if low else 1e-12 if dtype == torch.float64 else 1e-4) * max(1, b.abs().max().item())


def test_newton_schulz_is_a_polynomial_of_the_singular_values():
    gen = torch.Generator().manual_seed(0)
    for shape in ((7, 4), (4, 7), (3, 5, 5)):
        M = torch.randn(*shape, generator=gen, dtype=torch.float64)
        U, S, V = torch.linalg.svd(M, full_matrices=False)
        for (a, b, c), steps in ((ODD["jordan"], 5), (ODD["cubic"], 9), ((2., -1.5, .5), 3)):
            s = S / S.norm(dim=-1, keepdim=True)
            for _ in range(steps): s = a * s + b * s**3 + c * s**5
            assert torch.allclose(newton_schulz(M, (a, b, c), steps), U * s[..., None, :] @ V, rtol=0, atol=1e-12)


def test_muon_moves_blocks_of_one_shape_together_and_each_as_if_alone():
    gen = torch.Generator().manual_seed(0)
    blocks = {n: torch.randn(*s, generator=gen, dtype=torch.float64) for n, s in dict(a=(6, 12), b=(6, 12), c=(6, 3, 2, 2), d=(12, 6)).items()}
    grads = {n: torch.randn(b.shape, generator=gen, dtype=torch.float64) for n, b in blocks.items()} | {"b": torch.zeros(6, 12, dtype=torch.float64)}
    for rule in (Muon(.1), Muon(.1, polar="svd"), Muon(.1, scale="spectral", weight_decay=.1)):
        out, _ = rule.step(rule.init(blocks, {}), blocks, grads)
        assert torch.equal(out["b"], blocks["b"] * (1 - .1 * rule.weight_decay))                        # no gradient, no step
        for n in blocks:
            alone, _ = rule.step(rule.init({n: blocks[n]}, {}), {n: blocks[n]}, {n: grads[n]})
            assert torch.allclose(out[n], alone[n], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("norm", ["linf", "spectral", "l2"])
def test_steepest_descent_against_numpy(norm, normalized):
    "Thirty steps along drawn gradients."
    import numpy as np
    from gradnb.move.rules.steepest import SteepestDescent
    gen = torch.Generator().manual_seed(0)
    blocks = {n: torch.randn(s, generator=gen, dtype=torch.float64) for n, s in (("w", (5, 3)), ("c", (4, 3, 2, 2)), ("b", (4,)), ("s", ()))}
    rule, theirs, state = SteepestDescent(.01, norm, normalized), {n: b.numpy().copy() for n, b in blocks.items()}, ()
    def far(g):
        if norm == "linf": return np.sign(g), np.abs(g).sum()
        if norm == "l2" or g.ndim < 2: return g / np.sqrt((g ** 2).sum()), np.sqrt((g ** 2).sum())
        U, S, V = np.linalg.svd(g.reshape(len(g), -1), full_matrices=False)
        return (U @ V).reshape(g.shape), S.sum()
    for _ in range(30):
        grads = {n: torch.randn(b.shape, generator=gen, dtype=torch.float64) for n, b in blocks.items()}
        blocks, state = rule.step(state, blocks, grads)
        ways = {n: far(g.numpy()) for n, g in grads.items()}
        size = 1. if normalized else sum(s for _, s in ways.values())
        theirs = {n: b - .01 * size * ways[n][0] for n, b in theirs.items()}
    for n, b in blocks.items(): assert np.abs(b.numpy() - theirs[n]).max() <= 1e-12 * max(1, np.abs(theirs[n]).max())
