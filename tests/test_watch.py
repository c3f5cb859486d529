"A training in somebody else's loop: bitwise as if nobody had looked, counted right, and its numbers those of our own run."
import gc
import random
import subprocess
import sys
import textwrap
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import gradnb
from gradnb import Descent, FromTorch, Problem, Stream, every, load_dataset, probe, train
from gradnb.data import Dataset
from gradnb.move.estimators.minibatch import MiniBatch
from gradnb.runs.foreign import watch as foreign
from gradnb.runs.foreign.watch import Watch

DOUBLE = torch.float64
DATA = load_dataset("digits-200")
ce = nn.functional.cross_entropy


@probe(every(2))
def draws(view): return random.random() + np.random.rand()


@probe(every(2))
def torch_draws(view): return torch.rand(())


@probe(every(3))
def fails(view): raise MemoryError("no room")


@probe(every(3))
def writes(view): view.theta.zero_(); return 0.


PROBES = ["sharpness:every=3", "grad_variance:every=3,draws=4", "preconditioned_sharpness:every=3", "update_variance:every=3,draws=3", "test:every=3",
          "critical_sharpness:every=3", "relative_updates:every=3", "update_angles:every=3", "noise_scales:every=3,examples=8", "spikes:every=3", "tail_index:every=6,draws=80,surrogates=0", draws, torch_draws, fails, writes]


def net(norm=False, drop=0.):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(drop), nn.Linear(8, 10))


class Augmented(torch.utils.data.Dataset):
    "Draws from all three generators, in the workers of its loader."
    def __len__(self): return 96

    def __getitem__(self, i):
        return DATA.x[i] + .1 * torch.randn(()) + .1 * np.random.rand() + .1 * random.random(), DATA.y[i]


def sgd(look):
    model = net()
    opt = torch.optim.SGD(model.parameters(), .1)
    with look(model, opt) as seen:
        for _ in range(7):
            i = torch.randint(DATA.n, (32,))
            loss = ce(model(DATA.x[i]), DATA.y[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
            seen.step(loss)
    return model, opt


def accumulated(look):
    model = net()
    opt = torch.optim.AdamW(model.parameters(), .01)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, .02, total_steps=20)
    with look(model, opt) as seen:
        for k in range(14):
            i = torch.randint(DATA.n, (16,))
            loss = ce(model(DATA.x[i]), DATA.y[i]) / 2
            loss.backward()
            if k % 2:
                nn.utils.clip_grad_norm_(model.parameters(), .5)
                opt.step()
                sched.step()
                opt.zero_grad(set_to_none=False)
                seen.step(loss)
    return model, opt, sched


def mixed(look):
    model = net()
    opt, scaler = torch.optim.AdamW(model.parameters(), .01), torch.amp.GradScaler("cpu", init_scale=2.**10, growth_interval=2)
    with look(model, opt) as seen:
        for k in range(7):
            i = torch.randint(DATA.n, (16,))
            with torch.autocast("cpu", torch.bfloat16):
                loss = ce(model(DATA.x[i]), DATA.y[i])
                scaler.scale(loss * (float("inf") if k == 3 else 1)).backward()
                scaler.step(opt)
                scaler.update()
                seen.step(loss)                     # inside autocast
                assert torch.is_autocast_enabled("cpu") and (model(DATA.x[:4]).dtype == torch.bfloat16)
            opt.zero_grad()
    return model, opt, scaler.state_dict()


def noisy(look):
    model = net(norm=True, drop=.2)
    opt = torch.optim.RMSprop(model.parameters(), .01, momentum=.5)
    gen = torch.Generator().manual_seed(5)
    loader = torch.utils.data.DataLoader(Augmented(), 16, shuffle=True, generator=gen)
    rest, it = torch.utils.data.DataLoader(Augmented(), 8, num_workers=1), None
    with look(model, opt) as seen:
        it = iter(rest)
        for x, y in loader:
            more, labels = next(it)
            model.train()
            loss = ce(model(torch.cat([x, more])), torch.cat([y, labels]))
            loss.backward()
            opt.step()
            opt.zero_grad()
            model.eval()
            with torch.no_grad(): seen.step(loss)      # where many call it
            assert not model.training
    return model, opt, gen.get_state(), next(it)


def compiled(look):
    model = net()
    fast, opt = torch.compile(model, backend="eager"), torch.optim.SGD(model.parameters(), .1, momentum=.9)
    with look(fast, opt) as seen:
        for k in range(7):
            loss = ce(fast(DATA.x[32 * k % 160:][:32]), DATA.y[32 * k % 160:][:32])
            loss.backward()
            opt.step()
            opt.zero_grad()
            seen.step(loss)
    return model, opt


def averaged(look):
    model = net(norm=True)
    mean, opt = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.9), use_buffers=True), torch.optim.SGD(model.parameters(), .1)
    with look(model, opt) as seen, look(mean, None) as second:          # two watches, of what is trained and of its mean
        for k in range(7):
            loss = ce(model(DATA.x[:64]), DATA.y[:64])
            loss.backward()
            opt.step()
            opt.zero_grad()
            mean.update_parameters(model)
            seen.step(loss)
            second.step()
    return model, mean, opt


def loaded(look):
    "A shuffling loader whose data set augments, an objective of its own, and steps told under inference mode."
    model, loader = net(), torch.utils.data.DataLoader(Augmented(), 32, shuffle=True)
    opt = torch.optim.NAdam(model.parameters(), .01)
    def objective(model, batch): return ce(model(batch[0]), batch[1])
    with look((model, objective, loader), opt) as seen:
        for _ in range(2):
            for batch in loader:
                loss = objective(model, batch)
                loss.backward()
                opt.step()
                opt.zero_grad()
                with torch.inference_mode(): seen.step(loss)
    return model, opt


