"A loop of anyone's writes into a store: what it logs is read as it was, while it runs, after a kill, and beside the runs that gradnb trained."
import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from gradnb import GD, Estimate, Quadratic, Run, Spec, Store, Stream, hutchinson, sharpness, spectrum
from gradnb.cli.command import main
from gradnb.runs.exports import export_runs
from gradnb.runs.spec import Identity, Imported
from gradnb.show.explorers.runs import RunExplorer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def store(tmp_path): return Store(tmp_path / "runs")


@dataclass
class Optim:
    name: str
    betas: tuple


def test_what_is_logged_is_read_as_it_was(store):
    H = torch.diag(torch.tensor([9., 4., 1., -2.], dtype=torch.float64))
    problem, losses = Quadratic(H), np.random.default_rng(0).normal(size=50)
    with store.record("by hand", {"lr": .1, "seed": 3}) as run:
        for step, loss in enumerate(losses):
            run.log(step, {"loss": loss, "grad_norm": torch.tensor(loss)**2})
            if step % 10 == 0: run.log(step, {"variance": Estimate(loss, 1., loss - 2, loss + 2), "sharpness": sharpness(problem, problem.theta0, k=2, tol=1e-9)})
            if step % 25 == 0: run.log(step, {"one": sharpness(problem, problem.theta0, tol=1e-9), "weights": {"a": torch.arange(6.).view(2, 3), "b": 1}})
    found = Store(store.root).open(run.hash)
    assert np.array_equal(found.traces["loss"].values, losses) and np.array_equal(found.trace("grad_norm").values, losses**2)
    assert found.frame("variance").columns.tolist() == ["step", "value", "stderr", "low", "high"]
    assert np.array_equal(found.trace("variance").columns["high"], losses[::10] + 2)
    eigs = found.trace("sharpness").columns
    assert list(eigs) == ["value", "error", "residual", "converged", "matvecs"] and np.allclose(eigs["value"], [[9., 4.]] * 5, atol=1e-8)
    assert found.trace("one").columns["value"].shape == (2,) and np.allclose(found.trace("one").values, 9.)
    assert np.array_equal(found.arrays["weights"][25]["a"], [[0, 1, 2], [3, 4, 5]])
    assert (found.status, found.manifest["step"], found.damage()) == ("finished", 49, {})
    assert found.manifest["rows"] == {"loss": 50, "grad_norm": 50, "variance": 5, "sharpness": 5, "one": 2, "weights": 2}
    assert Identity.from_json(found.spec.to_json()) == found.spec and {"lr": .1, "seed": 3}.items() <= found.spec.fields.items()
    assert not [*(run.path / "traces").glob("*.trace")]                          # compacted, as every run that is done


def test_results_of_the_library_are_rows(store):
    A = torch.diag(torch.arange(1., 9.))
    with store.record("results") as run: run.log(0, {"trace": hutchinson(A.__matmul__, 8, 16, Stream(0)) , "spectrum": spectrum(A.__matmul__, 8, 2, 4)})
    assert run.trace("trace").values[0] == pytest.approx(36., rel=1e-5)              # exact on a diagonal matrix
    assert run.arrays["spectrum"][0]["nodes"].shape == (2, 4)


