"The installed command, as a user types it."
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradnb.cli import main

GRADNB = Path(sys.executable).with_name("gradnb")
LINE = "train --dataset digits-300 --model fc-tanh:width=10 --loss mse --rule momentum:beta=0.9 --lr 0.01 --batch 32 --probe sharpness:every=50"


def gradnb(*words, cwd):
    done = subprocess.run([GRADNB, *words], capture_output=True, text=True, cwd=cwd, env={**os.environ, "GRADNB_STORE": "here"})
    return done.returncode, done.stdout, done.stderr


def test_train_again_and_read(tmp_path):
    line = [*LINE.split(), "--steps", "60", "--drop", "30:0.1"]
    code, out, err = gradnb(*line, cwd=tmp_path)
    assert code == 0, err
    run_hash = out.split()[0]
    assert (tmp_path / "here" / run_hash / "spec.json").exists()
    code, out, _ = gradnb(*line, cwd=tmp_path)
    assert (code, out) == (0, f"{run_hash} is already there: finished 60 steps\n")
    code, csv, _ = gradnb("runs", "frame", run_hash, "--csv", cwd=tmp_path)
    rows = csv.splitlines()
    assert code == 0 and rows[0].startswith("step,loss,sharpness") and len(rows) == 62
    assert gradnb("runs", "list", "--hashes", cwd=tmp_path)[1].split() == [run_hash]
    assert "finished" in gradnb("runs", "list", cwd=tmp_path)[1]
    assert '"kind": "Piecewise"' in gradnb("runs", "show", run_hash[:5], cwd=tmp_path)[1]


def test_ctrl_c_keeps_everything_and_the_same_line_goes_on(tmp_path):
    line = [*LINE.split(), "--steps", "100000"]
    reset = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); os.execv(sys.argv[1], sys.argv[1:])"
    start = lambda: subprocess.Popen([sys.executable, "-c", reset, GRADNB, *line, "--store", "s"], cwd=tmp_path, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def rows(): return sum(f.stat().st_size for f in (tmp_path / "s").glob("*/traces/loss.trace"))

    for more in range(2):
        before, process, deadline = rows(), start(), time.monotonic() + 120
        while rows() < before + 1000 and time.monotonic() < deadline: time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "interrupted at step" in err and "the same call resumes run" in err
        assert ("going on" in err) == bool(more)


@pytest.mark.parametrize("words, says", [
    ("train --model fc-tan --lr 1", "Did you mean 'fc-tanh'"),
    ("train --rule gd", "needs lr"),
    ("train --rule torch:cls=LBFGS --lr 1", "closure"),
    ("train --lr 0.1 --batch 9999", "replace=True"),
    ("train --lr 0.1 --dataset chebyshev-3-20 --loss ce", "ce"),
    ("train --lr 0.1 --probe loss", "no probe 'loss'"),
    ("train --lr 0.1 --probe sharpness --probe sharpness:every=3", "two probes"),
    ("train --lr 0.1 --device cuda:77", "no device"),
    ("runs show nothing", "no run hash"),
    ("figures no_such_figure", "no figure"),
    ("figures -p no_such_parameter=3", "no_such_parameter"),
    ("bench no_such_bench", "no bench"),
])
def test_a_wrong_word_is_one_line(words, says, tmp_path):
    code, out, err = gradnb(*words.split(), cwd=tmp_path)
    assert code == 2 and says in err and err.count("\n") <= 9 and "Traceback" not in err, err
    assert out == "" and not list(tmp_path.rglob("*.trace"))


@pytest.mark.parametrize("words, says", [("--steps -5", "steps=-5"), ("--batch 0", "size=0"), ("--acc-goal 2", "got 2"),
                                         ("--batch 9999", "batch of 9999"), ("--rule agd", "no rule for vectors"), ("--probe sharpness --probe sharpness:k=2", "two probes")])
def test_what_is_refused_leaves_no_run(words, says, tmp_path, capsys):
    assert main(["train", *["--lr", "0.1"] * ("agd" not in words), "--store", str(tmp_path / "runs"), *words.split()]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", ["", "train", "runs", "runs list", "runs show", "runs frame", "figures", "bench", "names"])
def test_help(words, tmp_path):
    code, out, _ = gradnb(*words.split(), "--help", cwd=tmp_path)
    assert code == 0 and "usage: gradnb" in out and len(out.splitlines()) < 60


def test_names_lists_what_there_is(tmp_path):
    out = gradnb("names", cwd=tmp_path)[1]
    assert all(word in out for word in ("digits", "fc-tanh", "linear_hinge", "momentum", "minibatch", "sharpness", "edge_of_stability"))


@pytest.mark.parametrize("words, said", [
    ("probe sharpness", r"every: int = 10 +steps"), ("rule lamb", r"beta1: float = 0\.9 +decay"), ("model fc-tanh", r"width: int = 200"),
    ("loss mse", "squared error"), ("dataset digits", "digits"), ("flow gradientflow", r"method: RK4"), ("figure spectrum", r"size = .smoke. +smoke")])
def test_names_explains_one(words, said, capsys):
    assert main(["names", *words.split()]) == 0
    assert re.search(said, capsys.readouterr().out)