def on_a_gpu(look):
    "Dropout draws from the GPU's own generator, in bfloat16."
    model = net(drop=.2).cuda()
    opt = torch.optim.AdamW(model.parameters(), .01)
    x, y = DATA.x.cuda(), DATA.y.cuda()
    with look(model, opt) as seen:
        for _ in range(7):
            i = torch.randint(DATA.n, (32,), device="cuda")
            with torch.autocast("cuda", torch.bfloat16): loss = ce(model(x[i]), y[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
            seen.step(loss)
    return model, opt, torch.cuda.get_rng_state_all()


class Nobody:
    "No watch."
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def step(self, loss=None): pass


def everything(things):
    "Tensors and numbers by path, of modules with their gradients, modes and hooks, of optimizers, and of all generators."
    found = {"rng": (random.getstate(), [*np.random.get_state()], torch.get_rng_state(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))}
    for i, t in enumerate(things):
        if isinstance(t, nn.Module):
            found[i] = ({k: v.clone() for k, v in t.state_dict().items()}, {k: (p.grad, p._version, p.requires_grad) for k, p in t.named_parameters()},
                        {k: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for k, m in t.named_modules()})
        elif hasattr(t, "param_groups"): found[i] = t.state_dict(), len(t._optimizer_step_post_hooks), len(t._optimizer_step_pre_hooks)
        else: found[i] = {k: v for k, v in t.state_dict().items() if not callable(v)} if hasattr(t, "state_dict") else t
    return found


def equal(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def run(loop, look):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    return everything(loop(look))


@pytest.mark.parametrize("loop", [sgd, accumulated, mixed, noisy, compiled, averaged, loaded, pytest.param(on_a_gpu, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))], ids=lambda f: f.__name__)
def test_bitwise_as_if_nobody_had_looked(loop, capsys):
    watches = []
    def look(model, opt):
        parts, size = (model, {}) if isinstance(model, tuple) else ((model, "ce", DATA), dict(batch_size=16))
        watches.append(gradnb.watch(*parts, probes=[p for p in PROBES if parts[2] is DATA or not str(p).startswith(("test", "tail"))], optimizer=opt, **size))
        return watches[-1]
    with warnings.catch_warnings(record=True) as words:
        warnings.simplefilter("always")
        with torch.random.fork_rng([]): watched = run(loop, look)
    with torch.random.fork_rng([]): alone = run(loop, lambda *_: Nobody())
    for k in alone: assert equal(watched[k], alone[k]), k
    (seen, *_), said = watches, " ".join({str(w.message) for w in words})
    due = {0, 3, 6}
    for name in ("update_angles", "sharpness", "grad_variance", "preconditioned_sharpness", "update_variance", "critical_sharpness", "relative_updates", "test"):
        if name == "test" and loop is loaded: continue
        assert {*seen.traces[name].steps} == due and np.isfinite(seen.traces[name].values).all(), (name, seen.failures)
    assert loop in (noisy, averaged) or np.isfinite(seen.traces["noise_scales"].columns["variance"]).all() and len(seen.traces["spikes"]) == 3
    for name, why in dict(fails="MemoryError: no room", torch_draws="drew from torch's global generator", writes="wrote into the run's state").items():
        assert why in next(iter(seen.failures[name].values())) and np.isnan(seen.traces[name].values).all() and said.count(f"probe {name!r} failed") == 1
    assert "'draws' drew from NumPy's" in said and "'draws' drew from Python's" in said and np.isfinite(seen.traces["draws"].values).all()


RANKS = textwrap.dedent("""
    import sys, torch
    import torch.distributed as dist
    from torch import nn
    import gradnb
    from gradnb.problem.parallel import together
    from gradnb.data import load_dataset
    data = load_dataset("digits-200")

    def loop(look):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
        wrapped = nn.parallel.DistributedDataParallel(model)
        opt = torch.optim.Adam(wrapped.parameters(), .01)
        seen = look(wrapped, opt)
        for k in range(6):
            i = torch.randint(data.n, (16,))
            loss = nn.functional.cross_entropy(wrapped(data.x[i]), data.y[i])
            loss.backward(), opt.step(), opt.zero_grad()
            if seen: seen.step(loss)
        if seen: seen.close()
        return torch.cat([p.detach().flatten() for p in model.parameters()]), torch.get_rng_state(), seen

    with together():
        rows = []
        theta, rng, seen = loop(lambda model, opt: gradnb.watch(model, "ce", data, ["sharpness:every=2", "preconditioned_sharpness:every=3"], opt,
                                                                log=lambda row, step: rows.append(step)))
        alone, rng0, _ = loop(lambda *_: None)
        first = dist.get_rank() == 0
        assert torch.equal(theta, alone) and torch.equal(rng, rng0)
        assert ("sharpness" in seen.traces) == first and bool(rows) == first
        assert not first or seen.traces["sharpness"].steps.tolist() == [0, 2, 4, 6]
""")


@pytest.mark.slow
def test_two_ranks(tmp_path):
    (tmp_path / "run.py").write_text(RANKS)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "run.py"],
                          capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr


def small(groups=False):
    "A tanh network of 50 parameters in double precision, and its 30 examples."
    gen = Stream(3).generator()
    x, y = (torch.randn(30, d, generator=gen, dtype=DOUBLE) for d in (5, 2))
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    for p in model.parameters(): p.data = torch.randn(p.shape, generator=gen, dtype=DOUBLE) / 2
    return model, Dataset(x, y, x, y, None, "random")


def plain(model, data, opt, seen, steps=6, sched=None):
    for _ in range(steps):
        loss = (model(data.x) - data.y).square().mean(1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if sched: sched.step()
        seen.step(loss)
    seen.close()
    return seen.traces


class Open:
    "A watch that `plain` does not close."
    traces = {}
    def __init__(self, seen): self.step, self.close = seen.step, lambda: None


OPTIMIZERS = [
    (torch.optim.SGD, dict(lr=.05)), (torch.optim.SGD, dict(lr=.05, momentum=.9)), (torch.optim.SGD, dict(lr=.05, momentum=.9, nesterov=True)),
    (torch.optim.SGD, dict(lr=.05, momentum=.8, dampening=.3, weight_decay=.01)), (torch.optim.Adam, dict(lr=.01)),
    (torch.optim.Adam, dict(lr=.01, amsgrad=True, weight_decay=.01)), (torch.optim.AdamW, dict(lr=.01, betas=(.8, .95), weight_decay=.1)),
    (torch.optim.RMSprop, dict(lr=.01, momentum=.5)), (torch.optim.RMSprop, dict(lr=.01, centered=True, weight_decay=.01)),
    (torch.optim.Adagrad, dict(lr=.1, lr_decay=.1, weight_decay=.01)), (torch.optim.NAdam, dict(lr=.01)),
    (torch.optim.NAdam, dict(lr=.01, weight_decay=.1, decoupled_weight_decay=True)),
]
WORDS = ["sharpness:tol=1e-7,every=2", "preconditioned_sharpness:tol=1e-7,every=2", "directional_sharpness:along=step,every=2", "update_norms:every=2"]


@pytest.mark.parametrize(("cls", "hyper"), OPTIMIZERS, ids=lambda v: "-".join(v) if isinstance(v, dict) else v.__name__)
def test_the_numbers_of_our_own_run(cls, hyper):
    model, data = small()
    opt, words = cls(model.parameters(), **hyper), [*WORDS, *["update_radius:every=4,tol=1e-4"] * (len(hyper) == 2)]
    theirs = plain(model, data, opt, gradnb.watch(model, "mse", data, words, opt), 4)
    problem = Problem(small()[0], "mse", data)
    _, ours = train(problem, Descent(FromTorch(cls, **hyper)), 4, words, progress=False)
    for name in ours:
        for column in set(ours[name].columns) - {"residual", "matvecs", "error", "products"}:
            n = 4 if name == "loss" else len(ours[name])           # the loss at the last weights is not computed in a loop
            np.testing.assert_allclose(theirs[name].columns[column], ours[name].columns[column][:n], rtol=1e-6, err_msg=f"{name}.{column}")


@pytest.mark.parametrize("attached", [False, True])
def test_under_a_schedule_the_threshold_is_that_of_the_next_step(attached):
    model, data = small()
    opt = torch.optim.Adam(model.parameters(), .01)
    sched = torch.optim.lr_scheduler.ExponentialLR(opt, .5)
    seen = gradnb.watch(model, "mse", data, "preconditioned_sharpness:every=1", opt)
    traces = plain(model, data, opt, seen.attach() if attached else seen, 4, sched)
    np.testing.assert_allclose(traces["preconditioned_sharpness"].columns["threshold"], [38 / (.01 * .5 ** k) for k in range(5)], rtol=1e-12)


def test_groups_against_a_dense_matrix():
    "Groups with rates, decays and β₂ of their own: λ of P^{-1/2} (H + D) P^{-1/2} with P written down block by block."
    model, data = small()
    groups = [dict(params=model[0].parameters(), lr=.02, betas=(.9, .95)), dict(params=model[2].parameters(), weight_decay=.1)]
    opt = torch.optim.Adam(groups, .005)
    seen = gradnb.watch(model, "mse", data, "preconditioned_sharpness:every=3,tol=1e-10", opt)
    row = plain(model, data, opt, seen, 3)["preconditioned_sharpness"].frame().iloc[-1]
    problem = Problem(model, "mse", data)
    theta, rates, decays, rest = problem.theta0, [], [], []
    H, grad = problem.hvp(theta, torch.eye(problem.p, dtype=DOUBLE)), problem.grad_and_loss(theta)[0]
    for (n, p), g in zip(model.named_parameters(), problem.layout.split(grad)):
        group, s = opt.param_groups[n.startswith("2")], opt.state[p]
        g = g + group["weight_decay"] * p.detach()
        b1, b2 = group["betas"]
        v = (b2 * s["exp_avg_sq"] + (1 - b2) * g ** 2) / (1 - b2 ** 4)
        rest.append(((v.sqrt() + 1e-8) * (1 - b1 ** 4)).flatten())
        rates.append(torch.full((p.numel(),), group["lr"])), decays.append(torch.full((p.numel(),), group["weight_decay"]))
    P, lr, D = (torch.cat(t).double() for t in (rest, rates, decays))
    S = (lr / P).sqrt()                              # stable below (2 + 2β)/(1 − β)
    top = torch.linalg.eigvalsh(S[:, None] * (H + D.diag()) * S)[-1].item()
    assert row["value"] / row["threshold"] == pytest.approx(top / 38, rel=1e-6)


SPLIT = {
    "groups": lambda a, b: torch.optim.SGD([dict(params=a, lr=.02, momentum=.9), dict(params=b, lr=.03, momentum=0., weight_decay=.1)], .1),
    "several": lambda a, b: [torch.optim.SGD(a, .02, momentum=.9), torch.optim.SGD(b, .03, weight_decay=.1)],
    "face and torch": lambda a, b: [gradnb.optim.Momentum(a, .02, .9), torch.optim.SGD(b, .03, weight_decay=.1)],
    "face in groups": lambda a, b: gradnb.optim.Momentum([dict(params=a, lr=.02, momentum=.9), dict(params=b, momentum=.5)], .03),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_of_parts_with_momentum_of_their_own_the_whole_flips_at_the_threshold(kind):
    "By the eigenvalues of the step's matrix, with all rates at 0.97 and at 1.03 of where sharpness meets threshold."
    model, data = small()
    parts = [[*model[0].parameters()], [*model[2].parameters()]]
    opts = SPLIT[kind](*parts)
    steps = opts if isinstance(opts, list) else [opts]
    problem, seen = Problem(model, "mse", data), gradnb.watch(model, "mse", data, "preconditioned_sharpness:every=1,tol=1e-10", opts)
    (model(data.x) - data.y).square().mean().backward()
    for one in steps: one.step()
    seen.step()
    seen.close()
    last = seen.traces["preconditioned_sharpness"].frame().iloc[-1]
    ratio = last["value"] / last["threshold"]
    H = problem.hvp(problem.layout.join(p.detach() for p in model.parameters()), torch.eye(problem.p, dtype=DOUBLE))
    column = lambda of: torch.cat([torch.full((sum(p.numel() for p in g["params"]),), float(of(g)), dtype=DOUBLE) for one in steps for g in one.param_groups])
    lr, beta, decay = column(lambda g: g["lr"]), column(lambda g: g["momentum"]), column(lambda g: g.get("weight_decay", 0.))
    def flip(s):
        G, B = s * lr[:, None] * (H + decay.diag()), beta.diag()       # v' = βv + G θ, θ' = θ − v'
        return torch.linalg.eigvals(torch.cat([torch.cat([torch.eye(len(lr)) - G, -B], 1), torch.cat([G, B], 1)])).real.min().item()
    assert flip(.97 / ratio) > -1 > flip(1.03 / ratio)


FACES = {
    "GD": dict(lr=.05), "Momentum": dict(lr=.05, momentum=.9, nesterov=True), "Adam": dict(lr=.01), "RMSProp": dict(lr=.01), "LAMB": dict(lr=.01, max_grad_norm=1.), "LARS": dict(lr=.1),
    "AdEMAMix": dict(lr=.01), "Prodigy": {}, "Shampoo": dict(lr=.01), "SOAP": dict(lr=.01), "ScheduleFreeSGD": dict(lr=.1), "ScheduleFreeAdamW": dict(lr=.01),
}


@pytest.mark.parametrize("name", FACES)
def test_a_face_of_ours_in_somebodys_loop_has_the_metric_of_its_rule(name):
    model, data = small()
    opt, words = getattr(gradnb.optim, name)([*model.parameters()], **FACES[name]), ["preconditioned_sharpness:every=2,tol=1e-8"]
    theirs = plain(model, data, opt, gradnb.watch(model, "mse", data, words, opt), 4)["preconditioned_sharpness"]
    _, ours = train(Problem(small()[0], "mse", data), Descent(opt._rule(opt.param_groups[0])), 4, words, progress=False)
    for column in ("value", "threshold"): np.testing.assert_allclose(theirs.columns[column], ours["preconditioned_sharpness"].columns[column], rtol=1e-6)


def test_the_average_of_a_schedule_free_face_is_looked_at():
    model, data = small()
    opt, words = gradnb.optim.ScheduleFreeSGD([*model.parameters()], lr=.2), ["averaged:probe=[train:every=2]", "averaged:probe=[sharpness:every=2,tol=1e-8]"]
    problem, seen = Problem(model, "mse", data), gradnb.watch(model, "mse", data, words, opt)
    plain(model, data, opt, seen, 4)
    with opt.averaged(): there = problem.layout.join(p.detach().clone() for p in model.parameters())
    assert seen.traces["averaged_train"].frame().iloc[-1]["loss"] == pytest.approx(problem.loss(there).item(), rel=1e-12)
    assert seen.traces["averaged_sharpness"].values[-1] == pytest.approx(torch.linalg.eigvalsh(problem.hvp(there, torch.eye(50, dtype=DOUBLE)))[-1].item(), rel=1e-6)


def test_of_several_optimizers_the_last_ones_steps_are_counted_and_each_has_parameters_of_its_own(tmp_path):
    model, data = small()
    muon, adam = torch.optim.Muon([model[0].weight, model[2].weight], lr=.01), torch.optim.AdamW([model[0].bias, model[2].bias], .003)
    scheds = [torch.optim.lr_scheduler.ExponentialLR(o, .5) for o in (muon, adam)]
    def loop(seen=None):
        for _ in range(4):
            (model(data.x) - data.y).square().mean().backward()
            for one in (muon, adam): one.step(), one.zero_grad()
            for one in scheds: one.step()
        return [p.detach().clone() for p in model.parameters()]
    start = deepcopy([x.state_dict() for x in (model, muon, adam, *scheds)])
    blind = loop()
    for x, was in zip((model, muon, adam, *scheds), start): x.load_state_dict(was)
    words, looks = ["grad_norm:every=1", "update_radius:every=2", "preconditioned_sharpness:every=4"], []
    @probe(every(1))
    def here(view):
        looks.append(torch.equal(view.theta, view.problem.layout.join(p.detach() for p in model.parameters())))
        return 0.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = gradnb.watch(model, "mse", data, [*words, here], [muon, adam], tmp_path, "both").attach()
        assert all(map(torch.equal, loop(), blind)) and seen.steps == 4 and all(looks)
        seen.close()
    assert seen.traces["grad_norm"].steps.tolist() == [0, 1, 2, 3, 4] and np.isfinite(seen.traces["update_radius"].columns["flip"][1:]).all()
    assert "normalized" in seen.failures["preconditioned_sharpness"][0]
    assert seen.run.spec.settings["optimizer"] == "Muon, AdamW" and seen.run.spec.settings["optimizer.lr"] == [.01, .003]
    with pytest.raises(ValueError, match="0.weight is moved by Muon and by SGD"): gradnb.watch(model, "mse", data, optimizer=[muon, torch.optim.SGD(model.parameters(), .1)])
    with pytest.raises(ValueError, match="AdamW moves no parameter of this network"): gradnb.watch(model, "mse", data, optimizer=[muon, torch.optim.AdamW(small()[0].parameters())])
    with pytest.raises(TypeError, match="or a list of several, got str"): gradnb.watch(model, "mse", data, optimizer=[muon, "adam"])


def test_noise_is_that_of_our_own_run_with_the_batch_size():
    model, data = small()
    opt, words = torch.optim.SGD(model.parameters(), .05), ["grad_variance:every=3,draws=6", "update_variance:every=3,draws=4", "noise_scale:every=3"]
    theirs = plain(model, data, opt, gradnb.watch(model, "mse", data, words, opt, batch_size=7), 3)
    problem = Problem(model, "mse", data)
    from gradnb.ground.roles import draw
    grads = torch.stack([problem.grad_and_loss(problem.theta0, draw(MiniBatch(7), (), problem, Stream(0) / "probe" / "grad_variance" / 3 / "draws" / i))[0] for i in range(6)])
    assert theirs["grad_variance"].values[-1] == pytest.approx(grads.var(0).sum().item(), rel=1e-9)
    assert {*theirs["noise_scale"].steps} == {0, 3}
    with pytest.warns(RuntimeWarning, match="batch_size=128"): plain(model, data, opt, gradnb.watch(model, "mse", data, words[0]), 1)
    with pytest.warns(RuntimeWarning, match="optimizer=optimizer"): plain(model, data, opt, gradnb.watch(model, "mse", data, words[1], batch_size=7), 1)
    with pytest.warns(RuntimeWarning, match="not drawn yet"): plain(model, data, opt, gradnb.watch(model, "mse", data, "grad_norms:every=1"), 1)


@pytest.mark.parametrize("fused", [False, True])
def test_attached_it_counts_the_optimizers_steps(fused):
    model = net()
    opt = torch.optim.Adam(model.parameters(), .01, fused=fused)
    scaler, rows = torch.amp.GradScaler("cpu", init_scale=4.), []
    seen = gradnb.watch(model, "ce", DATA, "grad_norm:every=1", opt, log=lambda row, step: rows.append(step)).attach()
    for k in range(8):                               # two batches a step; the third step overflows
        loss = ce(model(DATA.x[:32]), DATA.y[:32])
        scaler.scale(loss * (float("inf") if k == 5 else 1)).backward()
        if k % 2:
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    assert seen.steps == int(opt.state[model[1].weight]["step"]) == 3 and rows == [0, 1, 2]      # each before the next step
    with pytest.raises(RuntimeError, match="attached already"): seen.attach()
    seen.close()
    assert not opt._optimizer_step_post_hooks and not opt._optimizer_step_pre_hooks and rows == [0, 1, 2, 3]
    opt.step()
    assert seen.steps == 3


def test_attached_a_second_call_is_a_word_and_counts_nothing():
    model, data = small()
    opt = torch.optim.SGD(model.parameters(), .05)
    seen = gradnb.watch(model, "mse", data, "grad_norm:every=1", opt).attach()
    with pytest.warns(RuntimeWarning, match="second loss since step 2"):
        for k in range(4):
            loss = (model(data.x) - data.y).square().mean(1).mean()
            loss.backward()
            if k % 2: opt.step()
            if k % 2: seen.step(loss), k == 3 and seen.step(loss)
    seen.close()
    assert seen.steps == 2 and seen.traces["loss"].steps.tolist() == [0, 1] and seen.traces["grad_norm"].steps.tolist() == [0, 1, 2]


class Once(torch.autograd.Function):
    "An operation without second derivative."
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): x, = ctx.saved_tensors; return g * (1 - x.tanh() ** 2)


class Odd(nn.Module):
    def forward(self, x): return Once.apply(x)


def test_what_fails_never_ends_the_training():
    model, data = small()
    model[1] = Odd()
    opt = torch.optim.SGD(model.parameters(), .05)
    with warnings.catch_warnings(record=True) as words:
        warnings.simplefilter("always")
        seen = gradnb.watch(model, "mse", data, ["sharpness:every=1", "grad_norm:every=1"], opt, log=lambda row, step: 1 / 0)
        traces = plain(model, data, opt, seen, 3)
    assert np.isnan(traces["sharpness"].values).all() and len(traces["sharpness"]) == 4 and np.isfinite(traces["grad_norm"].values).all()
    assert sum("'sharpness' failed at step 0" in str(w.message) for w in words) == 1 and sum("ZeroDivisionError" in str(w.message) for w in words) == 1
    assert {*seen.failures["sharpness"]} == {0, 1, 2, 3}
    with pytest.raises(Exception, match="twice|once_differentiable"): gradnb.watch(model, "mse", data, "sharpness:every=1", opt, strict=True)


def test_rows_that_failed_have_the_columns_of_those_that_did_not():
    model, data = small()
    @probe(every(1))
    def moody(view):
        if view.step in (0, 2): raise torch.OutOfMemoryError("CUDA out of memory")
        return dict(value=1., vector=torch.ones(3))
    opt = torch.optim.SGD(model.parameters(), .05)
    with pytest.warns(RuntimeWarning, match="OutOfMemoryError"): traces = plain(model, data, opt, gradnb.watch(model, "mse", data, moody), 3)
    assert traces["moody"].steps.tolist() == [0, 1, 2, 3] and np.isnan(traces["moody"].columns["vector"]).all(1).tolist() == [True, False, True, False]
    assert (traces["moody"].columns["seconds"] >= 0).all()


def test_weights_that_are_nan():
    model, data = small()
    opt = torch.optim.SGD(model.parameters(), float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traces = plain(model, data, opt, gradnb.watch(model, "mse", data, ["sharpness:every=1", "preconditioned_sharpness:every=1", "train:every=1"], opt), 3)
    assert {k: len(t) for k, t in traces.items()} == dict(sharpness=4, preconditioned_sharpness=4, train=4, loss=3) and np.isnan(traces["sharpness"].values[1:]).all()


def test_a_budget_stretches_cadences(monkeypatch, capsys):
    now = [0.]
    monkeypatch.setattr(foreign, "perf_counter", lambda: now[0])
    @probe(every(2))
    def slow(view): now[0] += 1.; return 0.
    model, data = small()
    opt = torch.optim.SGD(model.parameters(), .05)
    @probe(every(2))
    def broken(view): now[0] += 1.; raise ValueError("no")
    def loop(budget, *probes):
        seen = gradnb.watch(model, "mse", data, [slow, *probes], budget=budget)
        began = now[0] - 1 - len(probes)
        for _ in range(400): now[0] += .1; opt.step(); seen.step()
        total = now[0] - began
        seen.close()
        return seen, total
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen, total = loop(.1)
        steps = seen.traces["slow"].steps
        assert seen.seconds == len(steps) and .05 < seen.seconds / total <= .1 and (steps % 2 == 0).all() and (np.diff(steps) >= 2).all()
        assert (seen.traces["slow"].columns["seconds"] == 1).all() and not capsys.readouterr().out
        seen, total = loop(.1, broken)               # what fails costs as much
        assert .05 < seen.seconds / total <= .1 and seen.seconds == len(seen.traces["slow"]) + len(seen.traces["broken"])
        seen, total = loop(None)
    assert len(seen.traces["slow"]) == 201 and f"{201 / total:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize("attached", [True, False])
def test_a_spike_is_said_at_once(attached):
    "The loop's own losses and clipped gradient norms, and one batch whose targets are a hundred times too large."
    model, data = small()
    opt, losses, norms = torch.optim.SGD(model.parameters(), 1e-3), [], []
    gen = Stream(5).generator()
    seen = gradnb.watch(model, "mse", data, "spikes:window=40", opt)
    if attached: seen.attach()
    with warnings.catch_warnings(record=True) as words:
        warnings.simplefilter("always")
        for k in range(60):
            i = torch.randint(30, (10,), generator=gen)
            loss = (model(data.x[i]) - data.y[i] * (100 if k == 50 else 1)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 50.)
            losses.append(loss.item()), norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
            opt.step()
            if attached: opt.zero_grad()
            seen.step(loss)
            if not attached: opt.zero_grad()
    seen.close()
    frame = seen.traces["spikes"].frame()
    np.testing.assert_allclose(frame.grad_norm[1:], norms, rtol=1e-12)
    np.testing.assert_allclose(frame.loss[1:], losses, rtol=1e-12)
    assert np.isnan([frame.loss[0], frame.grad_norm[0]]).all()
    assert frame.step[frame.spike == 1].tolist() == [51] and {w.filename for w in words} == {__file__}
    last = np.log(norms[10:50])
    middle = np.median(last)
    assert frame.grad_norm_above[51] == pytest.approx((np.log(norms[50]) - middle) / (1.4826 * np.median(abs(last - middle))), rel=1e-4)
    assert sum("gradient norm is 50," in str(w.message) for w in words) == 1 and sum("the loss is" in str(w.message) for w in words) == 1


def test_unfreezing_on_the_way():
    model, data = small()
    model[0].requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), .05)
    seen, ready = gradnb.watch(model, "mse", data, "sharpness:every=1,tol=1e-8", opt), gradnb.watch(Problem(model, "mse", data), probes="sharpness:every=1")
    assert seen.problem.p == 14
    plain(model, data, opt, Open(seen), 2)
    model[0].requires_grad_(True)
    with pytest.warns(RuntimeWarning, match="0.bias, 0.weight became trainable; measured so from step 3"): traces = plain(model, data, opt, seen, 2)
    problem = Problem(model, "mse", data)
    top = torch.linalg.eigvalsh(problem.hvp(problem.theta0, torch.eye(50, dtype=DOUBLE)))[-1].item()
    assert traces["sharpness"].values[-1] == pytest.approx(top, rel=1e-6) and len(traces["sharpness"]) == 5
    with pytest.warns(RuntimeWarning, match="became trainable after the problem was made"): plain(model, data, opt, ready, 1)


def test_weights_that_are_moved_or_allocated_anew():
    model, data = small()
    opt = torch.optim.SGD(model.parameters(), .05)
    seen = gradnb.watch(model, "mse", data, "grad_norm:every=1", opt)
    for p in model.parameters(): p.data = p.data.clone() * 2              # another storage
    seen.step()
    problem = Problem(model, "mse", data)
    assert seen.traces["grad_norm"].values[-1] == pytest.approx(problem.at(problem.theta0).grad.norm().item(), rel=1e-12)
    model.float()
    with pytest.warns(RuntimeWarning, match="float32 on cpu now, and are measured as torch.float64"): seen.step()
    assert np.isfinite(seen.traces["grad_norm"].values).all()
    seen.close()


def test_a_watch_that_is_forgotten_loses_nothing(tmp_path):
    model, data = small()
    opt, rows = torch.optim.SGD(model.parameters(), .05), []
    @probe(every(1))
    def never(view): raise ValueError("no")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = gradnb.watch(model, "mse", data, never, log=lambda row, step: rows.append((step, *row)))
        plain(model, data, opt, Open(seen), 1)
        del seen
        gc.collect()
    assert rows == [(0, "loss"), (0, "never", "never.seconds"), (1, "never", "never.seconds")]
    script = "import gradnb, torch, warnings\nfrom tests.test_watch import small\nmodel, data = small()\nseen = gradnb.watch(model, 'mse', data, 'grad_norm:every=1')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=str(__import__("pathlib").Path(__file__).parents[1]))
    assert "watched 0 steps; measuring took" in done.stdout and not done.stderr.count("Traceback")


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("held", [True, False])
def test_graphs_whose_adjacency_is_sparse(layout, held):
    "As a buffer or in the batch, against the same network with the dense one."
    gen = torch.Generator().manual_seed(0)
    S, x, y = (torch.rand(20, 20, generator=gen) < .2).double(), torch.randn(20, 4, generator=gen, dtype=torch.float64), torch.arange(20) % 3
    class Net(nn.Module):
        def __init__(self, S):
            super().__init__()
            self.first, self.last = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
            self.register_buffer("S", S)
        def forward(self, x, S): return self.last(S @ torch.tanh(self.first(S @ x)))
    objective = lambda model, batch: nn.functional.cross_entropy(model(batch[0], model.S if held else batch[1]), batch[2])
    sparse = getattr(S, layout)()
    net, dense = Net(sparse if held else None), Net(S if held else None)
    dense.load_state_dict(dict(net.named_parameters()), strict=False)
    optimizer = torch.optim.SGD(net.parameters(), .1)
    with gradnb.watch(net, objective, [(x, sparse, y)], "sharpness:every=1", optimizer, strict=True) as watch:
        objective(net, (x, sparse, y)).backward()
        optimizer.step()
        watch.step()
    problem = gradnb.Problem(dense, objective, [(x, S, y)])
    found, want = watch.traces["sharpness"].columns["value"][0], gradnb.sharpness(problem.at(problem.theta0)).values[0]
    assert found == pytest.approx(float(want), rel=1e-3)


def test_a_word_for_what_is_wrong():
    model, data = small()
    opt = torch.optim.SGD(model.parameters(), .05)
    with pytest.raises(ValueError, match="moves no parameter of this network"): gradnb.watch(deepcopy(model), "mse", data, optimizer=opt)
    with pytest.raises(TypeError, match="has none"): gradnb.watch(type("Mine", (), dict(layout=None, grad_and_loss=None))())
    with pytest.raises(TypeError, match="a network is a torch.nn.Module, got NoneType"): gradnb.watch(None, "mse", data)
    with pytest.raises(TypeError, match="torch.optim.Optimizer, or a list of several, got str"): gradnb.watch(model, "mse", data, optimizer="sgd")
    with pytest.raises(TypeError, match="say which"): gradnb.watch(model, "mse", data).attach()
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.warns(RuntimeWarning, match="LBFGS evaluates the loss several times"): gradnb.watch(model, "mse", data, "update_norms", lbfgs)
    with pytest.raises(ValueError, match="budget"): gradnb.watch(model, "mse", data, budget=5)
    with pytest.raises(ValueError, match="two probes are named"): gradnb.watch(model, "mse", data, ["sharpness", "sharpness:every=2"])
    other = gradnb.watch(deepcopy(model), "mse", data, "grad_norm:every=1")
    with pytest.warns(RuntimeWarning, match="another model trained"): plain(model, data, opt, other, 3)
    with pytest.warns(RuntimeWarning, match="was closed at step 3"): other.step()
    with pytest.warns(RuntimeWarning, match="loss failed at step 0"): gradnb.watch(model, "mse", data).step(torch.ones(3))
    assert isinstance(gradnb.watch(model, "mse", data), gradnb.Watch) and Watch is gradnb.Watch


def test_a_loop_with_nothing_due_is_hardly_slowed():
    "Counted in calls, not in seconds: a step with nothing due touches no parameter, and draws from nothing."
    model, data = small()
    seen = gradnb.watch(model, "mse", data, "grad_norm:every=1000")
    for _ in range(30): seen.step()
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append(event) if "call" in event else None)
    seen.step(1.)
    sys.setprofile(None)
    assert len(calls) < 60


