"Data parallelism: ranks agree to the bit, with one process to rounding; from the command line into a store, and resumed. Sharded parameters: what one process says, and the right values."
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradnb import Store
from gradnb.problem.parallel import all_sum, from_first, rank, split

GRADNB = str(Path(sys.executable).with_name("gradnb"))
SCRIPT = textwrap.dedent("""
    import sys, torch
    from pathlib import Path
    from torch import nn
    from gradnb import Batch, Descent, MiniBatch, Momentum, PROBES, Problem, build_model, load_dataset, train
    from gradnb.problem.modes import drawing
    from gradnb.problem.parallel import as_one, rank, split, together
    from gradnb.move.rules.kfac import KFAC
    from gradnb.ground.streams import Stream

    data, out = load_dataset("digits-90"), {}
    with drawing(Stream(0), torch.device("cpu")):
        normed = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(.2), nn.Linear(6, 10)).double()
    fc = build_model("fc-tanh:width=6", data).double()

    def measure(split, where):
        problem = split(Problem(fc, "ce", data, chunk_size=16))
        theta, v = problem.theta0, torch.linspace(-1, 1, problem.p, dtype=torch.float64)
        out[f"{where} grad"], out[f"{where} loss"] = problem.grad_and_loss(theta, Batch(torch.arange(31)))
        out[f"{where} hvp"], out[f"{where} third"] = problem.hvp(theta, v), problem.curvature_grad(theta, v, v)
        out[f"{where} block"] = problem.hvp(theta, torch.stack([v, v * v], 1))
        out[f"{where} one"] = problem.grad_and_loss(theta, Batch(torch.tensor([5])))[0]
        out[f"{where} test"] = torch.tensor(problem.evaluate(theta, "test"))
        state, traces = train(split(Problem(fc, "ce", data)), Descent(KFAC(.05, size=40), MiniBatch(21)), 8, [PROBES.build("sharpness:every=4")],
                              progress=False)
        out[f"{where} kfac"], out[f"{where} sharpness"] = state.theta, torch.tensor(traces["sharpness"].columns["value"])

    measure(lambda p: p, "alone")
    with together():
        measure(split, "split")
        state, _ = train(split(Problem(normed, "ce", data)), Descent(Momentum(.1), MiniBatch(20)), 6, progress=False)
        out |= {"ranks theta": state.theta, "ranks mean": state.buffers["2.running_mean"]}
        with as_one(): torch.save(out, f"{sys.argv[1]}/{rank()[0]}.pt")
    assert not [f for f in Path("/proc/self/task").glob("*/comm") if "pt_gloo" in f.read_text()]      # a thread of torch's that outlives the interpreter aborts it
""")


