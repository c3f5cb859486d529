"The installed command, as a user types it."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradnb import GD, Spec, Store, grid
from gradnb.cli import main
from gradnb.ground.display import as_csv, as_text
from gradnb.runs.sweeps.many import results

GRADNB = Path(sys.executable).with_name("gradnb")
LINE = "train --dataset digits-300 --model fc-tanh:width=10 --loss mse --rule momentum:beta=0.9 --lr 0.01 --batch 32 --probe sharpness:every=50"


def gradnb(*words, cwd):
    done = subprocess.run([GRADNB, *words], capture_output=True, text=True, cwd=cwd, env={**os.environ, "GRADNB_STORE": "here"})
    return done.returncode, done.stdout, done.stderr


def test_train_again_and_read(tmp_path, monkeypatch, capsys):
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
    monkeypatch.chdir(tmp_path)                                  # the rest in this process
    monkeypatch.setenv("GRADNB_STORE", "here")
    def runs(*words): return main(["runs", *words]), capsys.readouterr().out
    code, listed = runs("list", "--hashes")
    assert code == 0 and listed.split() == [run_hash]
    assert "finished" in runs("list")[1] and '"kind": "Piecewise"' in runs("show", run_hash[:5])[1]


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


@pytest.mark.parametrize("how, gone", [("removed", ""), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("removed", "traces"), ("moved", ""), ("moved", "traces")))])
def test_a_run_whose_folder_is_removed_ends_with_a_word(tmp_path, gone, how):
    line = [*LINE.split(), "--steps", "100000", "--store", "s"]
    process = subprocess.Popen([GRADNB, *line], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (found := [f for f in (tmp_path / "s").glob("*/traces/loss.trace") if f.stat().st_size > 1000]) and time.monotonic() < deadline: time.sleep(.01)
    run = found[0].parent.parent
    if how == "removed": shutil.rmtree(run / gone, ignore_errors=True)
    else: os.rename(run / gone, tmp_path / "away")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "") and "Traceback" not in err, err
    assert re.search(rf"gradnb: \S*s/{run.name}\S* was removed or (replaced|changed) by someone else while this process was writing it", err)


def test_verify_says_what_is_damaged(tmp_path, capsys):
    specs = [Spec("digits-60", "fc-tanh:width=3", "mse", GD(.05), 8, probes="train:every=4", seed=seed) for seed in range(3)]
    runs = [Store(tmp_path / "here").run(s, progress=False) for s in specs]
    def verify(*words): return main(["runs", "verify", *words, *(() if "--store" in words else ("--store", str(tmp_path / "here")))]), *capsys.readouterr()
    code, out, err = verify()
    assert (code, err) == (0, "") and out.splitlines() == [f"{r.hash}  finished    sound" for r in sorted(runs, key=lambda r: r.hash)]
    harm = {"traces/loss.arrow": lambda f: f.write_bytes(f.read_bytes()[:-300]), "checkpoint.safetensors": lambda f: f.unlink(), "spec.json": lambda f: f.write_text("{}"),
            "manifest.json": lambda f: f.write_text(f.read_text().replace("finished", "finished!")), "traces/train.arrow": lambda f: f.write_bytes(bytes(f.stat().st_size))}
    for name, hurt in harm.items():
        file = runs[0].path / name
        whole = file.read_bytes()
        hurt(file)
        for words in ((), (runs[0].hash[:8],), [r.hash for r in runs]):
            code, out, err = verify(*words)
            bad = [line for line in out.splitlines() if line.endswith(" damaged")]
            assert code == 1 and "Traceback" not in err and len(bad) == 1 and bad[0].startswith(runs[0].hash) and f"{runs[0].hash}/{name}" in out, (name, out, err)
            assert out.count(" sound\n") == (0 if len(words) == 1 else 2) and "1 of" in err and "verify=True" in err
        assert verify(runs[1].hash)[0] == 0
        file.write_bytes(whole)
    (runs[0].path / "traces" / "loss.arrow").write_bytes(b"")
    Store(tmp_path / "here").run(specs[0], verify=True, progress=False)
    assert verify()[0] == 0 and verify("0123456789abcdef")[0] == 2
    assert verify("--store", str(tmp_path / "nowhere"))[0] == 0


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
    ("figures --jobs 0", "jobs=0"),
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


