"""A device called elsewhere, which computes on the CPU and refuses what a GPU refuses; `test_device` runs these tests in a process
of their own, because a device is registered for good."""
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from gradnb import (GD, LAMB, Adam, AutomaticGradientDescent, CentralFlow, Descent, FromTorch, GradientFlow, Groups, MiniBatch, Momentum, ScheduleFreeSGD,
                    Problem, Spec, Store, Stream, build_model, load_dataset, measure, optim, train, watch)
from gradnb.measure.flatness.centre import MEASURES, Centre
from gradnb.measure.probes.view import PROBES
from gradnb.ground.roles import ESTIMATORS, RULES
from gradnb.linalg.spectra import spectrum
from gradnb.runs.sweeps.many import sweep
from test_optim_faces import CASES, blocks, build

HERE, THERE = "cpu", "elsewhere"


class Device(_DummyBackendModule):
    "What torch asks of a device; its random numbers are the CPU's."
    def get_rng_state(self, device=None): return torch.get_rng_state()
    def set_rng_state(self, state, device=None): torch.set_rng_state(state)
    def get_amp_supported_dtype(self): return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend(THERE, backend_module=Device())
_generator = Stream.generator
Stream.generator = lambda self, device=HERE: _generator(self)      # a device made in Python has no generators


class There(torch.Tensor):
    "A tensor on the device, around one on the CPU."
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=torch.device(THERE, 0))

    def __init__(self, inner): self.inner = inner

    def untyped_storage(self): return self.inner.untyped_storage()

    def tolist(self): return self.detach().cpu().tolist()

    def numpy(self, **kwargs): raise TypeError(f"can't convert a tensor on {THERE} to numpy; use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return compute(func, args, kwargs or {})


def away(device): return device is not None and torch.device(device).type == THERE


MOVES = "aten::_to_copy", "aten::copy_", "aten::_foreach_copy_"
INDEXES = "aten::index", "aten::index_put", "aten::index_put_"
LOOKS = []                                                         # operations that wait for the device


def nested(f, x):
    "With f(x) for every x in lists and tuples: all that an operation takes, in a tenth of the time of a `tree_map`."
    return [nested(f, y) for y in x] if isinstance(x, list) else tuple([nested(f, y) for y in x]) if isinstance(x, tuple) else f(x)


def compute(func, args, kwargs):
    "An operation on the CPU, whose tensors must be on one device; as on a GPU, a number () or an index may come from the CPU."
    name, tensors = func.name().split(".")[0], []
    nested(lambda t: tensors.append(t) if isinstance(t, torch.Tensor) else None, (args, *kwargs.values()))
    there = [t for t in tensors if isinstance(t, There)]
    strange = [t for t in tensors if t.ndim and not isinstance(t, There) and not (name in INDEXES and t.dtype in (torch.int64, torch.bool))]
    if there and strange and name not in MOVES: raise RuntimeError(f"{func} of tensors on two devices, {[(tuple(t.shape), str(t.device)) for t in tensors]}")
    if there and (name == "aten::_local_scalar_dense" or name == "aten::_to_copy" and not away(kwargs.get("device", THERE))): LOOKS.append(name)
    result_there = bool(there) if kwargs.get("device") is None else away(kwargs["device"])
    own = {id(t.inner): t for t in there}                          # what is changed in place stays the tensor it is
    def unwrap(x):
        if isinstance(x, There): return x.inner
        return torch.device(HERE) if isinstance(x, torch.device) and away(x) else x
    def wrap(x): return own.get(id(x)) if id(x) in own else There(x) if result_there and isinstance(x, torch.Tensor) else x
    with _disable_current_modes(): out = func(*nested(unwrap, args), **{k: nested(unwrap, x) for k, x in kwargs.items()})
    return args[0] if name == "aten::copy_" else nested(wrap, out)


class Factories(TorchDispatchMode):
    "Operations that make tensors on the device."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return compute(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    "Tensors from Python's numbers, which torch fills below dispatch."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list): args = args[0], torch.tensor(args[1], dtype=torch.int64)
        if func is torch.Tensor.new_tensor: func, args, kwargs = torch.tensor, args[1:], dict(dtype=args[0].dtype, device=args[0].device) | kwargs
        if func not in (torch.tensor, torch.as_tensor): return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        data = args[0]
        out = data if isinstance(data, torch.Tensor) else func(*args, **kwargs)
        return out.to(device or out.device, kwargs.get("dtype") or out.dtype)


@contextmanager
def elsewhere():
    with Factories(), Literals(): yield


def same(work, tolerance=1e-9):
    "What `work` computes from a function that moves things to the device is what it computes on the CPU."
    here = tree_leaves(work(HERE))
    with elsewhere(): there = tree_leaves(work(THERE))
    assert here and len(here) == len(there)
    on_it = [t for t in there if isinstance(t, There)]
    assert on_it
    for a, b in zip(here, there):
        if isinstance(b, There): b = b.inner
        if isinstance(a, (torch.Tensor, float)): torch.testing.assert_close(torch.as_tensor(b), torch.as_tensor(a), rtol=tolerance, atol=tolerance, equal_nan=True)


DIGITS = load_dataset("digits-60").to(HERE, torch.float64)


def problem(where, model="fc-tanh:width=8,depth=2", loss="ce", data=DIGITS):
    data = data.to(where)
    return Problem(build_model(model, data), loss, data)


def numbers(traces): return {f"{k}.{c}": torch.tensor(v) for k, t in traces.items() for c, v in t.columns.items() if v.dtype.kind in "fi"}


def test_it_refuses_what_a_gpu_refuses():
    with elsewhere():
        x, y = torch.ones(3, device=THERE), torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"): x + y
        with pytest.raises(RuntimeError, match="two devices"): torch._foreach_add_([x], [y])
        with pytest.raises(TypeError, match="cpu"): x.numpy()
        assert (x + torch.tensor(2.)).tolist() == [3.] * 3 and x[torch.tensor([0])].device.type == THERE
        x[1:].add_(1)
        assert x.tolist() == [1., 2., 2.]


@pytest.mark.parametrize("rule", ["gd:lr=.1", "momentum:lr=.1,nesterov=True", "adam", "rmsprop", "lamb", "lamb-timm", "lamb-pytorch_optimizer",
                                  "lars-paper:lr=1.", "agd:vectors=True", "kfac:lr=.1,every=2,invert=4", "kfac:lr=.1,ekfac=True", "sophia:lr=.01,gamma=1,every=2", "sophia:lr=.01,gamma=1,curvature=gnb,size=20", "groups"])
def test_rules(rule):
    if rule == "groups": rule = Groups((("matrix", LAMB(.01)), ("*", FromTorch(torch.optim.AdamW, lr=1e-3))))
    else: rule = RULES.build(rule)
    def work(where):
        state, traces = train(problem(where), Descent(rule, MiniBatch(10)), 8, progress=False)
        return state.theta, state.rule, numbers(traces)
    same(work)


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("name, hyper", CASES, ids=str)
def test_faces_without_looking(name, hyper, foreach):
    def work(where):
        params, gen = [nn.Parameter(p.detach().to(where)) for p in blocks()], Stream(3).generator()
        optimizer = build(name, **hyper, foreach=foreach)(params)
        for _ in range(5):
            for p in params: p.grad = torch.randn(p.shape, generator=gen, dtype=p.dtype).to(where)
            LOOKS.clear()
            optimizer.step()
            assert not LOOKS
        return [p.detach() for p in params]
    same(work, 1e-12)


@pytest.mark.parametrize("ekfac", [False, True])
def test_face_of_kfac(ekfac):
    def work(where):
        data = DIGITS.to(where)
        net = build_model("fc-tanh:width=8,depth=2", data)
        optimizer = optim.KFAC(net, .1, every=2, invert=2, ekfac=ekfac)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.x), data.y).backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]
    same(work)