CUT = textwrap.dedent("""
    import sys, torch
    from contextlib import nullcontext
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from gradnb import sharpness, watch
    from gradnb.problem.parallel import rank, together
    from gradnb.problem.sharded import Sharded

    def build(dtype=torch.float64):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Dropout(.1).eval(), nn.Linear(7, 3)).to(dtype)

    def examples():
        torch.manual_seed(1)
        return torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))

    def fsdp(net, mesh):
        for layer in (net[0], net[4], net): fully_shard(layer, mesh=mesh)
        return net

    def tensor_parallel(net, mesh):
        cut = {"0.weight": Shard(0), "0.bias": Shard(0), "4.weight": Shard(1)}
        for name, p in list(net.named_parameters()):
            owner, _, own = name.rpartition(".")
            setattr(net.get_submodule(owner), own, nn.Parameter(distribute_tensor(p.detach(), mesh, [cut.get(name, Replicate())])))
        return net

    def measured(net, loss, k, tol, every=True):
        held, random = {n: (p.to_local().clone(), p.grad) for n, p in net.named_parameters()}, torch.get_rng_state()
        problem = Sharded(net, loss)
        whole = lambda v: torch.cat([t.full_tensor().reshape(-1) for t in problem.layout.named(v).values()])
        line = lambda p: distribute_tensor(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape), p.device_mesh, p.placements)
        v = problem.layout.join(line(s.param) for s in problem.layout.shards)
        found, grad = sharpness(problem, k=k, tol=tol), problem.grad
        again, low = (sharpness(problem, k=k, tol=tol, warm=found.sketch), sharpness(problem, which="smallest", tol=tol)) if every else (found, None)
        assert all(torch.equal(p.to_local(), held[n][0]) and p.grad is held[n][1] for n, p in net.named_parameters()) and torch.equal(random, torch.get_rng_state())
        return dict(p=problem.p, twice=problem._agreed["twice"], loss=problem.loss, grad=whole(grad), norm=problem.length(grad), product=whole(problem.hvp(v)), far=whole(v), off=problem.error(),
                    sizes=problem.layout.sizes, vector=whole(found.vectors[:, 0]), **{f"{n} {i}": getattr(f, i) for n, f in dict(cold=found, warm=again, low=low).items() if f for i in ("values", "errors", "residuals", "converged")})

    def styled(x, y, mesh):
        "Layers that hand plain tensors on: how far is torch's second derivative from that of the network in one piece, and our product; and is it known to be wrong?"
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        theta, loss = dict(net.named_parameters()), lambda t: nn.functional.cross_entropy(torch.func.functional_call(net, t, x), y)
        line = {n: torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape) for n, p in theta.items()}
        product = torch.cat([t.reshape(-1) for t in torch.func.jvp(torch.func.grad(loss), (theta,), (line,))[1].values()])
        parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()})
        problem = Sharded(net, lambda model: nn.functional.cross_entropy(model(x), y))
        v = problem.layout.join(distribute_tensor(line[s.name], mesh, s.param.placements) for s in problem.layout.shards)
        off = lambda got: float((torch.cat([t.full_tensor().reshape(-1) for t in problem.layout.named(got).values()]) - product).norm() / product.norm())
        return off(problem._twice(v)), off(problem.hvp(v)), problem._agreed["twice"]

    LOOKS = "grad_norm:every=2", "grad_variance:every=2,draws=5", "noise_scale:every=4", "train:every=4", "sharpness:every=4,tol=1e-2"

    def batches(n, mine=None):
        "Four batches of twelve and a shorter one, cut among n processes, of which the first has most of the last; None: whole."
        gen = torch.Generator().manual_seed(2)
        sizes = [[12 // n] * n] * 4 + [[3] + [1] * (n - 1)]
        rows = [(torch.randn(sum(s), 5, generator=gen, dtype=torch.float64), torch.randint(3, (sum(s),), generator=gen)) for s in sizes]
        return rows if mine is None else [tuple(t.split(s)[mine] for t in row) for row, s in zip(rows, sizes)]

    def trained(net, batches, looks=(), cut=lambda t: t, **more):
        "Three steps of AdamW, and what a watch saw: the weights after them, and columns by name."
        opt = torch.optim.AdamW(net.parameters(), lr=.05)
        loss = lambda model, batch: whole(nn.functional.cross_entropy(whole(model(cut(batch[0]))), batch[1], reduction="none"))
        whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
        with (watch(net, loss, batches, looks, opt, strict=True, **more) if looks else nullcontext()) as seen:
            for batch in batches[:3]:
                loss(net, batch).mean().backward()
                opt.step(), opt.zero_grad()
                if looks: seen.step()
        return {n: whole(p.detach()) for n, p in net.named_parameters()}, seen and {f"{n} {c}": torch.as_tensor(v).nan_to_num(-1) for n, t in seen.traces.items() for c, v in t.columns.items() if c not in ("seconds", "matvecs", "frozen")}

    if __name__ == "__main__":
        with together():
            (mine, n), out, seen, every = rank(), {}, {}, sys.argv[2] == "all"
            mesh, (x, y) = init_device_mesh("cpu", (n,)), examples()
            ce = lambda x, y: lambda model: nn.functional.cross_entropy(model(x), y)
            own = [t.chunk(n)[mine] for t in (x, y)]
            out["fsdp"] = measured(fsdp(build(), mesh), ce(*own), 2 if every else 1, 1e-5 if every else 1e-2, every)
            looks = LOOKS if every else LOOKS[:4]
            (alone, _), (theta, seen["fsdp"]) = trained(fsdp(build(), mesh), batches(n, mine)), trained(fsdp(build(), mesh), batches(n, mine), looks, store=f"{sys.argv[1]}/runs")
            assert all(torch.equal(alone[k], theta[k]) for k in theta)
            try: assert not trained(fsdp(build(), mesh), batches(n, mine), ["tail_index:draws=80"])
            except TypeError as e: assert "'tail_index' would take a process's shards for whole vectors" in str(e)
            if every:
                seen["tensors"] = trained(tensor_parallel(build(), mesh), batches(n), looks, cut=lambda x: distribute_tensor(x, mesh, [Replicate()]))[1]
                whole = distribute_tensor(x, mesh, [Replicate()])
                out["tensors"] = measured(tensor_parallel(build(), mesh), lambda model: nn.functional.cross_entropy(model(whole).full_tensor(), y), 2, 1e-5)
                out["single"] = measured(fsdp(build(torch.float32), mesh), ce(own[0].float(), own[1]), 2, 1e-3)
            if every: seen["styled"] = styled(x, y, mesh)
            if every and n == 4: out["hybrid"] = measured(fsdp(build(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("again", "cut"))), ce(*own), 2, 1e-5)
            torch.save((out, seen), f"{sys.argv[1]}/{mine}.pt")
""")


