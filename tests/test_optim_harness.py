"""Every face under torch's own harness for optimizers: `OptimizerInfo`, `optims`, and its inputs that must fail.

What is checked is what torch's tests check of its own optimizers; torch's AdamW runs along as the control.
"""
import copy
import io
import pickle
import warnings

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (ErrorOptimizerInput, OptimizerErrorEnum, OptimizerInfo,
                                                       OptimizerInput, _get_optim_inputs_including_global_cliquey_kwargs,
                                                       get_error_inputs_for_all_optims, optims)
from torch.testing._internal.common_utils import TestCase

from gradnb import optim


def inputs(*configs):
    return lambda device, dtype=None: [OptimizerInput(None, dict(c), str(c)) for c in (*configs, {**configs[0], "maximize": True})]


def errors(**wrong):
    "Values that must be refused by name, beside those that torch refuses for every optimizer."
    def func(device, dtype):
        p = nn.Parameter(torch.randn(2, 2, device=device, dtype=dtype))
        ours = [ErrorOptimizerInput(OptimizerInput([p], {"lr": .1} | {k: v}, k), error_type=ValueError,
                                    error_regex="beta" if k == "momentum" else k.rstrip("s")) for k, v in wrong.items()]
        return ours + get_error_inputs_for_all_optims(device, dtype)
    return func


def cyclic(opt): return CyclicLR(opt, 1e-4, 1e-3, cycle_momentum=False)
def cycle(opt): return OneCycleLR(opt, 1e-2, total_steps=60)
def plateau(opt): return ReduceLROnPlateau(opt)
def decay(opt): return ExponentialLR(opt, .95)
def cosine(opt): return CosineAnnealingLR(opt, 50)


def info(cls, *configs, schedulers=(decay, cosine, plateau, cyclic), wrong=None, **more):
    return OptimizerInfo(cls, optim_inputs_func=inputs(*configs), optim_error_inputs_func=errors(**wrong) if wrong else None,
                         scheduler_inputs=[[s] for s in schedulers], supported_impls=("foreach",),
                         not_og_supported_flags=("foreach", "maximize"), **more)


class Layered(optim.KFAC):
    "K-FAC over the weights and biases of two layers, which is given a batch of its own before every step."
    def __init__(self, params, **hyper):
        a, b, c, d = params
        net = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 3))
        net[0].weight, net[0].bias, net[2].weight, net[2].bias = a, b, c, d
        super().__init__(net, loss="mse", **hyper)

    def step(self, closure=None):
        weight = self.param_groups[0]["params"][0]
        self.observe(torch.linspace(-1, 1, 20, device=weight.device, dtype=weight.dtype).view(4, 5))
        return super().step(closure)


class Shown(optim.Sophia):
    "Sophia that is shown a loss before every step that has gradients."
    def step(self, closure=None):
        moved = [p for g in self.param_groups for p in g["params"] if closure or p.grad is not None]
        if moved:
            with torch.enable_grad(): self.estimate(sum(p.square().sum() for p in moved))
        return super().step(closure)


NAN = float("nan")
KFAC = OptimizerInfo(Layered, optim_inputs_func=inputs(dict(lr=.01), dict(lr=.01, ekfac=True, damping=.1, every=2, invert=3), dict(lr=torch.tensor(.01))),
                     scheduler_inputs=[[decay], [plateau]], supported_impls=(), not_og_supported_flags=())