def test_a_watched_run_is_a_run(tmp_path):
    model, data = small()
    opt = torch.optim.Adam([dict(params=model[0].parameters(), lr=.02), dict(params=model[2].parameters())], .01)
    store, words = gradnb.Store(tmp_path), ["grad_norm:every=2", "preconditioned_sharpness:every=2"]
    def open(**more): return gradnb.watch(model, "mse", data, words, opt, store, "warm-up", dict(note="first", aug=dict(p=.5)), **more)
    plain(model, data, opt, seen := open(), 4)
    run, = store.list()
    assert run.status == "finished" and run.spec.settings["optimizer.lr"] == [.02, .01] and run.spec.settings["aug.p"] == .5 and run.spec.settings["p"] == 50
    for name, trace in seen.traces.items():
        assert (run.traces[name].steps == trace.steps).all() and all(np.array_equal(run.traces[name].columns[c], v, equal_nan=True) for c, v in trace.columns.items())
    assert {*store.frame("grad_norm", optimizer="Adam")["step"]} == {0, 2, 4}
    with pytest.raises(ValueError, match="again='go on'"): open()
    plain(model, data, opt, open(again="go on", start=2), 1)
    assert run.traces["loss"].steps.tolist() == [0, 1, 2] and run.traces["grad_norm"].steps.tolist() == [0, 2]
    with pytest.raises(ZeroDivisionError):
        with open(again="new") as seen: 1 / 0
    assert sorted(r.status for r in store.list()) == ["failed", "finished"]
    with pytest.raises(TypeError, match="no probe"): gradnb.watch(model, "mse", data, [3], opt, store, "bad")
    assert len(store.list()) == 2