@pytest.mark.parametrize("estimator", ["asam:rho=.05,size=10", "sam:rho=.05,size=10", "dropexamples:size=10", "fullbatch", "gradientclustering:size=10",
                                       "importancesampling:size=10", "onlineclustering:size=10", "stratified:size=10", "svrg:size=10,every=5", "projected:k=2,size=10,every=3"])
def test_estimators(estimator):
    same(lambda where: train(problem(where), Descent(GD(.1), ESTIMATORS.build(estimator)), 8, progress=False)[0].theta)


ARGUMENTS = {"spectrum": "draws=2,steps=12", "generalized_sharpness": "norm=spectral,starts=1,tol=.1", "tail_index": "draws=80,surrogates=3", "noise_norms": "draws=48", "batch_tests": "examples=20",
             "original_index": "size=10", "flatness": "measure=sam", "rule": "field=velocity", "subspace": "k=2,tol=.1", "gauss_newton": "k=2,tol=.1", "averaged": "probe=[grad_norm:every=2]",
             "batch_sharpness": "draws=8", "interaction_sharpness": "draws=8", "update_radius": "tol=.1,products=6", "sharpness": "tol=.1", "preconditioned_sharpness": "tol=.1", "stabilization": "tol=.1",
             "published_variance": "draws=8", "update_variance": "draws=8", "frobenius": "products=8,examples=20"}
STEPPERS = {"agd": Descent(AutomaticGradientDescent(vectors=True), MiniBatch(10)), "trust_ratio": Descent(LAMB(), MiniBatch(10)),
            "clusters": Descent(Momentum(.1), ESTIMATORS.build("gradientclustering:size=10")), "flow": GradientFlow(.1),
            "averaged": Descent(ScheduleFreeSGD(.1), MiniBatch(10))}


@pytest.mark.parametrize("probe", list(PROBES))
def test_probes(probe):
    def work(where):
        stepper = STEPPERS.get(probe, Descent(Momentum(.1), MiniBatch(10)))
        state, traces = train(problem(where), stepper, 4, [PROBES.build(f"{probe}:{'every=2,' * (probe != 'averaged')}{ARGUMENTS.get(probe, '')}")], progress=False)
        assert len(traces) == 2
        return state.theta, numbers(traces)
    same(work, 1e-6)