def test_a_recorded_run_is_a_run(store, tmp_path, capsys):
    store.run(Spec("digits-60", "fc-tanh:width=3", "mse", GD(0.05), 4, probes=("sharpness:every=2",)), progress=False)
    with store.record("mine", {"rule": "SGD", "rule.lr": .1}) as run:
        for step in range(5): run.log(step, {"loss": 1 / (step + 1), "sharpness": 2. * step})
    frame = store.frame("sharpness")
    assert len(frame) == 3 + 5 and frame[frame["run"] == run.hash]["value"].tolist() == [0, 2, 4, 6, 8]
    assert [r.hash for r in store.list(source="mine", rule="SGD", status="finished")] == [run.hash] and len(store.table()) == 2
    explorer = RunExplorer(store, follow=0)
    panels = {p.name: p for p in explorer.panels(explorer.look)}
    assert len(panels["loss"].lines) == 2 and any(line.y.tolist() == [1 / (k + 1) for k in range(5)] for line in panels["loss"].lines)
    folder, = export_runs([run], tmp_path / "out")
    assert np.genfromtxt(folder / "loss.csv", delimiter=",", names=True)["value"].tolist() == [1 / (k + 1) for k in range(5)]
    assert json.loads((folder / "spec.json").read_text())["source"] == "mine"
    for argv in (["list", "source=mine"], ["show", run.hash[:8]], ["verify"], ["export", run.hash, "--out", str(tmp_path / "more")], ["frame", run.hash, "--trace", "loss", "--csv"]):
        assert main(["runs", *argv, "--store", str(store.root)]) == 0
    assert "recorded: mine" in capsys.readouterr().out
    for do in (lambda: store.run(Imported("recorded", "never", {})), run.spec.build, lambda: store.run(run.spec, verify=True) if (run.path / "traces/loss.arrow").unlink() is None else None):
        with pytest.raises(ValueError, match="neither replayed nor resumed"): do()


CHILD = """
import os, signal, sys, torch
from gradnb import Store
run = Store(sys.argv[1]).record("killed", {"lr": .1}, again="go on")
for step in range(10**9):
    run.log(step, {"loss": step / 7, "picture": torch.full((2, 2), float(step))})
    if step == 300: print("there", flush=True)
"""


def test_a_killed_loop_loses_nothing_and_goes_on(store):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(store.root)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert child.stdout.readline() == "there\n"
        run, = store.list()
        assert run.status == "running" and len(run.trace("loss")) >= 300              # while it is written
        with pytest.raises(RuntimeError, match=f"is being written by process {child.pid}"): store.record("killed", {"lr": .1}, again="go on")
        with pytest.raises(ValueError, match="already: .*running"): store.record("killed", {"lr": .1})
    finally: child.kill(), child.wait(), child.stdout.close()
    assert run.status == "unfinished"
    rows, steps = len(run.trace("loss")), run.trace("picture").steps
    assert np.array_equal(run.trace("loss").values, np.arange(rows) / 7)
    with open(run.path / "traces" / "loss.trace", "ab") as f: f.write(b"half a row")    # what a kill within a write leaves
    with store.record("killed", {"lr": .1}, again="go on", step=200) as more:
        assert more.hash == run.hash and more.given_up == rows - 200 + len(steps) - 200
        more.log(200, {"loss": -1., "picture": torch.zeros(2, 2)})
    assert np.array_equal(run.trace("loss").values, [*np.arange(200) / 7, -1.]) and [*run.arrays["picture"]] == [*range(201)]
    assert run.arrays["picture"][199]["value"].tolist() == [[199., 199.]] * 2 and not run.arrays["picture"][200]["value"].any()
    assert (run.status, run.damage(), len(run.manifest["stretches"])) == ("finished", {}, 2)
    assert len([*(run.path / "arrays" / "picture").iterdir()]) == 201                  # of rows that were given up nothing is left


def test_the_same_name_again(store):
    first = store.record("a", {"lr": 1})
    first.log(0, {"loss": 1.})
    first.close()
    with pytest.raises(ValueError, match="again='go on' appends to it, again='new' begins another"): store.record("a", {"lr": 1})
    other = store.record("a", {"lr": 2})                                                # another config is another run
    other.close()
    second, third = (store.record("a", {"lr": 1}, again="new") for _ in range(2))
    second.log(0, {"loss": 2.}), third.log(0, {"loss": 3.})
    second.close(), third.close()
    assert len({first.hash, second.hash, third.hash, other.hash}) == 4 and third.spec.settings["again"] == 3
    with store.record("a", {"lr": 1}, again="go on") as on: on.log(1, {"loss": 4., "new": 0.})     # the last of them; it had been compacted
    assert on.hash == third.hash and on.trace("loss").values.tolist() == [3., 4.] and first.trace("loss").values.tolist() == [1.]
    store.remove(first.hash)
    with store.record("a", {"lr": 1}, again="new") as fourth: pass
    assert fourth.spec.settings["again"] == 4
    with store.record("b", again="go on") as begun: begun.log(3, {"loss": 0.})            # a script that may be started again and again
    assert begun.status == "finished"