def torchrun(*command, n=2):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *map(str, command)],
                          capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    return done


def test_two_ranks_are_one_process(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    torchrun(tmp_path / "run.py", tmp_path)
    first, second = (torch.load(tmp_path / f"{k}.pt", weights_only=True) for k in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    for name in (k.removeprefix("alone ") for k in first if k.startswith("alone ")):
        rtol = 1e-6 if name == "sharpness" else 1e-9             # a search that ends at a residual of 1e-3
        torch.testing.assert_close(first[f"split {name}"], first[f"alone {name}"], rtol=rtol, atol=1e-12, msg=lambda m: f"{name}: {m}")


def test_from_the_command_line_into_a_store(tmp_path):
    line = [GRADNB, "train", "--dataset", "digits-100", "--model", "fc-tanh:width=6", "--rule", "adam", "--lr", "0.01", "--batch", "20",
            "--steps", "30", "--probe", "sharpness:every=10", "--store"]
    plain = subprocess.run([*line, tmp_path / "alone"], capture_output=True, text=True)
    both = subprocess.run([*line, tmp_path / "two", "--distribute", "2"], capture_output=True, text=True)
    assert not plain.returncode and not both.returncode, both.stderr
    (alone,), (two,) = Store(tmp_path / "alone").list(), Store(tmp_path / "two").list()
    assert alone.hash == two.hash and two.status == "finished" and both.stdout.count(two.hash) >= 1
    for name in ("loss", "sharpness"):
        assert (alone.traces[name].steps == two.traces[name].steps).all()
        torch.testing.assert_close(torch.tensor(alone.traces[name].columns["value"]), torch.tensor(two.traces[name].columns["value"]),
                                   rtol=2e-3, atol=1e-4)
    again = subprocess.run([*line, tmp_path / "two", "--distribute", "2"], capture_output=True, text=True)
    assert "already there" in again.stdout and not again.returncode


def test_alone_nothing_is_split():
    from gradnb import Quadratic
    bowl = Quadratic(torch.eye(3))
    assert rank() == (0, 1) and split(bowl) is bowl and from_first("x") == "x" and all_sum is not None


def test_without_gpus_the_number_is_asked_for(capsys):
    from gradnb.cli import main
    if torch.cuda.is_available(): pytest.skip("there are GPUs, so there is a default")
    assert main(["train", "--distribute", "--steps", "1"]) == 2 and "--distribute 2" in capsys.readouterr().err


@pytest.mark.parametrize("n, which", [(2, "one"), pytest.param(2, "all", marks=pytest.mark.slow), pytest.param(4, "all", marks=pytest.mark.slow)])
def test_sharded_parameters_are_those_of_one_process(n, which, tmp_path):
    "FSDP, tensors cut by hand, and FSDP whose shards are held twice; shards that do not divide, and empty ones. Against the dense Hessian of the module itself."
    (tmp_path / "cut.py").write_text(CUT)
    torchrun(tmp_path / "cut.py", tmp_path, which, n=n)
    made = {"__name__": "cut"}
    exec(CUT, made)
    net, (x, y) = made["build"](), made["examples"]()
    names, shapes, sizes = zip(*((k, p.shape, p.numel()) for k, p in net.named_parameters()))
    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    def loss(t): return torch.nn.functional.cross_entropy(torch.func.functional_call(net, {k: b.view(s) for k, s, b in zip(names, shapes, t.split(sizes))}, x), y)
    grad, H = torch.func.grad(loss)(theta), torch.autograd.functional.hessian(loss, theta, vectorize=True)
    exact = torch.linalg.eigvalsh(H).flip(0)
    ranks, watched = zip(*(torch.load(tmp_path / f"{k}.pt", weights_only=True) for k in range(n)))
    for rank in ranks:
        for kind, got in rank.items():
            single = kind == "single"
            close = lambda a, b, double, tol=1e-12: torch.testing.assert_close(a.double(), b, rtol=1e-5 if single else double, atol=1e-5 if single else tol)
            assert got["p"] == len(theta) and torch.equal(got["cold values"], ranks[0][kind]["cold values"])
            close(got["loss"], loss(theta), 1e-12)
            close(got["grad"], grad, 1e-10)
            assert got["norm"] == pytest.approx(float(grad.norm()), rel=1e-6)
            assert (got["product"].double() - H @ got["far"].double()).norm() <= got["off"] * got["far"].norm() and got["off"] < {"single": 3e-2, "tensors": 1e-14}.get(kind, 1e-6)
            assert got["twice"] == (kind == "tensors")
            for how in "cold", "warm": assert ((got[f"{how} values"] - exact[:len(got[f"{how} values"])]).abs() <= got[f"{how} errors"]).all() and got[f"{how} converged"]
            if "low values" in got: assert abs(got["low values"] - exact[-1]) <= got["low errors"]
            v = got["vector"].double()
            assert v.norm() == pytest.approx(1, abs=1e-5) and (H @ v - got["cold values"][0] * v).norm() <= got["cold residuals"][0]
    for kind in ranks[0] if which == "all" else ():
        if kind in ("fsdp", "single"): assert sum(sum(r[kind]["sizes"]) for r in ranks) == len(theta)
    for seen in watched if which == "all" else ():
        by_torch, ours, twice = seen.pop("styled")
        assert by_torch > .01 and ours < 1e-8 and twice is False
    _, alone = made["trained"](made["build"](), made["batches"](n), made["LOOKS"] if which == "all" else made["LOOKS"][:4])
    for kind, seen in watched[0].items():
        assert seen.keys() == alone.keys() and all(torch.equal(seen[k], other[kind][k]) for other in watched for k in seen)
        if which == "all": assert ((seen["sharpness value"] - alone["sharpness value"]).abs() <= (off := seen["sharpness error"] + alone["sharpness error"])).all() and (off < .1).all()
        for name in seen:
            if "sharpness" not in name: torch.testing.assert_close(seen[name], alone[name], rtol=1e-8, atol=1e-12, msg=lambda m: f"{kind} {name}: {m}")
    run, = Store(tmp_path / "runs").list()
    assert run.status == "finished" and run.traces["grad_norm"].columns["value"].tolist() == watched[0]["fsdp"]["grad_norm value"].tolist()


FAULTS = textwrap.dedent("""
    import os, sys, time, torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from gradnb import every, probe, sharpness, watch
    from gradnb.problem import parallel
    from gradnb.problem.parallel import Apart, rank, together
    from gradnb.problem.sharded import Sharded

    parallel.GRACE = .3 if sys.argv[2] == "waits" else 60.
    with together():
        mine, how = rank()[0], {"word": None}
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        for layer in (net[0], net[2], net): fully_shard(layer)
        x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
        def loss(model):
            how["calls"] = how.get("calls", 0) + 1
            if how["word"] == "waits" and mine == 1: raise ValueError("a leaf fell")
            if how["word"] == "dies" and mine == 1 and how["calls"] > 6: os._exit(9)
            out = nn.functional.cross_entropy(model(x + mine), y)
            if how["word"] == "alike": raise ValueError(f"leaf {mine} fell")
            return out * float("nan") if how["word"] == "nan" and mine == 1 else out
        problem, said = Sharded(net, loss), {}
        before = sharpness(problem, tol=1e-2)
        def attempt(word):
            how.update(word=word, calls=0)
            start = time.monotonic()
            try: sharpness(problem.at(), tol=1e-2)
            except Exception as e: said[word] = f"{type(e).__name__}: {e}"
            how["word"], said["seconds"] = None, time.monotonic() - start
        if sys.argv[2] == "soft":
            for word in ("alike", "nan"): attempt(word)
            @probe(every(1), parts=True)
            def falls(view):
                if mine == 1: raise ValueError("a probe fell")
                return 1.
            with watch(net, lambda model, batch: loss(model), [(x, y)], [falls, "grad_norm:every=1"]) as seen:
                seen.step()
            said["probe"] = [*seen.failures["falls"].values()][-1]
            try: Sharded(net, nn.functional.cross_entropy, [(x, y)] * (1 + mine))
            except ValueError as e: said["uneven"] = str(e)
            (problem.loss * 0).item()
            net.set_requires_gradient_sync(False)                     # half a step's gradient waits to be added up
            loss(net).backward()
            look = problem.at().grad
            net.set_requires_gradient_sync(True)
            loss(net).backward()
            twice = problem.layout.join(p.grad for p in net.parameters())
            said["waiting"] = float((twice - 2 * look).norm()), float((look - problem.grad).norm()), float(look.norm())
            said["again"] = float((sharpness(problem, tol=1e-2).values - before.values).abs())
        else: attempt(sys.argv[2])
        torch.save(said, f"{sys.argv[1]}/{mine}.pt")
        if sys.argv[2] != "soft": os._exit(0)                         # as a process ends that lets an error through
""")


@pytest.mark.parametrize("how", ["soft", pytest.param("waits", marks=pytest.mark.slow), pytest.param("dies", marks=pytest.mark.slow)])
def test_a_fault_of_one_process_is_heard_by_all(how, tmp_path):
    "An error, a NaN and a probe that fails: all raise, and go on. An error where the others wait in a sum, and a death: they end. And a look while half a gradient waits to be added up."
    (tmp_path / "fault.py").write_text(FAULTS)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}        # no torchrun, which would end the other one
    both = [subprocess.Popen([sys.executable, tmp_path / "fault.py", tmp_path, how], env=env | {"RANK": str(k)}, stderr=subprocess.PIPE, text=True) for k in range(2)]
    texts = [p.communicate(timeout=120)[1] for p in both]
    assert [p.returncode for p in both] == [0, 9 if how == "dies" else 0], texts
    zero, one = (torch.load(f, weights_only=True) if (f := tmp_path / f"{k}.pt").exists() else {} for k in range(2))
    if how == "soft":
        assert "leaf 0 fell" in zero["alike"] and "leaf 1 fell" in one["alike"] and zero["again"] == one["again"] == 0
        assert zero["nan"] == one["nan"] and zero["nan"].startswith("NotFinite") and "process 1;" in zero["nan"]
        assert zero["uneven"] == one["uneven"] == "the processes have 1, 2 batches; give all of them 1."
        assert zero["probe"] == "RuntimeError: process 1 failed: ValueError: a probe fell" and one["probe"] == "ValueError: a probe fell"
        for late, other, size in (zero["waiting"], one["waiting"]): assert late < 1e-12 * size and other < 1e-12 * size
    elif how == "waits":
        assert one["waits"] == "Apart: process 1 failed and the others wait for it, so end it: ValueError: a leaf fell"
        assert zero["waits"] == "Apart: process 1 failed: ValueError: a leaf fell"
    else: assert zero["dies"] == "Apart: process 1 is gone, or waits, without a word"
    assert how == "soft" or zero["seconds"] < 20


HALF = textwrap.dedent("""
    import sys, torch
    from torch import nn
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from gradnb import sharpness
    from gradnb.problem.parallel import rank, together
    from gradnb.problem.sharded import Sharded

    def build(dtype=torch.float32):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=.1, activation="gelu", batch_first=True)
        return nn.Sequential(nn.Embedding(7, 8), layer, nn.Linear(8, 7)).to(dtype)

    def loss(model, x, y): return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def texts(): return torch.randint(7, (2, 8, 5), generator=torch.Generator().manual_seed(1))

    if __name__ == "__main__":
        with together():
            (mine, n), out = rank(), {}
            x, y = (t.chunk(n)[mine] for t in texts())
            for kind, dtype, policy in (("policy", torch.float32, MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)), ("half", torch.bfloat16, MixedPrecisionPolicy())):
                ends, calls = [], []
                for look in (False, True):
                    net = build(dtype)
                    for layer in net: fully_shard(layer, mp_policy=policy, reshard_after_forward=False)
                    fully_shard(net, mp_policy=policy)
                    for p in net.parameters(): p.register_post_accumulate_grad_hook(lambda p: calls.append(look))
                    opt, found = torch.optim.AdamW(net.parameters(), lr=.01), None
                    torch.manual_seed(2 + mine)
                    for k in range(4):
                        net.set_requires_gradient_sync(k % 2 == 1)           # a step of two passes, with a look between them
                        loss(net, x, y).backward()
                        if look and k in (0, 2): found = sharpness(Sharded(net, lambda model: loss(model, x, y)).frozen(), warm=found and found.sketch, max_matvecs=2)
                        if k % 2: opt.step(), opt.zero_grad()
                    state = [t for p in net.parameters() for t in opt.state[p].values()]
                    ends.append([getattr(t, "to_local", lambda: t)().clone() for t in (*net.parameters(), *state)])
                    if not look: assert all(p.dtype == dtype for p in net.parameters())
                assert calls.count(False) == calls.count(True) > 0
                found = sharpness(Sharded(net.eval(), lambda model: loss(model, x, y)), tol=1e-2)
                out[kind] = dict(same=all(map(torch.equal, *ends)), values=found.values, errors=found.errors, theta={k: p.full_tensor().detach() for k, p in net.named_parameters()})
            torch.save(out, f"{sys.argv[1]}/{mine}.pt")
""")


def test_half_precision_is_measured_in_single(tmp_path):
    "FSDP that computes in bfloat16, and bfloat16 shards: no bit of training moves, and λ₁ is that of the dense Hessian in float64 at the same weights."
    (tmp_path / "half.py").write_text(HALF)
    torchrun(tmp_path / "half.py", tmp_path)
    made = {"__name__": "half"}
    exec(HALF, made)
    got, other = (torch.load(tmp_path / f"{k}.pt", weights_only=True) for k in range(2))
    for kind, seen in got.items():
        net = made["build"](torch.float64).eval()
        names, shapes, sizes = zip(*((k, p.shape, p.numel()) for k, p in net.named_parameters()))
        theta = torch.cat([seen["theta"][k].double().reshape(-1) for k in names])
        def loss(t): return made["loss"](lambda x: torch.func.functional_call(net, {k: b.view(s) for k, s, b in zip(names, shapes, t.split(sizes))}, x), *made["texts"]())
        with sdpa_kernel(SDPBackend.MATH): exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, theta, vectorize=True))[-1]
        assert seen["same"] and other[kind]["same"]
        assert abs(seen["values"][0] - exact) <= seen["errors"][0] < .1 * exact, kind