@pytest.mark.parametrize("stepper", [GradientFlow(.1), CentralFlow(GD(.1))], ids=lambda s: type(s).__name__)
def test_flows(stepper):
    same(lambda where: train(problem(where, loss="mse"), stepper, 3, progress=False)[0].theta)


TOKENS = load_dataset("copying:n=100,length=3")


@pytest.mark.parametrize("model", ["fc-bn-tanh:width=6", "cnn-tanh:width=4", "cnn-bn-relu:width=4", "fcn", "vit", "preact-resnet18:width=4",
                                   "lstm", "transformer", "mamba"])
def test_models(model):
    data = TOKENS if model in ("lstm", "transformer", "mamba") else DIGITS
    def work(where):
        state, traces = train(problem(where, model, data=data), Descent(Momentum(.01), MiniBatch(10)), 3, [PROBES.build("train:every=2")], progress=False)
        return state.theta, state.buffers, numbers(traces)
    same(work, 1e-5 if data is TOKENS else 1e-9)     # words leave the network in float32


def test_dropout_and_augmentation():
    flip = lambda x, gen: torch.where(torch.rand(len(x), 1, 1, 1, generator=gen).to(x.device) < .5, x, x.flip(-1))
    data = replace(DIGITS, augment=flip)
    def work(where):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(.5), nn.Linear(10, 10)).double()
        with torch.no_grad():
            for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=Stream(1).generator()) / 8)
        return train(Problem(net.to(where), "ce", data), Descent(GD(.1), MiniBatch(10)), 3, progress=False)[0].theta
    same(work)


@pytest.mark.parametrize("measure", sorted({*MEASURES} - {"fisher_rao"}))      # torch has no forward derivatives of such a device
def test_measures(measure):
    def work(where):
        p = problem(where)
        return [p.theta0, *map(float, MEASURES.build(measure, Centre(p, p.theta0, None, Stream() / "flatness"))[:3])]
    same(work, 1e-6)


@pytest.mark.parametrize("kind", ["a Dataset", "batches"])
def test_a_loop_that_is_watched(kind):
    "A loop of one's own, with AdamW and BatchNorm; and its last weights after the fact."
    probes = ["sharpness:every=2,tol=.1", "grad_variance:every=2,draws=4", "preconditioned_sharpness:every=2,tol=.1", "relative_updates:every=2"]
    def work(where):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 10)).double()
        with torch.no_grad():
            for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=Stream(1).generator()) / 4)
        net, x, y = net.to(where), DIGITS.x.double().to(where), DIGITS.y.to(where)
        opt, data = torch.optim.AdamW(net.parameters(), .01), DIGITS if kind == "a Dataset" else [(x[i:i + 20], y[i:i + 20]) for i in (0, 20, 40)]
        seen = watch(net, "ce", data, probes, opt, batch_size=10)
        for k in range(4):
            loss = nn.functional.cross_entropy(net(x[10 * k:][:20]), y[10 * k:][:20])
            opt.zero_grad(), loss.backward(), opt.step()
            seen.step(loss)
        seen.close()
        assert not seen.failures and len(seen.traces["sharpness"]) == 3
        after = measure(Problem(net, "ce", data), weights=[net.state_dict()], probes=["sharpness:tol=.1"])
        return [p.detach() for p in net.parameters()], {k: v for k, v in numbers(seen.traces).items() if not k.endswith("seconds")}, numbers(after)
    same(work, 1e-5)


def test_derivatives():
    def work(where):
        p = problem(where)
        point, v = p.at(p.theta0), torch.linspace(-1, 1, p.p, dtype=p.dtype, device=p.device)
        return [point.grad, point.hvp(v), point.hvp(torch.stack([v, v.flip(0)], 1)), point.ggn(v), point.fisher(v), point.quadratic(v), point.curvature_grad(v, v),
                p.example_grads(p.theta0), *spectrum(point.hvp, p.p, 3, 8, dtype=p.dtype, device=p.device)[:2]]
    same(work)


SPEC = Spec("digits-60", "fc-tanh:width=8", "ce", Adam(.01), 12, MiniBatch(10), ("sharpness:every=4,tol=.1", "test:every=5"), dtype="float64")


def test_stored_runs(tmp_path):
    "A run that was cut short goes on where it was, on the device."
    def work(where):
        short = Store(tmp_path / where / "short").run(replace(SPEC, steps=6), where, progress=False)
        run = Store(tmp_path / where).run(SPEC, where, progress=False)
        return problem(where).theta0, numbers(run.traces), run.theta, short.theta
    same(work)


def test_runs_together(tmp_path):
    def work(where):
        specs = [replace(SPEC, seed=seed, steps=8) for seed in range(2)]
        sweep(specs, tmp_path / where, vectorize=True, device=where, progress=False)
        runs = [Store(tmp_path / where).open(s) for s in specs]
        assert all("vectorized" in r.manifest for r in runs)
        return problem(where).theta0, [r.theta for r in runs], [numbers(r.traces) for r in runs]
    same(work)