def test_a_sweep_says_a_warning_once_and_on_a_line_of_its_own(tmp_path, capsys):
    line = f"sweep --dataset digits-50 --model fc-relu:width=4 --loss mse --rule gd --lr 0.1 --steps 2 --probe sharpness:every=1 --axis seed=0..1 --engine here --store {tmp_path}"
    assert main(line.split()) == 0
    said = [row for row in capsys.readouterr().err.replace("\r", "\n").splitlines() if "has kinks" in row]
    assert len(said) == 1 and said[0].startswith("gradnb: the loss has kinks"), said


@pytest.mark.parametrize("words", ["", "train", "runs", "runs list", "runs show", "runs frame", "figures", "claims", "new-figure", "bench", "names"])
def test_help(words, tmp_path):
    code, out, _ = gradnb(*words.split(), "--help", cwd=tmp_path)
    assert code == 0 and "usage: gradnb" in out and len(out.splitlines()) < 60


def test_names_lists_what_there_is(tmp_path):
    out = gradnb("names", cwd=tmp_path)[1]
    assert all(word in out for word in ("digits", "fc-tanh", "linear_hinge", "momentum", "minibatch", "sharpness", "edge_of_stability"))


@pytest.mark.parametrize("words, said", [
    ("probe sharpness", r"every: int = 10 +steps"), ("rule lamb", r"beta1: float = 0\.9 +decay"), ("model fc-tanh", r"width: int = 200"),
    ("loss mse", "squared error"), ("dataset digits", "digits"), ("flow gradientflow", r"method: RK4"), ("figure spectrum", r"size = .smoke. +smoke"), ("losses mse", "squared error"), ("probes flatness", "pac_bayes")])
def test_names_explains_one(words, said, capsys):
    assert main(["names", *words.split()]) == 0
    assert re.search(said, capsys.readouterr().out)


# --- words that were once a traceback, or said nothing ------------------------------------------------------------

SMALL = "--dataset digits-100 --model fc-tanh:width=4 --steps 5"


@pytest.mark.parametrize("words, says", [
    ("--lr .1 --rule torch:cls=Adam,betas=(0.9,)", "torch.optim.Adam does not take lr=0.1, betas=(0.9,)"),
    ("--rule muon", "*=adam"), ("--rule groups:matrix=muon", "no rule for block 'fc1.bias'"), ("--rule groups:*=adam --lr .1", "got lr=0.1"),
    ("--lr .1 --rule torch:cls=Rprop,etas=(1,)", "etas=(1,)"), ("--rule torch:cls=Adam,betas=3", "does not take betas=3"),
    *((f"--lr .1 --device {d}", f"no device {d!r}") for d in ("hpu", "xpu", "meta", "mps", "privateuseone", "cuda:99", "nonsense")),
    ("--lr .1 --probe original_index:size=0", "size=0"), ("--lr .1 --probe original_index:most=1", "most=1"),
    ("--lr .1 --loss-goal nan", "loss_goal=nan"), ("--lr .1 --acc-goal nan", "acc_goal=nan"), ("--lr .1 --loss-goal=-inf", "loss_goal=-inf"),
    ("--lr .1 --drop 3:nan", "finite factors, got ((3, nan),)"), ("--lr .1 --drop 3:inf", "((3, inf),)"),
    ("--lr .1 --dataset corrupt", "needs of, share: write corrupt:of=VALUE,share=VALUE"), ("--lr .1 --dataset duplicate:of=digits", "needs points, copies")])
