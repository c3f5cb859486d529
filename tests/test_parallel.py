"Data parallelism: ranks agree to the bit, with one process to rounding; from the command line into a store, and resumed."
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from gradnb import Store
from gradnb.problem.parallel import all_sum, from_first, rank, split

GRADNB = str(Path(sys.executable).with_name("gradnb"))
SCRIPT = textwrap.dedent("""
    import sys, torch
    from torch import nn
    from gradnb import Batch, Descent, MiniBatch, Momentum, PROBES, Problem, build_model, load_dataset, train
    from gradnb.problem.network import drawing
    from gradnb.problem.parallel import rank, split, together
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
        torch.save(out, f"{sys.argv[1]}/{rank()[0]}.pt")
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