FACES = [
    info(optim.GD, dict(lr=.01), dict(lr=torch.tensor(.01)), wrong=dict(lr=-1.)),
    info(optim.Momentum, dict(lr=.01), dict(lr=.01, momentum=.5, nesterov=True), dict(lr=torch.tensor(.01)),
         schedulers=(decay, cycle), wrong=dict(lr=NAN, momentum=1.)),
    info(optim.Adam, dict(lr=.01), dict(lr=.01, betas=(.5, .9), eps=1e-6), dict(lr=torch.tensor(.01), betas=(torch.tensor(.5), .9)),
         schedulers=(decay, cycle), wrong=dict(lr=-1., betas=(1., .9), eps=-1.)),
    info(optim.RMSProp, dict(lr=.01), dict(lr=.01, beta2=.9), dict(lr=torch.tensor(.01)), wrong=dict(lr=NAN, beta2=1.)),
    info(optim.Signum, dict(lr=.01), dict(lr=.01, momentum=0., weight_decay=.1), dict(lr=torch.tensor(.01)), schedulers=(decay, cycle), wrong=dict(lr=-1., momentum=1.)),
    info(optim.Lion, dict(lr=.01), dict(lr=.01, betas=(.5, .9), weight_decay=.1), dict(lr=torch.tensor(.01)), schedulers=(decay, cycle), wrong=dict(lr=NAN, betas=(1., .9))),
    info(optim.ScheduleFreeSGD, dict(lr=.01), dict(lr=.01, momentum=.5, warmup=3, weight_decay=.1), dict(lr=torch.tensor(.01)), wrong=dict(lr=-1., momentum=0.)),
    info(optim.ScheduleFreeAdamW, dict(lr=.01), dict(lr=.01, betas=(.5, .9), r=1., weight_decay=.1), dict(lr=torch.tensor(.01)), wrong=dict(lr=-1., betas=(0., .9))),
    info(optim.AdEMAMix, dict(lr=.01), dict(lr=.01, betas=(.5, .9), beta3=.99, warmup=5, weight_decay=.1), dict(lr=torch.tensor(.01)),
         schedulers=(decay, cycle), wrong=dict(lr=NAN, beta3=1., alpha=-1.)),
    info(optim.Prodigy, dict(d0=.01), dict(lr=.5, betas=(.5, .9), d0=.01, weight_decay=.1, bias_correction=True), dict(lr=torch.tensor(.5), d0=.01), schedulers=(decay, cosine),
         wrong=dict(lr=-1., d0=0.)),
    info(optim.Shampoo, dict(lr=.01), dict(lr=.01, momentum=.5, beta2=.9, every=2, graft="sgd", weight_decay=.1, nesterov=True), dict(lr=torch.tensor(.01)), schedulers=(decay, cycle),
         wrong=dict(lr=-1., momentum=1., graft="no"), supports_complex=False),
    info(optim.SOAP, dict(lr=.01, weight_decay=0.), dict(lr=.01, betas=(.5, .9), every=2, vectors=True, weight_decay=.1), dict(lr=torch.tensor(.01)), schedulers=(decay, cycle),
         wrong=dict(lr=NAN, betas=(1., .9)), supports_complex=False),
    info(Shown, dict(lr=.01, draws="signs"), dict(lr=.01, betas=(.5, .9), gamma=10., every=2, weight_decay=.1, draws="signs"), dict(lr=torch.tensor(.01)), schedulers=(decay, cycle), wrong=dict(lr=-1., betas=(1., .9), gamma=-1., eps=0.),
         supports_complex=False),
    info(optim.SteepestDescent, dict(lr=.001), dict(lr=.001, norm="spectral"), dict(lr=.01, norm="l2", normalized=True), dict(lr=torch.tensor(.001)), wrong=dict(lr=-1., norm="l1"), supports_complex=False),
    info(optim.LAMB, dict(lr=.01), dict(lr=.01, weight_decay=.1, max_grad_norm=.1, adapt="decayed"), dict(lr=torch.tensor(.01)),
         dict(lr=.01, weight_decay=.1, decay="outside", bias_correction="first", norm_high=10.),
         dict(lr=.01, weight_decay=.1, decay="l2", bias_correction="none", ratio_high=1., grad_averaging=False),
         schedulers=(decay, cycle), wrong=dict(lr=-1., betas=(.9, 1.), weight_decay=NAN, decay="in", ratio_high=0.)),
    info(optim.LARS, dict(lr=5.), dict(lr=5., weight_decay=.1, nesterov=True), dict(lr=.01, rate="outside", momentum=0., adapt="decayed"),
         dict(lr=torch.tensor(5.)), schedulers=(decay, cycle), wrong=dict(lr=-1., momentum=-.1, trust=NAN)),
    info(optim.AutomaticGradientDescent, dict(vectors=True), dict(vectors=True, gain=.5, depth=3), schedulers=(),
         supports_complex=False),
    OptimizerInfo(torch.optim.AdamW, optim_inputs_func=inputs(dict(lr=.01)), supported_impls=("foreach",)),
]


def every(info, device, dtype=torch.float32, skip=()):
    "(class, hyperparameters) of every configuration, with each implementation."
    return [(info.optim_cls, c.kwargs) for c in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info, skip)]


def weights(device, dtype=torch.float64, strided=False):
    gen = torch.Generator(device).manual_seed(0)
    shapes = [(10, 5), (10,), (3, 10), (3,)]
    draw = lambda *s: torch.randn(*s, 2, generator=gen, device=device, dtype=dtype)[..., 0]
    return [nn.Parameter(w if strided else w.contiguous()) for w in (draw(*s) for s in shapes)]


def loss(params):
    a, b, c, d = params
    return (c @ torch.tanh(a @ torch.ones(5, device=a.device, dtype=a.dtype) + b) + d - 3).square().sum()


def go(optimizer, params, steps, climbs=False):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(params).backward()
        optimizer.step()


def copies(params): return [nn.Parameter(p.detach().clone()) for p in params]