KINKED = textwrap.dedent("""
    import sys, torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.utils.checkpoint import checkpoint
    from gradnb import sharpness
    from gradnb.problem.parallel import rank, together
    from gradnb.problem.sharded import Sharded

    class Again(nn.Sequential):
        def forward(self, x): return checkpoint(super().forward, x, use_reentrant=False)

    def build(kind):
        torch.manual_seed(0)
        if kind == "odd": return nn.Sequential(nn.Linear(36, 16), nn.PReLU(16), nn.Linear(16, 12), nn.ELU(.5), nn.Linear(12, 10), nn.Hardswish(), nn.Unflatten(1, (5, 2)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(5, 4))
        if kind != "cnn": return {"mlp": nn.Sequential, "again": Again}[kind](nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 12), nn.LeakyReLU(.1), nn.Linear(12, 4), nn.Hardtanh(-2, 2))
        return nn.Sequential(nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.ReLU6(), nn.Flatten(), nn.Linear(24, 4))

    def data(): return torch.randn(200, 36, generator=torch.Generator().manual_seed(1)), torch.arange(200) % 4

    def loss(kind, logits, y):
        if kind != "odd": return nn.functional.cross_entropy(logits, y)
        ratio, gain = (logits[:, 0] / 3).exp(), torch.linspace(-1, 1, 4, dtype=logits.dtype)[y]         # PPO's, and of an error
        return nn.functional.l1_loss(logits[:, 1], gain) - torch.min(ratio * gain, ratio.clamp(.9, 1.1) * gain).mean() + nn.functional.huber_loss(logits[:, 2], gain, delta=.3) + logits.abs().max(1).values.mean()

    if __name__ == "__main__":
        with together():
            (mine, n), out = rank(), {}
            x, y = (t.chunk(n)[mine] for t in data())
            for kind in ("mlp", "again", "cnn", "odd"):
                net, calls = build(kind), []
                for layer in net:
                    if [*layer.parameters()]: fully_shard(layer)
                fully_shard(net)
                mean = lambda model: calls.append(0) or loss(kind, model(x), y)
                problem, opt = Sharded(net, mean), torch.optim.SGD(net.parameters(), .5)
                for step in range(1 + (kind == "cnn")):        # where the model is, as it moves
                    before = len(calls)
                    found = sharpness(problem, tol=3e-2)
                    out[f"{kind} {step}"] = dict(found=(found.values[0], found.errors[0]), gradients=(len(calls) - before) / found.matvecs, theta={k: p.full_tensor().detach() for k, p in net.named_parameters()})
                    opt.zero_grad()
                    mean(net).backward()
                    torch.testing.assert_close(problem.grad, problem.layout.join(p.grad for p in net.parameters()))
                    opt.step()
            torch.save(out, f"{sys.argv[1]}/{mine}.pt")
""")