def test_a_run_that_is_not_closed_says_so(tmp_path):
    model, data = small()
    @probe(every(1))
    def never(view): raise ValueError("no such thing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = gradnb.watch(model, "mse", data, never, store=tmp_path)
        seen.step(1.)
        del seen
        gc.collect()
    run, = gradnb.Store(tmp_path).list()
    assert run.status == "interrupted" and "close() was forgotten" in run.manifest["message"]
    assert run.manifest["failures"]["never"] == {"0": "ValueError: no such thing", "1": "ValueError: no such thing"} and len(run.traces["never"]) == 2


def test_a_block_that_the_optimizer_does_not_move_has_no_part_in_its_metric():
    model, data = small()
    opt = torch.optim.SGD(model[2].parameters(), .05, momentum=.9)
    row = plain(model, data, opt, gradnb.watch(model, "mse", data, "preconditioned_sharpness:every=2,tol=1e-9", opt), 2)["preconditioned_sharpness"].frame().iloc[-1]
    problem = Problem(model, "mse", data)
    H = problem.hvp(problem.theta0, torch.eye(50, dtype=DOUBLE))
    assert row["value"] == pytest.approx(torch.linalg.eigvalsh(H[36:, 36:])[-1].item(), rel=1e-6) and row["threshold"] == pytest.approx(2 * 1.9 / .05)


def test_a_parameter_that_no_graph_reaches_is_not_moved():
    "AdamW with a head that is not used has the numbers that it has without."
    class Unused(nn.Module):
        def __init__(self, net): super().__init__(); self.net, self.head = net, nn.Linear(3, 2)
        def forward(self, x): return self.net(x)
    rows = {}
    for wrap in (Unused, nn.Sequential):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = wrap(net())
        opt = torch.optim.AdamW(model.parameters(), .01, weight_decay=.1)
        objective = lambda model, batch: ce(model(batch[0]), batch[1])
        with gradnb.watch(model, objective, [(DATA.x, DATA.y)], ["preconditioned_sharpness:every=2", "update_radius:every=2"], opt) as seen:
            for _ in range(4):
                opt.zero_grad()
                loss = objective(model, (DATA.x, DATA.y))
                loss.backward(), opt.step(), seen.step(loss)
        rows[wrap] = [seen.traces[name].columns[c][-1] for name, c in (("preconditioned_sharpness", "value"), ("preconditioned_sharpness", "threshold"), ("update_radius", "radius"))]
    np.testing.assert_allclose(*rows.values(), rtol=2e-3)


def test_a_word_points_to_the_loop():
    model, data = small()
    opt = torch.optim.SGD(model.parameters(), .05)
    with pytest.warns(RuntimeWarning, match="batch_size") as words:
        seen = gradnb.watch(model, "mse", data, "grad_variance:every=1", opt)
    with pytest.warns(RuntimeWarning, match="no weight has moved") as more: seen.step()
    assert {words[0].filename, more[0].filename} == {__file__}


def test_the_same_numbers_three_ways():
    "Of our own run, in a plain loop, and of its checkpoints."
    model, data = small()
    opt, words = torch.optim.Adam(model.parameters(), .01), ["sharpness:every=2,tol=1e-9", "grad_variance:every=2,draws=6"]
    seen, saved = gradnb.watch(model, "mse", data, words, opt, batch_size=7), {0: deepcopy(model.state_dict())}
    class Saving(Open):
        def __init__(self): super().__init__(seen); self.step = lambda loss: (seen.step(loss), saved.update({seen.steps: deepcopy(model.state_dict())}))
    plain(model, data, opt, Saving(), 4)
    problem = Problem(small()[0], "mse", data)
    _, ours = train(problem, Descent(FromTorch(torch.optim.Adam, lr=.01)), 4, words[:1], progress=False)
    after = gradnb.measure_weights(problem, {k: saved[k] for k in (0, 2, 4)}, words, batch_size=7)
    np.testing.assert_allclose(seen.traces["sharpness"].values, ours["sharpness"].values, rtol=1e-6)
    for name in ("sharpness", "grad_variance"): np.testing.assert_allclose(after[name].values, seen.traces[name].values, rtol=1e-6)


@pytest.mark.parametrize("kind", ["a block while all are trained", "evaluation mode", "frozen"])
def test_what_the_problem_takes_as_constant_is_what_the_loop_has_now(kind):
    model, loader = net(norm=True), [(DATA.x[:50], DATA.y[:50]), (DATA.x[50:], DATA.y[50:])]
    opt, params = torch.optim.SGD(model.parameters(), .5), "5" if kind == "a block while all are trained" else None
    if kind == "frozen": model[1].requires_grad_(False)
    if kind == "evaluation mode": model.eval()
    seen = gradnb.watch(model, nn.CrossEntropyLoss(), loader, "grad_norm:every=2", opt, params=params).attach()
    for k in range(6):
        model.train()
        x, y = loader[k % 2]
        opt.zero_grad()
        ce(model(x), y).backward()
        opt.step()
        if kind == "frozen": model[1].weight.data.mul_(1.1)      # by somebody else
    seen.close()
    model.train(kind != "evaluation mode")
    opt.zero_grad()
    (sum(ce(model(x), y) * len(x) for x, y in loader) / DATA.n).backward()
    grads = [p.grad.flatten() for n, p in model.named_parameters() if p.requires_grad and (params is None or n.startswith("5"))]
    assert seen.traces["grad_norm"].values[-1] == pytest.approx(torch.cat(grads).norm().item(), rel=1e-5)
    assert len(seen.traces["grad_norm"]) == 4


def test_another_network_that_writes_buffers_is_left_as_it_is():
    "A teacher in training mode, which an objective reaches by its name."
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 6))
    teacher = nn.Sequential(nn.Flatten(), layer, nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().requires_grad_(False)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double(), DATA.x.double()
    before, aims = deepcopy(teacher.state_dict()), deepcopy(teacher)(x)
    seen = gradnb.watch(model, lambda m, b: (m(b) - teacher(b)).square().mean(), [x], ["sharpness:every=1,tol=1e-6", "grad_norm:every=1"])
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    plain = gradnb.watch(model, lambda m, b: (m(b) - aims).square().mean(), [x], ["sharpness:every=1,tol=1e-6", "grad_norm:every=1"])
    for name in ("sharpness", "grad_norm"): assert seen.traces[name].values[-1] == pytest.approx(plain.traces[name].values[-1], rel=1e-6)
    ones = torch.cat([x.flatten(1), torch.ones(len(x), 1)], 1)
    assert seen.traces["sharpness"].values[-1] == pytest.approx(2 / 3 * torch.linalg.eigvalsh(ones.T @ ones / len(x))[-1].item(), rel=1e-5)


@pytest.mark.parametrize("whose", ["of outputs", "with weights", "a module", "in two parts"])
def test_a_loss_that_calls_another_network_leaves_it_as_it_is(whose):
    "Features in training mode, on the outputs and targets of a Dataset, and on batches, beside features that keep no statistics."
    features = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double().requires_grad_(False)
    model, before, other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double(), deepcopy(features.state_dict()), deepcopy(features)
    other[1], direction = nn.BatchNorm1d(4, track_running_stats=False).double().requires_grad_(False), torch.ones(195, dtype=torch.float64)
    class Perceptual(nn.Module):
        def __init__(self): super().__init__(); self.features = features
        def forward(self, out, y): return of(features)(out, y)
    def of(net): return lambda out, y: (net(out) - .3).square().mean(1)
    def two(net): return ((lambda m, b: m(b[0])), lambda out, b: of(net)(out, b[1]))
    make = {"of outputs": of, "with weights": lambda net: lambda out, y: (of(net)(out, y), out.new_ones(len(out))), "in two parts": two,
            "a module": lambda net: Perceptual() if net is features else of(net)}[whose]
    data = (DATA.x.double(), DATA.y) if whose == "in two parts" else DATA.to(torch.device("cpu"), torch.float64)
    data = [data] if whose == "in two parts" else data
    found = []
    for net in (features, other):
        point = Problem(model, make(net), data).at()
        found.append([point.loss.item(), gradnb.sharpness(point, tol=1e-6).values[0].item(), point.ggn(direction).norm().item()])
        if net is features: assert all(torch.equal(v, before[k]) for k, v in features.state_dict().items())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_layer_is_put_in_the_place_of_another():
    model, data = small()
    seen, ready = gradnb.watch(model, "mse", data, "grad_norm:every=1"), gradnb.watch(Problem(model, "mse", data), probes="grad_norm:every=1")
    model[2] = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2)).double()
    with pytest.warns(RuntimeWarning, match="2.0.bias, 2.0.weight, 2.1.bias became trainable and 2.bias, 2.weight no longer is; measured so"): seen.step()
    with pytest.warns(RuntimeWarning, match="make one with a problem of the network as it is"): ready.step()
    problem = Problem(model, "mse", data)
    assert seen.traces["grad_norm"].values[-1] == pytest.approx(problem.at(problem.theta0).grad.norm().item(), rel=1e-12)
    assert np.isnan(ready.traces["grad_norm"].values[-1]) and len(ready.traces["grad_norm"]) == 2