def equal(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_state(a, b):
    "Are two state dicts equal to the last bit?"
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


class Faces(TestCase):
    @optims([*FACES, KFAC])
    def test_goes_the_right_way_under_every_scheduler(self, device, dtype, optim_info):
        for strided, (cls, hyper) in ((s, c) for s in (False, True) for c in every(optim_info, device)):
            for build in ([], *optim_info.scheduler_inputs):
                params = weights(device, strided=strided)
                optimizer = cls(params, **copy.deepcopy(hyper))
                schedulers, before = [b(optimizer) for b in build], loss(params).item()
                for _ in range(40):
                    go(optimizer, params, 1)
                    for s in schedulers: s.step(*[loss(params).item()] if isinstance(s, ReduceLROnPlateau) else ())
                change = loss(params).item() - before
                self.assertTrue(change > 0 if hyper.get("maximize") else change < 0, f"{hyper} {build} {change}")

    @optims(FACES)
    def test_many_tensors_in_a_call_or_one(self, device, dtype, optim_info):
        for c in optim_info.optim_inputs_func(device):
            ends = []
            for foreach in (True, False, None):
                params = weights(device)
                go(optim_info.optim_cls(params, foreach=foreach, **copy.deepcopy(c.kwargs)), params, 7)
                ends.append(params)
            for other in ends[1:]:
                for a, b in zip(ends[0], other): self.assertEqual(a, b, rtol=1e-13, atol=1e-13)

    @optims([*FACES, KFAC])
    def test_state_dict_goes_through_a_file_to_the_last_bit(self, device, dtype, optim_info):
        for cls, hyper in every(optim_info, device):
            params = weights(device)
            optimizer = cls(params, **copy.deepcopy(hyper))
            go(optimizer, params, 3)
            file, twins = io.BytesIO(), copies(params)
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            twin = cls(twins, **copy.deepcopy(hyper))
            twin.load_state_dict(torch.load(file, weights_only=True))
            self.assertTrue(same_state(optimizer.state_dict(), twin.state_dict()))
            go(optimizer, params, 3)
            go(twin, twins, 3)
            self.assertTrue(equal(params, twins))

    @optims([*FACES, KFAC])
    def test_copies_and_pickles_go_on_alike(self, device, dtype, optim_info):
        for cls, hyper in every(optim_info, device):
            params = weights(device)
            optimizer = cls(params, **copy.deepcopy(hyper))
            go(optimizer, params, 2)
            for twins, twin in (copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))):
                self.assertEqual({k for k in vars(twin) if k[0] != "_"}, {k for k in vars(optimizer) if k[0] != "_"})
                here = copies(params)
                stay = cls(here, **copy.deepcopy(hyper))
                stay.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                go(twin, twins, 2)
                go(stay, here, 2)
                self.assertTrue(equal(twins, here))

    @optims([*FACES, KFAC])
    def test_gradients_are_left_alone(self, device, dtype, optim_info):
        for cls, hyper in every(optim_info, device):
            params = weights(device)
            optimizer = cls(params, **copy.deepcopy(hyper))
            for _ in range(3):
                optimizer.zero_grad()
                loss(params).backward()
                before = [(p.grad, p.grad._version, p.grad.clone()) for p in params]
                optimizer.step()
                for p, (g, version, value) in zip(params, before):
                    self.assertTrue(p.grad is g and g._version == version and torch.equal(g, value))

    @optims([*FACES, KFAC])
    def test_without_gradients_nothing_happens(self, device, dtype, optim_info):
        for cls, hyper in every(optim_info, device):
            params = weights(device)
            optimizer, before = cls(params, **copy.deepcopy(hyper)), copies(params)
            optimizer.step()
            self.assertTrue(equal(params, before))
            self.assertEqual(len(optimizer.state_dict()["state"]), 0)
            if optim_info.optim_cls is torch.optim.AdamW or hyper.get("weight_decay"): continue
            for p in params: p.grad = torch.zeros_like(p)
            optimizer.step()
            self.assertTrue(equal(params, before))

    @optims(FACES)
    def test_one_parameter_without_gradient_counts_its_own_steps(self, device, dtype, optim_info):
        if optim_info.optim_cls in (optim.AutomaticGradientDescent, optim.Prodigy, optim.SteepestDescent): return       # there all blocks know each other
        for cls, hyper in every(optim_info, device):
            if hyper.get("max_grad_norm"): continue                             # and here
            params, late = weights(device), copies(weights(device)[2:3])
            both, alone = cls(params[:1] + late, **copy.deepcopy(hyper)), cls(copies(late), **copy.deepcopy(hyper))
            for k in range(5):
                params[0].grad = torch.full_like(params[0], k + 1.)
                if k > 2: late[0].grad = torch.full_like(late[0], k - 1.)
                both.step()
            for k in range(3, 5):
                twin = alone.param_groups[0]["params"][0]
                twin.grad = torch.full_like(twin, k - 1.)
                alone.step()
            self.assertEqual(late[0], twin, rtol=1e-13, atol=1e-13)

    @optims(FACES)
    def test_complex_is_a_pair_of_reals(self, device, dtype, optim_info):
        for cls, hyper in every(optim_info, device):
            gen = torch.Generator(device).manual_seed(1)
            w = nn.Parameter(torch.randn(4, 3, generator=gen, device=device, dtype=torch.complex128))
            if not optim_info.supports_complex:
                with self.assertRaisesRegex(TypeError, "no meaning for complex"): cls([w], **copy.deepcopy(hyper))
                continue
            pair = nn.Parameter(torch.view_as_real(w.detach()).clone())
            optimizers = [cls([p], **copy.deepcopy(hyper)) for p in (w, pair)]
            for _ in range(4):
                w.grad = torch.randn(4, 3, generator=gen, device=device, dtype=torch.complex128)
                pair.grad = torch.view_as_real(w.grad).clone()
                for o in optimizers: o.step()
                self.assertEqual(torch.view_as_real(w.detach()), pair.detach(), rtol=1e-13, atol=1e-13)

    @optims([*FACES, KFAC])
    def test_a_tensor_is_a_learning_rate_like_a_number(self, device, dtype, optim_info):
        if not optim_info.scheduler_inputs: return
        for lr in (torch.tensor(.01, dtype=torch.float64), torch.tensor([.01], dtype=torch.float64)):
            ends = []
            for rate in (lr, .01):
                params = weights(device)
                optimizer = optim_info.optim_cls(params, lr=rate)
                scheduler = ExponentialLR(optimizer, .9)
                for _ in range(4):
                    go(optimizer, params, 1)
                    scheduler.step()
                ends.append(params)
                self.assertEqual(isinstance(optimizer.param_groups[0]["lr"], torch.Tensor), rate is lr)
            for a, b in zip(*ends): self.assertEqual(a, b, rtol=1e-12, atol=1e-12)

    @optims([*FACES, KFAC])
    def test_closure_has_gradients_enabled_and_its_loss_comes_back(self, device, dtype, optim_info):
        for cls, hyper in every(optim_info, device):
            params = weights(device)
            optimizer, seen = cls(params, **copy.deepcopy(hyper)), []

            def closure():
                seen.append(torch.is_grad_enabled())
                optimizer.zero_grad()
                value = loss(params)
                value.backward()
                return value
            before = loss(params).item()
            with torch.no_grad(): self.assertEqual(optimizer.step(closure).item(), before)
            self.assertEqual(seen, [True])

    @optims(FACES)
    def test_hooks_names_groups_and_older_files(self, device, dtype, optim_info):
        cls, hyper = every(optim_info, device)[0]
        params, called = weights(device), []
        optimizer = cls(list(zip("abcd", params)), **copy.deepcopy(hyper))
        optimizer.register_step_pre_hook(lambda *_: called.append("before"))
        optimizer.register_step_post_hook(lambda *_: called.append("after"))
        go(optimizer, params, 2)
        self.assertEqual(called, ["before", "after"] * 2)
        self.assertIn(cls.__name__, repr(optimizer))
        state = copy.deepcopy(optimizer.state_dict())
        self.assertEqual(state["param_groups"][0]["param_names"], list("abcd"))
        for flag in set(optim_info.not_og_supported_flags) & state["param_groups"][0].keys(): del state["param_groups"][0][flag]
        plain = cls(list(zip("abcd", copies(params))), **copy.deepcopy(hyper))
        plain.load_state_dict(state)
        twins = plain.param_groups[0]["params"]
        go(plain, twins, 1)
        go(optimizer, params, 1)
        self.assertTrue(equal(twins, params))
        late = nn.Parameter(torch.ones(2, 2, device=device))
        plain.add_param_group({"params": [("e", late)]})
        late.grad = torch.ones_like(late)
        for _ in range(2): plain.step()            # SOAP's first makes its bases
        self.assertFalse(torch.equal(late, torch.ones_like(late)))

    @optims([i for i in FACES if i.optim_error_inputs_func])
    def test_bad_input(self, device, dtype, optim_info):
        for bad in optim_info.optim_error_inputs_func(device, dtype):
            given, cls = bad.optimizer_error_input, optim_info.optim_cls
            params = weights(device) if given.params is None else given.params
            hyper = {"lr": .1} | given.kwargs
            self.assertIs(bad.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            if issubclass(bad.error_type, Warning):
                with warnings.catch_warnings():
                    warnings.simplefilter("error", bad.error_type)
                    with self.assertRaisesRegex(bad.error_type, bad.error_regex): cls(params, **hyper)
            else:
                with self.assertRaisesRegex(bad.error_type, bad.error_regex): cls(params, **hyper)


instantiate_device_type_tests(Faces, globals(), only_for="cpu")