def test_differences_keep_to_the_pieces_of_relus(tmp_path):
    "Networks of ReLUs, leaky ones, clipped ones and max pooling under FSDP, computed again in the backward pass or not, and losses with kinks: λ₁ of the dense Hessian in float64 lies in a narrow interval."
    (tmp_path / "kinked.py").write_text(KINKED)
    torchrun(tmp_path / "kinked.py", tmp_path)
    made = {"__name__": "kinked"}
    exec(KINKED, made)
    got = torch.load(tmp_path / "0.pt", weights_only=True)
    for kind, seen in got.items():
        net, (x, y) = made["build"](kind.split()[0].replace("again", "mlp")).double(), made["data"]()
        names, shapes, sizes = zip(*((k, p.shape, p.numel()) for k, p in net.named_parameters()))
        theta = torch.cat([seen["theta"][k].double().reshape(-1) for k in names])
        def loss(t): return made["loss"](kind.split()[0], torch.func.functional_call(net, {k: b.view(s) for k, s, b in zip(names, shapes, t.split(sizes))}, x.double()), y)
        exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, theta, vectorize=True))[-1]
        value, error = seen["found"]
        assert abs(value - exact) <= error < .05 * exact, (kind, value, error, exact)
        assert seen["gradients"] < 7


HELD = textwrap.dedent("""
    import gc, sys, torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from gradnb import sharpness
    from gradnb.problem.parallel import rank, together
    from gradnb.problem.sharded import Sharded

    with together():
        torch.manual_seed(0)
        net, x = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(170, 170), nn.Tanh())]), torch.randn(4, 170) / 4
        for layer in net[::2]: fully_shard(layer)
        fully_shard(net)
        p, held, calls = sum(v.numel() for v in net.parameters()), [], []
        def loss(model):
            calls.append(1)
            if len(calls) % 10 == 0:
                tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
                sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() / 4 / p for t in tensors}
                held.append([sum(sizes.values()), max(max(t.shape, default=0) for t in tensors) / p])
            return (model(x) - x).square().mean()
        found = sharpness(Sharded(net, loss))
        torch.save({"held": torch.tensor(held), "converged": found.converged}, f"{sys.argv[1]}/{rank()[0]}.pt")
""")


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_a_process_holds_falls_as_their_number(n, tmp_path):
    "All tensors that live while a search takes its gradients: 16 copies of its vectors, parameters and gradient, and none as long as all parameters."
    (tmp_path / "held.py").write_text(HELD)
    torchrun(tmp_path / "held.py", tmp_path, n=n)
    for k in range(n):
        got = torch.load(tmp_path / f"{k}.pt", weights_only=True)
        assert got["converged"] and len(got["held"]) > 15
        most, longest = got["held"].max(0).values.tolist()
        assert 14 / n < most < 20 / n and longest < 1.1 / n             # no row is longer than a shard's, and a little