def test_trackers_are_told_in_their_own_way():
    "By the signatures of W&B, MLflow, aim and TensorBoard."
    told = {name: [] for name in ("wandb", "mlflow", "aim", "board")}
    class Wandb:
        def log(self, data, step=None, commit=None, sync=None): told["wandb"].append((step, data))
    class MLflow:
        def log_metrics(self, metrics, step=None, synchronous=None, run_id=None, timestamp=None, model_id=None): told["mlflow"].append((step, metrics))
    class Aim:
        hash = "f00"
        def track(self, value, name=None, step=None, epoch=None, *, context=None): told["aim"].append((step, {name: value}))
    class Board:
        def add_scalar(self, tag, scalar_value, global_step=None, walltime=None): told["board"].append((global_step, {tag: scalar_value}))
    model, data = small()
    opt, logs = torch.optim.SGD(model.parameters(), .05), [Wandb(), MLflow(), Aim(), Board()]
    traces = plain(model, data, opt, gradnb.watch(model, "mse", data, "grad_norm:every=2", opt, log=logs), 3)
    for found in told.values():
        norms = {step: row["grad_norm"] for step, row in found if "grad_norm" in row}
        assert norms == dict(zip(traces["grad_norm"].steps.tolist(), traces["grad_norm"].values.tolist()))
        assert [step for step, _ in found] == sorted(step for step, _ in found)                            # W&B drops what goes back
    with pytest.raises(TypeError, match="log_metrics"): gradnb.watch(model, "mse", data, log=3)


def test_tensorboard_reads_what_a_watch_wrote(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    model, data = small()
    opt = torch.optim.SGD(model.parameters(), .05)
    with SummaryWriter(tmp_path) as writer: traces = plain(model, data, opt, gradnb.watch(model, "mse", data, "sharpness:every=2", opt, log=writer), 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for tag, column in (("sharpness", "value"), ("sharpness.error", "error")):
        rows = events.Scalars(tag)
        assert [e.step for e in rows] == [0, 2]
        np.testing.assert_allclose([e.value for e in rows], traces["sharpness"].columns[column], rtol=1e-6)