def test_an_exception_ends_it_as_interrupted(store):
    for error in (ZeroDivisionError("no batches"), KeyboardInterrupt()):
        with pytest.raises(type(error)), store.record("fails", {"error": type(error).__name__}) as run:
            run.log(0, {"loss": 1.})
            raise error
        assert run.status == "interrupted" and type(error).__name__ in run.manifest["message"] and "Traceback" in run.manifest["error"]
        assert run.trace("loss").values.tolist() == [1.]
    with store.record("fails", {"error": "ZeroDivisionError"}, again="go on") as run: run.log(1, {"loss": .5})
    assert run.status == "finished" and run.manifest["message"] == "finished at step 1"
    run = store.record("ends", {})
    run.close("diverged", "the loss is inf")
    run.close("finished")
    assert (run.status, run.manifest["message"]) == ("diverged", "the loss is inf")


def test_a_forgotten_close_is_said(store):
    code = "import sys; from gradnb import Store\nrun = Store(sys.argv[1]).record('forgotten'); run.log(0, {'loss': 1.})"
    subprocess.run([sys.executable, "-c", code, str(store.root)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    run, = store.list()
    assert run.status == "interrupted" and "without close()" in run.manifest["message"] and len(run.trace("loss")) == 1


def test_odd_values_are_kept_or_refused_before_anything_is_written(store):
    with store.record("ünïcode / ☂ .. \n", {"kind": {"kind": "x"}, "nan": float("nan"), "none": None}) as run:
        run.log(0, {"loss": float("nan"), "inf": float("-inf"), "none": None, "a/b.c ~": True, "half": torch.tensor(.5, dtype=torch.bfloat16),
                    "split": {"train": 1, "test": None}, "long": np.arange(3000.), "empty": {"": 2}})
        run.log(np.int64(7), {"loss": np.float32(.1), "half": 2**70})
        run.log(torch.tensor(9), {"loss": 0})
        for step, values, word in ((9, {"loss": 1.}, "has step 9 already"), (5, {"new": 1., "loss": 1.}, "has step 9 already"), (10, {"new": 1., "loss": "x"}, "'loss' cannot be a row"),
                                   (10, {"new": 1., "loss": [1., 2.]}, "has columns"), (10, {"": 1.}, "cannot be called"), (10, {"x" * 300: 1.}, "cannot be called"),
                                   (10, {3: 1.}, "called by a word"), (10, 1., "by name"), (10, [("loss", 1.)], "by name"), (-1, {}, "whole number"), (1.5, {}, "whole number"),
                                   (True, {}, "whole number"), ("1", {}, "whole number"), (None, {}, "whole number"), (2**70, {}, "whole number"), (10, {"z": 1j}, "cannot be a row"),
                                   (10, {"z": {}}, "cannot be a row"), (10, {"z": [[1], [1, 2]]}, "cannot be a row"), (10, {"z": torch.ones(2).to_sparse()}, "cannot be a row"),
                                   (10, {"z": "\ud800"}, "cannot be a row"), (10, {"z": {"a": 1, "b": {"c": 1}}}, "cannot be a row")):
            with pytest.raises((ValueError, TypeError), match=word): run.log(step, values)
    assert run.names() == sorted(["loss", "inf", "a/b.c ~", "half", "split", "long", "empty"])
    assert np.isnan(run.trace("loss").values[0]) and run.trace("loss").steps.tolist() == [0, 7, 9] and np.isnan(run.trace("split").columns["test"][0])
    assert run.trace("half").values.tolist() == [.5, 2.**70] and run.arrays["long"][0]["value"].shape == (3000,)
    assert store.about()[run.hash]["kind.kind"] == "x" and run.damage() == {} and len(store.frame()) == 3
    with pytest.raises(RuntimeError, match="closed.*go on"): run.log(11, {"loss": 1.})


def test_a_config_is_whatever_a_script_has(store):
    args = argparse.Namespace(lr=np.float64(.1), model={"kind": "resnet", "depth": 18}, optim=Optim("adamw", (.9, .999)), out=Path("a/b"), dtype=torch.bfloat16,
                              device=torch.device("cpu"), act=torch.nn.ReLU, weights=torch.tensor([1., 2.]), table=np.zeros(100), no=None, fn=len, thing=object(), inf=float("inf"))
    with store.record("args", args) as run: pass
    known = run.spec.fields
    assert known | {"lr": .1, "model.kind": "resnet", "model.depth": 18, "optim.name": "adamw", "optim.betas": ("0.9", "0.999"), "out": "a/b", "dtype": "torch.bfloat16", "device": "device(type='cpu')",
                    "act": "torch.nn.modules.activation.ReLU", "no": None, "fn": "builtins.len", "thing": "<object object>", "inf": "inf"} == known
    with pytest.raises(ValueError, match="already"): store.record("args", args)              # the same again, whatever the addresses
    args.table = np.ones(100)
    store.record("args", args).close()                                                       # another table is another config
    loop = {}
    loop["self"] = loop
    for config, word in (({"again": 1}, "has a 'again' of its own"), ({"step": 1, "source": 2, "run": 3}, None), ({"a.b": 1, "a": {"b": 2}}, "'a.b' twice"), (3, "names and values"), (loop, "holds itself"),
                         ({"\ud800": 1}, "must be text")):
        if word is None: store.record("fine", config).close()
        else:
            with pytest.raises((ValueError, TypeError), match=word): store.record("bad", config)
    for name in ("", " ", None, 3):
        with pytest.raises(ValueError, match="called by a word"): store.record(name)
    with pytest.raises(ValueError, match="Did you mean 'new'"): store.record("a", again="neu")
    for again, step in (("refuse", 3), ("new", 3), ("go on", -1), ("go on", 1.5)):
        with pytest.raises(ValueError, match="again='go on', step=800"): store.record("a", again=again, step=step)
    with pytest.raises(ValueError, match="Did you mean 'finished'"): store.record("a").close("finish")
    assert {line["source"] for line in store.about().values()} == {"args", "fine", "a"} and store.table(source="fine")["settings.step"].tolist() == [1]


def test_a_damaged_trace_is_set_aside_and_the_rest_goes_on(store):
    run = store.record("damaged")
    for step in range(10): run.log(step, {"a": step, "b": step})
    run.close("interrupted")
    file = run.path / "traces" / "a.trace"
    data = bytearray(file.read_bytes())
    data[-30] ^= 1                                                                # in the last but one row, or the last
    file.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="is damaged"): again = store.record("damaged", again="go on")
    with again: again.log(10, {"a": 10, "b": 10})
    assert 8 <= len(again.trace("a")) - 1 <= 9 and again.trace("b").values.tolist() == [*range(11)]
    assert again.manifest["damaged"] and again.damage() == {}
    (run.path / "spec.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged.*makes room"): store.record("damaged")


def test_a_folder_that_is_removed_is_said(store):
    run = store.record("removed")
    run.log(0, {"loss": 1.})
    import shutil
    shutil.rmtree(run.path)
    time.sleep(.11)
    with pytest.raises(RuntimeError, match="removed or changed|removed or replaced"): run.log(1, {"loss": 1.})
    with pytest.raises(RuntimeError, match="removed or"): run.close()
    assert run.closed and not run.path.exists()


def test_another_process_that_was_forked_leaves_it_alone(store):
    with store.record("forked") as run:
        run.log(0, {"loss": 1.})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            try: run.log(1, {"loss": 1.})
            except RuntimeError: os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        run.log(1, {"loss": 2.})
    assert run.trace("loss").values.tolist() == [1., 2.] and run.status == "finished"


def test_it_disturbs_no_generator(store):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with store.record("quiet") as run: run.log(0, {"loss": torch.ones((), requires_grad=True)})
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