def test_pieces_are_held_until_other_ones_are_met():
    from gradnb.problem.pieces import Held
    held, x = Held(), torch.tensor([-1., 2.])
    with held: torch.relu(x)
    with held: assert torch.relu(-x).tolist() == [0, -2]
    with pytest.raises(KeyboardInterrupt), held: raise KeyboardInterrupt
    assert not held.lost
    with held: pass
    assert held.lost


WEIGHT = torch.arange(10).double()
LOW, HIGH = torch.tensor([-7., -3., -1., -.3, 0., .2, 1., 3., 6., 8.]).double(), torch.tensor([-7., 0., -1., .3, 0., -.2, 2., 3., 6., -8.]).double()


@pytest.mark.parametrize("f", [
    F.relu, lambda x: F.relu(x * 1, True), lambda x: torch.relu_(x * 1), F.relu6, F.leaky_relu, F.hardtanh, lambda x: F.hardtanh_(x * 1), F.hardsigmoid, F.hardswish, lambda x: F.hardswish(x * 1, True),
    lambda x: F.threshold(x, .2, .1), F.softshrink, lambda x: F.elu(x, .5), F.selu, lambda x: F.prelu(x.view(2, 5), torch.arange(5.).double()), abs, torch.abs, lambda x: x.clamp(-1, 3), lambda x: x.clamp_min(.2),
    lambda x: (x * 1).clamp_(0), lambda x: torch.clamp(x, min=HIGH), lambda x: torch.maximum(x, HIGH), lambda x: x.min(other=HIGH), lambda x: torch.maximum(x[:, None], HIGH[None]), lambda x: x.view(5, 2).max(1)[0],
    lambda x: x.view(5, 2).min(dim=0, keepdim=True).values, torch.max, lambda x: x.view(2, 5).amax((0, 1)), lambda x: torch.amin(input=x.view(2, 5), dim=1), lambda x: F.l1_loss(x, HIGH),
    lambda x: F.l1_loss(x, HIGH, reduction="none"), lambda x: F.huber_loss(x, HIGH, reduction="sum", delta=.5), lambda x: F.smooth_l1_loss(x, HIGH), lambda x: F.smooth_l1_loss(x, HIGH, beta=0.),
    *(lambda x, of=of, r=r: of(x, HIGH, weight=WEIGHT, reduction=r) for of in (F.l1_loss, F.huber_loss) for r in ("none", "sum", "mean")),
    lambda x: F.max_pool1d(x.view(1, 1, 10), 3, 2, 1), lambda x: F.adaptive_max_pool1d(x.view(1, 1, 10), 3), lambda x: F.max_pool3d(x[:8].view(1, 1, 2, 2, 2), 2)])
