"Sweeps on a real Slurm of one node, started and stopped here: results, failures, kills, cancelled and pre-empted jobs."
import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from threading import Thread

import pytest
import torch

from gradnb import GD, Run, Spec, Store
from gradnb.runs.sweeps.grid import grid
from gradnb.runs.sweeps.slurm import Slurm
from gradnb.runs.sweeps.many import sweep
from slurm_node import missing, one_node_slurm

pytest.importorskip("submitit", reason="needs submitit: pip install 'gradnb[slurm]'")
pytestmark = pytest.mark.skipif(bool(missing()), reason=str(missing()))
SPEC = Spec("digits-100", "fc-tanh:width=6", "mse", GD(0.05), 20)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with one_node_slurm(tmp_path_factory.mktemp("slurm")): yield


def test_results_failures_and_several_specs_in_an_element(tmp_path, slurm):
    specs = [*grid(SPEC, seed=range(3)), replace(SPEC, model="fc-tanh:width=0"), replace(SPEC, rule=GD(1e4))]
    frame = sweep(specs, tmp_path, engine="slurm:pack=3,poll=0.2,minutes=5", progress=False)
    assert frame.status.tolist() == ["finished"] * 3 + ["failed", "diverged"]
    assert "width must be at least 1" in frame.outcome[3] and "Traceback" in frame.error[3]
    assert len(list(tmp_path.glob(".slurm/*/*.jsonl"))) == 2
    assert sweep(specs[:3], tmp_path, engine="slurm", dry_run=True).empty
    for s in specs[:3]:
        assert torch.equal(Store(tmp_path).open(s).theta, Store(tmp_path / "here").run(s, progress=False).theta)


def test_a_killed_a_cancelled_and_a_preempted_job(tmp_path, slurm):
    "Each runs one spec; the first two are failures with a reason, the third goes on where it was stopped."
    killed, cancelled, preempted = specs = grid(SPEC, seed=range(3), steps=lambda s: [5000 if s.seed == 2 else 10**6])
    frames, store = [], Store(tmp_path)
    runs = [Run(store.root / s.hash) for s in specs]
    engine = Slurm(pack=1, poll=0.2, minutes=5)
    thread = Thread(target=lambda: frames.append(sweep(specs, tmp_path, engine=engine, progress=False, interval=0.2)), daemon=True)
    thread.start()
    wait_until(lambda: all(r.path.exists() and len(r.traces.get("loss", "")) > 50 for r in runs), thread)
    jobs = subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True).stdout.split()
    array = jobs[0].split("_")[0]
    assert sorted(jobs) == [f"{array}_{i}" for i in range(3)]

    os.kill(element_of(runs[0]), signal.SIGKILL)
    subprocess.run(["scancel", f"{array}_1"], check=True)
    reached = len(runs[2].traces["loss"])
    subprocess.run(["scancel", "--signal=USR2", f"{array}_2"], check=True)      # what Slurm sends before the time limit
    wait_until(lambda: runs[2].status == "interrupted", thread)
    begin = ["scontrol", "update", f"JobId={array}_2", "StartTime=now"]         # Slurm would wait two minutes
    wait_until(lambda: subprocess.run(begin, capture_output=True) and runs[2].status in ("running", "finished"), thread)
    thread.join(240)
    assert not thread.is_alive(), subprocess.run(["scontrol", "show", "job"], capture_output=True, text=True).stdout

    frame, = frames
    assert frame.status.tolist() == ["interrupted", "interrupted", "finished"]
    assert "cancelled" in frame.outcome[1] and all(f"Slurm job {array}_{i} ended before this run was done" in frame.error[i] for i in range(2))
    whole = Store(tmp_path / "here").run(preempted, progress=False)
    assert reached < len(whole.traces["loss"]) and runs[2].frame().equals(whole.frame()) and torch.equal(runs[2].theta, whole.theta)


def element_of(run):
    "The process of the element that trains a run: the one that has started the writer."
    writer = int(re.search(r"process (\d+)", (run.path / "lock").read_text())[1])
    return int(open(f"/proc/{writer}/stat").read().rpartition(")")[2].split()[1])


EXITS = """
import os
from gradnb import PROBES, Probe

@PROBES.add("exits")
def exits(): return Probe("exits", lambda k: k == 5, lambda view: os._exit(3))
"""


def test_a_run_that_ends_its_process_does_not_stop_its_element(tmp_path, slurm, monkeypatch):
    "The suspect is alone to blame; its module lies where only this process looks."
    (tmp_path / "exits_probe.py").write_text(EXITS)
    monkeypatch.syspath_prepend(tmp_path)
    import exits_probe  # noqa: F401
    specs = [replace(SPEC, probes=("exits",)), *grid(SPEC, seed=range(2))]
    frame = sweep(specs, tmp_path / "store", engine=Slurm(pack=3, poll=0.2, minutes=5), progress=False)
    assert frame.status.tolist() == ["unfinished", "finished", "finished"] and "died twice" in frame.outcome[0]
    assert len(list(tmp_path.glob("store/.slurm/*/*.jsonl"))) == 1


def test_what_a_lost_element_has_not_begun_is_submitted_again_without_the_suspect(tmp_path, slurm):
    specs, frames = [replace(SPEC, steps=10**6), *grid(SPEC, seed=range(2))], []
    suspect = Run(tmp_path / specs[0].hash)
    engine = Slurm(pack=3, poll=0.2, minutes=5)
    thread = Thread(target=lambda: frames.append(sweep(specs, tmp_path, engine=engine, progress=False)), daemon=True)
    thread.start()
    wait_until(lambda: suspect.path.exists() and len(suspect.traces.get("loss", "")) > 50, thread)
    os.kill(element_of(suspect), signal.SIGKILL)
    thread.join(240)
    assert not thread.is_alive() and frames[0].status.tolist() == ["interrupted", "finished", "finished"]
    assert "ended before this run was done" in frames[0].outcome[0] and len(list(tmp_path.glob(".slurm/*"))) == 2


def wait_until(true, thread, seconds=240):
    deadline = time.monotonic() + seconds
    while not true():
        assert thread.is_alive(), "the sweep has ended"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