def test_a_wrong_value_is_named(words, says, tmp_path, capsys):
    assert main(["train", "--store", str(tmp_path / "runs"), *SMALL.split(), *words.split()]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("axis, says", [("seed=0..99999999999", "are 100,000,000,000"), ("seed=5..3", "are 0"), ("seed=", "FIELD=V")])
def test_an_axis_without_an_end_is_refused(axis, says, tmp_path, capsys):
    assert main(["sweep", *SMALL.split(), "--lr", ".1", "--axis", axis, "--store", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("estimator, model", [("gradientclustering:size=16,k=4,every=1", "fc-tanh:width=4"), ("gradientclustering:size=16,every=1,sketch=8", "fc:width=4"),
                                              ("gradientclustering:size=16,k=4,every=1,variant=faghri2020", "fc:width=4")])
@pytest.mark.parametrize("lr", ["1e6", "1e25"])
def test_divergence_is_an_outcome_under_every_estimator(estimator, model, lr, tmp_path, capsys):
    "Saturated: all gradients are equal, and the spread that a variance is divided by is zero. Overflowing: they are not finite."
    code = main(["train", "--dataset", "digits-100", "--model", model, "--loss", "mse", "--steps", "12", "--lr", lr, "--estimator", estimator, "--store", str(tmp_path)])
    said = capsys.readouterr()
    status = json.loads(next(tmp_path.glob("*/manifest.json")).read_text())["status"]
    assert (code, status) in ((0, "finished"), (1, "diverged")), said
    if lr == "1e25" and model == "fc:width=4": assert status == "diverged" and "lower the learning rate" in said.out


@pytest.mark.parametrize("module, words", [("submitit", "sweep --lr .1 --axis seed=0 --engine slurm"), ("torch.utils.tensorboard", "runs export --to tensorboard")])
def test_what_is_not_installed_is_said(module, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL.split(), "--lr", ".1", "--store", "s"]) == 0
    monkeypatch.setitem(sys.modules, module, None)
    more = [] if words.startswith("runs") else SMALL.replace("5", "6").split()
    assert main([*words.split(), *more, "--store", "s"]) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [0, 200, 300])
def test_a_damaged_archive_never_recommends_pickles(cut, tmp_path, capsys):
    import numpy as np
    file = tmp_path / "a.npz"
    np.savez(file, x_train=np.random.rand(9, 3), y_train=np.arange(9), x_test=np.random.rand(9, 3), y_test=np.arange(9))
    data = bytearray(file.read_bytes())
    data[cut:cut + 8] = b"\x80\x04damage"
    file.write_bytes(data)
    assert main(["train", "--dataset", f"npz:{file}", "--lr", ".1", "--store", str(tmp_path / "s")]) == 2
    err = capsys.readouterr().err
    assert str(file) in err and "allow_pickle" not in err


def test_a_text_that_is_not_utf8_is_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 100)
    assert main(["train", "--dataset", f"text:{tmp_path}/a.txt", "--lr", ".1", "--store", str(tmp_path / "s")]) == 2
    assert f"{tmp_path}/a.txt is no UTF-8 text: byte 3 is 0xe9" in capsys.readouterr().err


def test_a_terminal_without_our_letters_is_told_in_its_own(tmp_path):
    line = "train --dataset digits-90 --model fc-tanh:width=5 --lr 0.5 --steps 30 --acc-goal 0.01 --goal-every 1"
    for words, says in (("--help", "usage: gradnb"), ("names --help", "usage"), (line, "training accuracy"), (line, "is already there: training accuracy")):
        done = subprocess.run([sys.executable, "-m", "gradnb", *words.split()], capture_output=True, cwd=tmp_path,
                              env={**os.environ, "GRADNB_STORE": "here", "PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0 and says in done.stdout.decode("ascii"), done.stderr
    assert ">= 0.01 at step 0" in done.stdout.decode("ascii")


@pytest.mark.parametrize("words, says", [("--lr inf", "lr=inf"), ("--lr nan", "lr=nan"), ("--lr 1 --probe sharpness:tol=inf", "tol=inf"),
                                         ("--lr 1 --probe sharpness:every=nan", "n=nan"), ("--lr 1 --goal-every 0", "goal_every=0")])
def test_numbers_that_are_none_are_refused_by_name(words, says, tmp_path, capsys):
    assert main(["train", "--dataset", "digits-90", "--store", str(tmp_path / "runs"), *words.split()]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["digits\x1b[31mred", "digits\n0123456789abcdef  finished", "a\u202eb", "=1+1", "+1", "@x", "a\rb", "a\u2028b", "\x00"])
def test_names_are_shown_as_names(name, tmp_path, capsys):
    "A stranger's run and a grid: one line each, nothing that a terminal obeys, nothing that a spreadsheet computes."
    spec = Spec(name, "fc", "ce", GD(.1), 3)
    (tmp_path / spec.hash).mkdir()
    (tmp_path / spec.hash / "spec.json").write_text(spec.to_json())
    assert main(["runs", "list", "--store", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 and out.rstrip("\n").isprintable() and out.startswith(spec.hash)
    table = results(grid(spec, seed=(0, 1)), Store(tmp_path / "s")).drop(columns="error")
    for lines in (as_csv(table).splitlines(), as_text(table).splitlines()):
        assert len(lines) == 3 and all(line.isprintable() and not line.startswith(tuple("=+-@")) for line in lines)
    for words in (["train"], ["sweep", "--axis", "seed=0,1", "--dry-run"]):
        assert main([*words, "--dataset", name, "--lr", ".1", "--store", str(tmp_path / "s")]) == 2
        assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())