def test_what_is_held_is_torchs_own(f):
    "Values and gradients, also on the kinks; what is noted is smooth beside them; no nan is lost, where a piece is not another's."
    from gradnb.problem.pieces import Held
    def both(x): return (out := f(x := x.clone().requires_grad_())).detach(), *torch.autograd.grad(out.sum(), x)
    own, held = both(LOW), Held()
    for _ in range(2):
        with held: torch.testing.assert_close(both(LOW), own, rtol=1e-14, atol=1e-14)
    assert len(held.noted) == 1 and not held.lost
    slopes = []
    for h in (-2e-4, -1e-4, 1e-4, 2e-4):
        with held: slopes.append(both(LOW + h)[1])
    torch.testing.assert_close(slopes[3] - slopes[0], 2 * (slopes[2] - slopes[1]), rtol=1e-3, atol=1e-9)
    with held: assert f(torch.full_like(LOW, torch.nan)).isnan().all()


def test_infinities_are_held():
    from gradnb.problem.pieces import Held
    held, x = Held(), torch.tensor([1., -torch.inf])
    for _ in range(2):
        with held: assert F.relu(x).tolist() == [1, 0] and torch.maximum(x, torch.full((2,), -torch.inf)).tolist() == [1, -torch.inf]


def test_what_cannot_be_sharded_says_so():
    from gradnb.problem.sharded import Sharded
    with pytest.raises(TypeError, match="'weight' is a plain tensor"): Sharded(torch.nn.Linear(2, 2), lambda model: 0.)
    with pytest.raises(ValueError, match="no trainable parameters"): Sharded(torch.nn.Tanh(), lambda model: 0.)
