"A sweep does every spec once, whatever dies on the way."
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import exp, inf, log
from pathlib import Path
from random import Random
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from gradnb import GD, Adam, FromTorch, FullBatch, Groups, MiniBatch, Momentum, Piecewise, Run, ScheduleFreeSGD, Scheduled, Spec, Store, train
from gradnb.cli import main
from gradnb.ground.processes import cpus, safe_children
from gradnb.ground.roles import Rule, average, kind
from gradnb.move.estimators.sam import SAM
from gradnb.move.rules.agd import AutomaticGradientDescent
from gradnb.runs.sweeps.engines import Pool, plugins
from gradnb.runs.sweeps.grid import grid
from gradnb.runs.sweeps.comparison import compare, costs, reached
from gradnb.runs.sweeps.many import sweep
from gradnb.runs.sweeps.pairs import holm, pair
from gradnb.runs.sweeps.tuning import tuned

SPEC = Spec("digits-100", "fc-tanh:width=6", "mse", GD(0.05), 20, probes=("train:every=10",))


# --- grids --------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(lrs=st.lists(st.floats(0, 1), min_size=1, max_size=4), seeds=st.lists(st.integers(0, 5), min_size=1, max_size=4),
       steps=st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_a_product_is_the_set_of_combinations_in_order(lrs, seeds, steps):
    found = [(s.rule.lr, s.seed, s.steps) for s in grid(SPEC, rule__lr=lrs, seed=seeds, steps=steps)]
    wanted = dict.fromkeys((a, b, c) for a in lrs for b in seeds for c in steps)
    assert found == list(wanted)
    assert grid(SPEC, rule__lr=lrs, seed=seeds, steps=steps) == grid(grid(grid(SPEC, rule__lr=lrs), seed=seeds), steps=steps)


@pytest.mark.parametrize("rule, path, value, get", [
    (Scheduled(GD(0.1), Piecewise(((5, 0.5),))), "rule__rule__lr", 0.3, lambda s: s.rule.rule.lr),
    (Scheduled(GD(0.1), Piecewise(((5, 0.5),))), "rule__schedule__drops__0__1", 0.1, lambda s: s.rule.schedule.drops[0][1]),
    (FromTorch(torch.optim.SGD, lr=0.1, momentum=0.5), "rule__hyper__momentum", 0.9, lambda s: s.rule.hyper["momentum"]),
    (FromTorch(torch.optim.SGD, lr=0.1), "rule__hyper__momentum", 0.9, lambda s: s.rule.hyper["momentum"]),
    (Groups((("matrix", Momentum(0.1)), ("*", GD(0.2)))), "rule__rules__0__1__lr", 0.3, lambda s: s.rule.rules[0][1].lr),
    (Adam(), "rule__beta1", 0.5, lambda s: s.rule.beta1)])
def test_paths_reach_every_part(rule, path, value, get):
    changed, = grid(replace(SPEC, rule=rule), **{path: [value]})
    assert get(changed) == value and Spec.from_json(changed.to_json()) == changed


def test_a_value_is_checked_by_its_owner():
    with pytest.raises(ValueError, match="GD needs 0 ≤ lr"): grid(SPEC, rule__lr=[-1.0])
    with pytest.raises(ValueError, match="float32 or float64"): grid(SPEC, dtype=["float16"])


def test_a_grid_takes_the_names_of_fields():
    spec = replace(SPEC, rule=FromTorch(torch.optim.SGD, lr=0.1, momentum=0.5), estimator=MiniBatch(7))
    for path in ("rule.lr", "estimator.size", "seed", "rule.hyper.momentum"):
        assert grid(spec, [{path: spec.fields[path]}]) == (spec,)
        assert grid(spec, **{path.replace(".", "__"): [3]})[0].fields[path] == 3


# --- sweeps -------------------------------------------------------------------------------------------------------

def test_what_is_done_is_not_done_again_and_what_was_begun_goes_on(tmp_path):
    study = grid(SPEC, seed=range(3))
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        with pytest.warns(RuntimeWarning, match="interrupted"): interrupted_at(12, store, study[1])
    store.run(study[0], progress=False)
    before = (store.open(study[0]).path / "manifest.json").stat().st_mtime_ns
    assert sweep(study, store, dry_run=True).status.tolist() == ["interrupted", "absent"]
    frame = sweep(study, store, progress=False)
    assert frame.status.tolist() == ["finished"] * 3 and frame.hash.tolist() == [s.hash for s in study]
    assert (store.open(study[0]).path / "manifest.json").stat().st_mtime_ns == before
    whole = Store(tmp_path / "whole")
    assert [store.open(s).frame().equals(whole.run(s, progress=False).frame()) for s in study] == [True] * 3


def interrupted_at(step, store, spec):
    "Run a spec until a step, as Ctrl-C would leave it."
    from gradnb import PROBES
    train = PROBES["train"]

    def impatient(**kwargs):
        probe = train(**kwargs)
        def fn(view):
            if view.step >= step - step % 10: raise KeyboardInterrupt
            return probe.fn(view)
        return replace(probe, fn=fn)

    PROBES["train"] = impatient
    try: store.run(spec, progress=False)
    finally: PROBES["train"] = train


NOTEBOOK = """
import sys, threading, torch
from dataclasses import dataclass
from gradnb import *
SHARE = .5
@kind
@dataclass(frozen=True)
class Signs(Rule):
    lr: float
    def step(self, state, blocks, grads): return {k: b - self.lr * grads[k].sign() for k, b in blocks.items()}, state
@PROBES.add("gentle")
def gentle(every: int = 5, lock: object = None): return Probe("gentle", lambda k: k % every == 0, lambda view: SHARE * view.full_grad.norm())
@MODELS.add("narrow")
def narrow(in_shape, outputs, width: int = 3): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.Tanh(), torch.nn.Linear(width, outputs))
LOCK = threading.Lock()
@PROBES.add("locked")
def locked(): return Probe("locked", lambda k: True, lambda view: LOCK.locked())
specs = [Spec("digits-50", "narrow:width=4", "mse", Signs(.01), 10, probes=("gentle:every=5",), seed=k) for k in range(2)]
here, there = (sweep(specs, sys.argv[1] + name, engine, progress=False) for name, engine in (("here", "here"), ("pool", "pool:workers=1")))
assert here.status.tolist() == there.status.tolist() == ["finished"] * 2, there.error.tolist()
same = [[Store(sys.argv[1] + name).open(s).trace("gentle").values.tolist() for s in specs] for name in ("here", "pool")]
assert same[0] == same[1] and len(same[0][0]) == 3
assert "scipy.stats" not in sys.modules, "a second for each process that trains"
"""


def test_what_a_notebook_defines_goes_along_into_other_processes(tmp_path):
    "`python -c` has a __main__ without a file, as a notebook has: a fresh process cannot import it."
    done = subprocess.run([sys.executable, "-c", NOTEBOOK, f"{tmp_path}/"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "'locked' of this notebook cannot be sent to other processes" in done.stderr and "put it into a module" in done.stderr


FLAKY = """
import os
import sys
import time
from pathlib import Path
from gradnb import PROBES, Probe

@PROBES.add("flaky")
def flaky(marks: str, times: int = 1, how: str = "raise"):
    "Fails as often as there are no marks yet."
    def measure(view):
        if view.step != 5: return 0.0
        tries = len(list(Path(marks).glob("*")))
        if tries >= times: return 0.0
        (Path(marks) / str(tries)).touch()
        if how == "exit": os._exit(3)
        if how == "sys.exit": sys.exit(3)
        if how == "hang":
            while True: time.sleep(1)
        if how == "deaf": sum(range(10**15))         # no signal is heard in there, and no thread has a turn
        raise RuntimeError(f"try {tries} fails")
    return Probe("flaky", lambda k: True, measure)
"""


@pytest.fixture(scope="module")
def flaky(tmp_path_factory):
    "A probe of the user's own, in a module of its own, that fails or dies a given number of times."
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "flaky_probe.py").write_text(FLAKY)
    sys.path.insert(0, str(folder))
    import flaky_probe  # noqa: F401
    assert "flaky_probe" in plugins()

    def spec(path, **kwargs):
        path.mkdir(parents=True)
        return replace(SPEC, probes=("flaky:" + ",".join(f"{k}={v}" for k, v in dict(marks=path, **kwargs).items()),))
    yield spec
    from gradnb import PROBES
    sys.path.remove(str(folder))
    del PROBES["flaky"], sys.modules["flaky_probe"]


def test_failures_are_rows_and_are_tried_again_on_request(tmp_path, flaky):
    specs = [flaky(tmp_path / "once"), flaky(tmp_path / "thrice", times=3), SPEC]
    frame = sweep(specs, tmp_path / "store", progress=False)
    assert frame.status.tolist() == ["failed", "failed", "finished"]
    assert frame.outcome[0] == "RuntimeError: try 0 fails (at step 5; what was measured until then is this error's .traces)"
    assert "Traceback" in frame.error[0] and frame.error.isna().tolist() == [False, False, True]
    frame = sweep(specs, tmp_path / "store", retries=1, progress=False)
    assert frame.status.tolist() == ["finished", "failed", "finished"] and "try 2 fails" in frame.error[1]
    assert sweep(specs, tmp_path / "store", progress=False).status.tolist() == ["finished"] * 3


def test_a_pool_survives_its_workers_and_does_every_spec_once(tmp_path, flaky):
    "One spec's process dies; it and its neighbours equal those trained here, row by row."
    specs = [flaky(tmp_path / "once", how="exit"), *grid(SPEC, seed=range(2))]
    frame = sweep(specs, tmp_path / "pool", engine=Pool(2), progress=False, interval=0.0)
    assert frame.status.tolist() == ["finished"] * 3 and frame.error.isna().all()
    assert len(list((tmp_path / "once").iterdir())) == 1
    sweep(specs, tmp_path / "here", progress=False)
    for s in specs:
        a, b = (Store(tmp_path / where).open(s) for where in ("pool", "here"))
        assert torch.equal(a.theta, b.theta) and a.frame().equals(b.frame())
        assert a.traces["loss"].steps.tolist() == list(range(21))


@contextmanager
def dask(folder):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(1, threads_per_worker=2, dashboard_address=None, local_directory=str(folder)) as cluster, distributed.Client(cluster) as client:
        yield client.get_executor()


@contextmanager
def processes(folder):
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("executor, dies", [(dask, "exit"), pytest.param(processes, None, marks=pytest.mark.slow)], ids=["dask", "processes"])
def test_an_executor_of_somebody_else_is_an_engine(tmp_path, flaky, executor, dies):
    "Numbers as here; a run whose worker dies is Dask's business, one that fails is tried again on request."
    once = flaky(tmp_path / "once", how="exit") if dies else SPEC
    specs = [once, flaky(tmp_path / "fails"), replace(SPEC, seed=1)]
    with executor(tmp_path / "work") as engine:
        frame = sweep(specs, tmp_path / "store", engine=engine, progress=False, interval=0.0)
        assert frame.status.tolist() == ["finished", "failed", "finished"] and "try 0 fails" in frame.outcome[1], frame.error.tolist()
        assert sweep(specs, tmp_path / "store", engine=engine, progress=False).status.tolist() == ["finished"] * 3
    sweep(specs, tmp_path / "here", progress=False)
    for s in specs:
        a, b = (Store(tmp_path / where).open(s) for where in ("store", "here"))
        assert torch.equal(a.theta, b.theta) and a.frame().equals(b.frame())


def test_an_executor_that_breaks_or_is_shut_down_fails_its_jobs(tmp_path, flaky):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        frame = sweep([flaky(tmp_path / "dies", how="exit"), SPEC], tmp_path / "store", engine=executor, progress=False)
    assert frame.outcome.str.contains("terminated abruptly").all()
    assert "not usable anymore" in sweep(SPEC, tmp_path / "store", engine=executor, progress=False).outcome[0]
    assert sweep(SPEC, tmp_path / "store", progress=False).status[0] == "finished"


def test_jobs_that_are_no_futures_of_pythons(tmp_path):
    executor = pytest.importorskip("submitit").LocalExecutor(tmp_path / "jobs")
    assert sweep(SPEC, tmp_path / "store", engine=executor, progress=False).status[0] == "finished"


def test_a_stopped_sweep_cancels_what_an_executor_has_not_begun(tmp_path):
    class Idle(Executor):
        def submit(self, *_):
            futures.append(Future())
            if len(futures) == 3: threading.Timer(1, signal.raise_signal, [signal.SIGINT]).start()
            return futures[-1]
    futures = []
    with pytest.raises(KeyboardInterrupt, match="0 of 3 runs done"):
        sweep(grid(SPEC, seed=range(3)), tmp_path, engine=Idle(), progress=False)
    assert [f.cancelled() for f in futures] == [True] * 3


@pytest.mark.parametrize("times, status", [pytest.param(2, "finished", marks=pytest.mark.slow), (3, "unfinished")])
def test_a_process_that_dies_alone_is_tried_once_more(tmp_path, flaky, times, status):
    spec = flaky(tmp_path / "dies", how="exit", times=times)
    frame = sweep([spec], tmp_path / "store", engine=Pool(1), progress=False)
    assert frame.status.tolist() == [status] and len(list((tmp_path / "dies").iterdir())) == times
    assert frame.error.isna().all() if status == "finished" else "died twice" in frame.error[0]


@pytest.mark.parametrize("engine, timeout", [("here:", 4), pytest.param("pool:workers=1,", 30, marks=pytest.mark.slow)])
def test_a_probe_that_ends_the_program_or_hangs_stops_only_its_own_run(tmp_path, flaky, engine, timeout):
    "A run that hangs is stopped in time and keeps what it has measured; the same call goes on."
    Store(tmp_path / "warm").run(SPEC, progress=False)           # what is imported late counts for nobody
    specs = [flaky(tmp_path / "exits", how="sys.exit"), flaky(tmp_path / "hangs", how="hang"), SPEC]
    frame = sweep(specs, tmp_path / "store", f"{engine}timeout={timeout}", progress=False)
    assert frame.status.tolist() == ["failed", "interrupted", "finished"]
    assert "SystemExit: 3" in frame.outcome[0] and f"timeout={timeout} seconds" in frame.outcome[1]
    assert Store(tmp_path / "store").open(specs[1]).traces["loss"].steps.tolist() == list(range(6))
    assert sweep(specs, tmp_path / "store", progress=False).status.tolist() == ["finished"] * 3


@pytest.mark.slow
def test_a_run_that_hangs_is_not_put_back_for_ever(tmp_path, flaky, monkeypatch):
    "What Slurm sends before the time limit: an element that has measured something goes back into the queue, one that has not gives its run up."
    from gradnb.runs.sweeps import slurm
    requeued, root = [], tmp_path / "store"
    monkeypatch.setattr(slurm, "requeue", lambda: requeued.append(1))
    specs = [flaky(tmp_path / "hangs", how="hang", times=9), SPEC]
    worker = slurm.Worker(str(root), plugins=plugins())
    element = slurm.Element(worker, str(tmp_path / "report"), [[s.to_json()] for s in specs], patience=0.0)
    for time_ in range(2):
        wait = Thread(target=lambda: (wait_for(lambda: len(list((tmp_path / "hangs").iterdir())) > time_), os.kill(os.getpid(), signal.SIGUSR2)))
        wait.start()
        with pytest.raises(SystemExit): element()
        wait.join()
        assert len(requeued) == time_ + 1
    assert [line for line in slurm.reported(tmp_path / "report")] == [[slurm.HANGS]]
    element()
    assert slurm.reported(tmp_path / "report") == [[slurm.HANGS], [None]] and len(requeued) == 2


def wait_for(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline: time.sleep(0.05)


@pytest.mark.parametrize("wait, status, code", [(0, "running", 1), (60, "finished", 0)])
def test_a_run_that_another_process_writes_is_not_done_until_it_is(tmp_path, capsys, wait, status, code):
    from gradnb.runs import Lock
    spec = Spec("digits-100", "fc-tanh:width=4", "mse", GD(0.1), 3)
    (tmp_path / spec.hash).mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    held = context.Event()
    def hold():
        with Lock(tmp_path / spec.hash):
            held.set()
            time.sleep(2 if wait else 600)
    (holder := context.Process(target=hold)).start()
    try:
        assert held.wait(60) and Lock(tmp_path / spec.hash).held()
        assert main([*BASE.split(), "--lr", "0.1", "--axis", "seed=0", "--wait", str(wait), "--store", str(tmp_path)]) == code
    finally:
        holder.kill()
        holder.join()
    err = capsys.readouterr().err
    assert f"{1 - code} of 1 runs done" in err
    if code: assert f"{spec.hash} is" in err and "is being written by" in err


@pytest.mark.parametrize("engine, says", [
    ("pool:workers=0", "1 ≤ workers"), ("pool:threads=0", "1 ≤ threads"), ("pool:threads=none", "1 ≤ threads"), ("pool:workers=1.5", "whole number"),
    ("pool:timeout=0", "timeout=0"), ("here:timeout=-1", "timeout=-1"), ("here:timeout=nan", "timeout=nan"), ("slurm:pack=0", "1 ≤ pack"),
    ("slurm:minutes=0", "1 ≤ minutes"), ("slurm:threads=x", "threads='x'"), ("slurm:poll=0", "poll=0"), ("slurm:timeout=0", "timeout=0")])
def test_engines_refuse_by_name(tmp_path, capsys, engine, says):
    assert main([*BASE.split(), "--lr", "0.1", "--axis", "seed=0", "--engine", engine, "--store", str(tmp_path / "store")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "store").exists()


@pytest.mark.parametrize("flags, says", [("--retries -1", "retries=-1"), ("--wait -1", "wait=-1"), ("--wait nan", "wait=nan")])
def test_numbers_of_a_sweep_are_checked(tmp_path, capsys, flags, says):
    assert main([*BASE.split(), "--lr", "0.1", "--axis", "seed=0", *flags.split(), "--store", str(tmp_path / "store")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "store").exists()


@pytest.mark.parametrize("error, line", [
    ("Traceback (most recent call last):\n  File \"x\", line 1\n    1/0\n    ~^~\nZeroDivisionError: division by zero\n", "ZeroDivisionError: division by zero"),
    ("Traceback (most recent call last):\n  File \"x\"\nKeyError: 'a'\n\nDuring handling\n\nTraceback (most recent call last):\n  File \"y\"\nValueError: b\nat step 3\n", "ValueError: b (at step 3)"),
    ("the process died twice", "the process died twice"), ("ValueError: a\n  b\nc", "ValueError: a (c)"), ("", "")])
def test_first_the_error_then_the_note(error, line):
    from gradnb.runs.sweeps.many import headline
    assert headline(error) == line


# --- what lies in the working folder --------------------------------------------------------------------------------

def test_workers_import_nothing_from_the_working_folder(tmp_path):
    "Of a command, which looks for modules beside itself; Python hands its own -P on."
    (here := tmp_path / "here").mkdir()
    (command := tmp_path / "command").write_text("import sys\nif __name__ == '__main__':\n from gradnb.cli import main\n sys.exit(main())")
    for module in "multiprocessing", "random", "gradnb": (here / f"{module}.py").write_text("open(__name__ + ' ran', 'w')")
    done = subprocess.run([sys.executable, command, *BASE.split(), "--lr", "0.1", "--axis", "seed=0", "--workers", "1", "--store", "s"], cwd=here, capture_output=True, text=True)
    assert [*here.glob("* ran")] == [] and done.returncode == 0 and "1 of 1 runs done" in done.stderr, done.stderr


def test_programs_are_not_looked_for_in_the_working_folder(tmp_path, monkeypatch):
    from gradnb.runs.sweeps import slurm
    monkeypatch.chdir(tmp_path)
    for name in ("scontrol", "squeue", "scancel", "sbatch", "git", "python3", "gradnb"):
        (tmp_path / name).write_text("#!/bin/sh\ntouch ran\necho MaxArraySize = 1001")
        (tmp_path / name).chmod(0o755)
    for path in (f".:{os.environ['PATH']}", f":{os.environ['PATH']}", f"{os.environ['PATH']}:", f"bin/..:{os.environ['PATH']}", ".", ""):
        monkeypatch.setenv("PATH", path)
        for call in (slurm.most_elements, lambda: slurm.queued("1"), lambda: slurm.ended("1_1"), lambda: slurm.ask("scancel", "--version")):
            with suppress(FileNotFoundError, RuntimeError): call()         # there may be a Slurm here
        with safe_children(): assert all(map(os.path.isabs, os.environ["PATH"].split(":")))
        assert os.environ["PATH"] == path
    assert not (tmp_path / "ran").exists()


def test_a_system_that_does_not_say_which_cpus_are_ours_has_them_all(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)      # as on a Mac
    assert cpus() == os.cpu_count()


@pytest.mark.parametrize("where", ["", ".", ":/usr/lib/none"])
def test_processes_of_a_distributed_run_import_nothing_from_the_working_folder(tmp_path, monkeypatch, where):
    "torchrun is stood in for by a process that looks as its own processes look."
    import torch.distributed.run
    (tmp_path / "random.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("PYTHONPATH", where)
    said = []
    monkeypatch.setattr(torch.distributed.run, "main", lambda words: said.append((words, subprocess.run([sys.executable, "-c", "import random"]).returncode)))
    assert main([*BASE.replace("sweep", "train").split(), "--lr", "0.1", "--distribute", "2", "--store", "s"]) == 0
    assert said[0][1] == 0 and os.path.isabs(said[0][0][4]) and os.environ["PYTHONPATH"] == where and "PYTHONSAFEPATH" not in os.environ
    assert (tmp_path / "ran").exists() == (where == ".")            # what the user tells Python


SCRIPT = """
import sys
from gradnb import Spec
from gradnb.runs.sweeps.grid import grid
from gradnb.runs.sweeps.many import sweep

if __name__ == "__main__":
    specs = grid(Spec.from_json(sys.argv[2]), seed=range(int(sys.argv[3])))
    print(sweep(specs, sys.argv[1], engine="pool:workers=2", retries=3, progress=False).status.value_counts().to_dict())
"""


def script(tmp_path, spec, n):
    (tmp_path / "study.py").write_text(SCRIPT)
    return subprocess.Popen([sys.executable, str(tmp_path / "study.py"), str(tmp_path / "store"), spec.to_json(), str(n)],
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a shell's background jobs ignore it


def children(pid):
    "The process ids below a process."
    found = [int(p) for f in os.listdir(f"/proc/{pid}/task") for p in open(f"/proc/{pid}/task/{f}/children").read().split()]
    return found + [q for p in found for q in children(p)]


def wait_until(true, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_stopped_sweep_leaves_no_process_and_goes_on(tmp_path, how):
    "Ctrl-C, and a kill -9 of the parent: workers store their runs and leave; the same call ends as if nothing had been."
    long = replace(SPEC, steps=100_000)
    process, store = script(tmp_path, long, 2), Store(tmp_path / "store")
    rows = lambda s: len(Run(store.root / s.hash).traces.get("loss", "")) if (store.root / s.hash).exists() else 0
    specs = grid(long, seed=range(2))
    wait_until(lambda: all(rows(s) > 200 for s in specs), process)
    below = children(process.pid)
    process.send_signal(how)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while alive := [p for p in below if os.path.isdir(f"/proc/{p}") and open(f"/proc/{p}/stat").read().split()[2] != "Z"]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.05)
    assert [store.open(s).status for s in specs] == ["interrupted"] * 2
    assert all((store.open(s).path / "checkpoint.safetensors").exists() for s in specs)


DEAF = """
import signal, sys, time
from gradnb.runs.sweeps import engines
class Deaf(engines.Worker):
    def __call__(self, texts): return {act}
engines.GRACE = .5
engines.stoppable(Deaf("nowhere", timeout=.5), ["{{}}"])
"""


@pytest.mark.parametrize("act", ["sum(range(10**15))", pytest.param("[signal.signal(s, signal.SIG_IGN) for s in (1, 2, 10, 12, 14, 15)] and time.sleep(10**6)", marks=pytest.mark.slow)])
def test_a_worker_that_is_deaf_to_its_time_limit_is_ended(act):
    done = subprocess.run([sys.executable, "-c", DEAF.format(act=act)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Timeout" in done.stderr and "__call__" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
@pytest.mark.parametrize("how", ["deaf", "hang"])
def test_a_sweep_with_a_deaf_worker_can_be_stopped(tmp_path, flaky, how):
    "Ctrl-C: what was measured is kept, and nobody is left."
    spec = flaky(tmp_path / "marks", how=how)
    (tmp_path / "study.py").write_text("import sys\nsys.path.insert(0, sys.argv.pop())\nimport flaky_probe\nfrom gradnb.runs.sweeps import engines\nengines.GRACE = 2.\n" + SCRIPT)
    words = [sys.executable, str(tmp_path / "study.py"), str(tmp_path / "store"), spec.to_json(), "1", str(Path(sys.modules["flaky_probe"].__file__).parent)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_until(lambda: [*(tmp_path / "marks").iterdir()], process)
    below = children(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100) and process.returncode != 0
    time.sleep(1)
    assert not [p for p in below if os.path.isdir(f"/proc/{p}") and open(f"/proc/{p}/stat").read().split()[2] != "Z"]
    assert Store(tmp_path / "store").open(grid(spec, seed=[0])[0]).traces["loss"].steps.tolist() == list(range(6))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_a_thousand_specs_are_done_exactly_once_while_workers_are_killed_at_random(tmp_path, n=1000, steps=200, seconds=15):
    spec, rng, kills = replace(SPEC, steps=steps, probes=()), Random(0), 0
    process, store, began = script(tmp_path, spec, n), Store(tmp_path / "store"), time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        if len(store.list()) > 2 and rng.random() < 0.1 / seconds:
            workers = [p for p in children(process.pid) if "spawn_main" in open(f"/proc/{p}/cmdline").read()]
            if workers: os.kill(rng.choice(workers), signal.SIGKILL)
            kills += bool(workers)
    out, err = process.communicate()
    assert kills and out.strip() == f"{{'finished': {n}}}", (out, err)
    assert len(store.list()) == n
    for run in store.list(): assert run.traces["loss"].steps.tolist() == list(range(steps + 1))
    for run in store.list()[::100]:
        whole = Store(tmp_path / "whole").run(run.spec, progress=False)
        assert torch.equal(run.theta, whole.theta) and run.frame().equals(whole.frame())
    print(f"{n} runs, {kills} kills, {time.monotonic() - began:.0f} s")


# --- the command line ---------------------------------------------------------------------------------------------

BASE = "sweep --dataset digits-100 --model fc-tanh:width=4 --loss mse --rule gd --steps 3"


@pytest.mark.parametrize("flags, wanted", [
    ("--lr 0.1 --axis seed=0..2", lambda s: grid(s, seed=[0, 1, 2])),
    ("--axis rule.lr=0.1,0.2 --axis model.width=4,5", lambda s: grid(s, [{"rule.lr": 0.1}, {"rule.lr": 0.2}], model__width=[4, 5])),
    ("--lr 0.1 --axis rule=gd;momentum:beta=0.5,nesterov=true", lambda s: grid(s, rule=[GD(0.1), Momentum(0.1, 0.5, True)])),
    ("--lr 0.1 --axis estimator=minibatch:size=5,fullbatch", lambda s: grid(s, estimator=[MiniBatch(5), FullBatch()])),
    ("--lr 0.1 --batch 5 --axis estimator.size=5,6", lambda s: grid(replace(s, estimator=MiniBatch(5)), estimator__size=[5, 6])),
    ("--lr 0.1 --axis acc_goal=none,0.5", lambda s: grid(s, acc_goal=[None, 0.5]))])
def test_axes_of_the_command_line_are_axes_of_a_grid(tmp_path, capsys, flags, wanted):
    assert main([*BASE.split(), *flags.split(), "--dry-run", "--csv", "--store", str(tmp_path)]) == 0
    hashes = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert [line[hashes[0].index("hash")] for line in hashes[1:] if len(line) == len(hashes[0])] == [
        s.hash for s in wanted(Spec("digits-100", "fc-tanh:width=4", "mse", GD(0.1), 3))]


@pytest.mark.parametrize("wrong", [dict(dataset="digitz"), dict(model="fc-tann:width=6"), dict(loss="mes"), dict(probes="sharpnes:every=2"), dict(probes="sharpness:evry=2")])
def test_a_word_that_means_nothing_is_said_before_anything_is_trained(tmp_path, wrong):
    with pytest.raises(ValueError, match="Did you mean"): sweep([SPEC, replace(SPEC, **wrong)], tmp_path, engine="pool:workers=2", progress=False)
    assert not any(tmp_path.iterdir())


def test_a_failed_run_is_an_exit_status(tmp_path, capsys):
    line = [*BASE.split(), "--lr", "0.1", "--store", str(tmp_path), "--axis"]
    assert main([*line, "model.width=4,0"]) == 1
    said = capsys.readouterr()
    assert "width must be at least 1" in said.out and "1 of 2 runs done" in said.err
    assert main([*line, "model.width=4"]) == 0
    for flags, remedy in (("seed=0 --axis seed=1", "one --axis for each field"), ("seed=0 --engine pool --workers 2", "give one of them"),
                          ("seed=0 --engine slrum", "Did you mean 'slurm'"), ("sede=1", "Did you mean 'seed'")):
        assert main([*line, *flags.split()]) == 2
        assert remedy in capsys.readouterr().err


# --- tuning -------------------------------------------------------------------------------------------------------

SHORT = Spec("linear-4-2", "deeplinear:depth=1", "mse", GD(.05), 1)

def away(field, best): return lambda run: log(run.spec.fields[field] / best) ** 2

@pytest.mark.parametrize("best", [.05, .013, 2.4, .0004])
def test_a_grid_extends_itself_until_the_best_is_inside(tmp_path, best):
    "A criterion whose minimum is known: it is found to within a grid's step, with as many values for everyone."
    found = tuned(SHORT, by=away("rule.lr", best), seeds=(-1, -2), budget=10, store=tmp_path)
    assert found.flag == "" and len(found.values) == 10 and found.runs == 20 and abs(log(found.best / best)) < log(10) / 4
    assert found.spec == replace(SHORT, rule=GD(found.best)) and found.best == min(found.values, key=lambda v: log(v / best) ** 2)
    outside = sum(not .05 / 10.01 < v < .05 * 10.01 for v in found.values)
    assert found.extensions == outside and (outside > 0) == (not .005 < best < .5)


@pytest.mark.parametrize("best, side, at", [(1e9, "upper", -1), (1e-9, "lower", 0)])
def test_a_best_that_is_not_reached_is_flagged(tmp_path, best, side, at):
    found = tuned(SHORT, by=away("rule.lr", best), seeds=(5, 6), values=3, budget=6, factor=2., store=tmp_path)
    assert found.best == found.values[at] and found.extensions == 3 and f"{side} end" in found.flag and "6 values" in found.flag
    assert found.values == tuple(float(f"{.05 * 2.**k:.4g}") for k in (range(-4, 2) if side == "lower" else range(-1, 5)))


def test_the_best_rate_of_a_white_quadratic_is_one(tmp_path):
    "XᵀX = n: the error is multiplied by 1 − η in every step, and grows without bound for η > 2."
    spec = Spec("linear-20-4", "deeplinear:depth=1", "mse", GD(1e-2), 60, seed=3)
    found = tuned(spec, by="final_loss:share=0.01", seeds=(0, 1), values=3, budget=7, factor=10., store=tmp_path)
    assert found.flag == "" and found.best == 1. and found.frame.set_index("rule.lr").value[10.] == inf and "inside" in str(found)


def test_nothing_is_tuned_twice(tmp_path):
    def idle(jobs, worker):
        assert jobs == []
        return iter(())
    once = tuned(SHORT, seeds=(-1, -2), values=3, budget=5, store=tmp_path)
    assert tuned(SHORT, "rule__lr", seeds=(-1, -2), values=3, budget=5, store=tmp_path, engine=idle) == once
    more = tuned(SHORT, seeds=(-1, -2), values=3, budget=7, store=tmp_path)
    assert set(once.values) < set(more.values) and len(list(tmp_path.glob("[0-9a-f]*"))) == more.runs


def test_whole_numbers_and_bounds_end_a_grid(tmp_path):
    few = tuned(replace(SHORT, dataset="linear-8-2", estimator=MiniBatch(4)), "estimator.size", away("estimator.size", .01), (1, 2), 3, 9, 2., tmp_path)
    assert few.values == (1, 2, 4, 8) and few.best == 1 and "may be no other" in few.flag
    near = tuned(replace(SHORT, rule=Momentum(.1, .5)), "rule.beta", lambda run: -run.spec.rule.beta, (1, 2), 3, 6, 1.5, tmp_path)
    assert near.best == .75 and max(near.values) < 1 and "may be no other" in near.flag


def test_what_cannot_be_told_apart_or_is_nowhere_finite_is_said(tmp_path):
    same = tuned(SHORT, by=lambda run: 1., seeds=(1, 2), values=3, store=tmp_path)
    assert same.best == .05 and "makes no difference" in same.flag
    never = tuned(replace(SHORT, loss_goal=1e-9), by="steps_to_goal", seeds=(1, 2), values=3, budget=5, store=tmp_path)
    assert never.best is None and never.spec is None and "finite" in never.flag and never.score.value == inf
    assert len([v for v in never.values if v < .05]) == len([v for v in never.values if v > .05]) == 2
    lost = tuned(replace(SHORT, rule=GD(1e30), steps=9), seeds=(1, 2), values=3, budget=5, store=tmp_path)
    assert lost.best is None and lost.extensions == 2 and max(lost.values) < 1e31


def test_criteria_by_name(tmp_path):
    spec = replace(SPEC, steps=40, probes=("train:every=40",))
    by_loss, by_accuracy = (tuned(spec, by=by, seeds=(1, 2), values=3, budget=3, store=tmp_path) for by in
                            ("at_end", "at_end:probe=train,column=accuracy,most=true"))
    runs = [Store(tmp_path).run(replace(spec, rule=GD(v), seed=s)) for v in by_loss.values for s in (1, 2)]
    for found, column, sign in ((by_loss, "loss", 1), (by_accuracy, "accuracy", -1)):
        ends = [sign * float(r.trace("train").columns[column][-1]) for r in runs]
        assert [s.value for s in found.scores] == pytest.approx([(a + b) / 2 for a, b in zip(ends[::2], ends[1::2])])
    goal = tuned(replace(spec, loss_goal=.3, goal_every=1), by="steps_to_goal", seeds=(1, 2), values=3, store=tmp_path)
    fast = Store(tmp_path).run(replace(goal.spec, seed=1))
    assert fast.status == "goal" and float(fast.trace("train").columns["loss"][-1]) < .3 and goal.score.value <= 40


@pytest.mark.parametrize("spec, more, says", [
    (SHORT, dict(seeds=(1,)), "two seeds"), (SHORT, dict(seeds=(1, 1)), "two seeds"), (SHORT, dict(seeds=(0, 1)), "seed 0 is the one that counts"),
    (SHORT, dict(over="rule.learning_rate"), "rule.lr"), (replace(SHORT, rule=Scheduled(GD(.1), Piecewise(((5, .5),)))), {}, "rule.rule.lr"),
    (replace(SHORT, rule=GD(0.)), {}, "positive"), (SHORT, dict(over="steps"), "no hyperparameter"), (SHORT, dict(over="seed"), "no hyperparameter|positive"), (SHORT, dict(values=4), "odd"),
    (SHORT, dict(budget=4), "budget"), (SHORT, dict(factor=1.), "factor"), (SHORT, dict(by="final"), "final_loss"), (SHORT, dict(by="at_end:probe=test"), "test:every"),
    (SHORT, dict(by="steps_to_goal"), "loss_goal"), (SHORT, dict(by="final_loss:share=2"), "share")])
def test_what_cannot_be_tuned_is_refused_before_any_run(tmp_path, spec, more, says):
    with pytest.raises(ValueError, match=says): tuned(spec, store=tmp_path, **more)
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_while_tuning_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="tuning rule.lr: run .* is failed: .*width"): tuned(replace(SPEC, model="fc-tanh:width=0"), store=tmp_path)


# --- comparisons --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p, wanted", [([.01, .04, .03, .005], [.03, .06, .06, .02]), ([.2, .0001, .6, .03, .03], [.4, .0005, .6, .12, .12]), ([.5, .9], [1., 1.]), ([.04], [.04]), ([], [])])
def test_holm_is_that_of_statsmodels(p, wanted): assert holm(p) == pytest.approx(wanted)      # multipletests(p, method="holm"), 0.14


def test_a_pair_is_scipys_tests_of_logarithms():
    from scipy.stats import binomtest, ttest_rel
    random = np.random.default_rng(0)
    for n in (2, 3, 8, 30):
        a, b = np.exp(random.normal(5, 1, n)), np.exp(random.normal(4.7, 1, n))
        found, known = pair(a, b, .9), ttest_rel(np.log(a), np.log(b))
        interval = known.confidence_interval(.9)
        assert found.test == "t" and found.p == pytest.approx(known.pvalue) and (log(found.ratio.low), log(found.ratio.high)) == pytest.approx(interval)
        assert found.factor == pytest.approx(exp((interval.high - interval.low) / 2)) and (found.wins, found.losses) == ((a < b).sum(), (a > b).sum())
        b[0] = inf
        assert pair(a, b).test == "sign" and pair(a, b).p == pytest.approx(binomtest(pair(a, b).wins, n).pvalue)
    assert pair([1., inf], [inf, inf]).p == pair([2., 2.], [2., 2.]).p == 1.
    with pytest.raises(ValueError, match="positive"): pair([0., 1.], [1., 2.])
    with pytest.raises(ValueError, match="seeds"): pair([1.], [2.])


@pytest.mark.parametrize("ends, steps, early, chance", [
    ([4., 3., 1.], 200 * 2**.5, False, False), ([4., 2., 1.], 200., False, False), ([2., 1., 1.], 100., True, False), ([4., 4., 3.], inf, False, False),
    ([1., 3., 1.], 200 * 2**.5, False, True), ([4., 1., 3.], inf, False, True), ([inf, inf, 1.], 400., False, False), ([4., 0., 0.], 100 * 2**.5, False, False)])
def test_when_a_target_was_reached(ends, steps, early, chance):
    found = reached([100, 200, 400], ends, 2.)
    assert found.steps == pytest.approx(steps) and (found.early, found.chance) == (early, chance)


@kind
@dataclass(frozen=True)
class EverySecond(Rule):
    "Gradient descent that rests in every second step."
    lr: float
    def init(self, blocks, roles): return 0
    def step(self, state, blocks, grads): return ({k: v - self.lr * grads[k] if state % 2 == 0 else v for k, v in blocks.items()}, state + 1)


WHITE = Spec("linear-30-6", "deeplinear:depth=2,width=6", "mse", GD(.1), 64, loss_goal=.1)

def test_a_rule_that_rests_half_of_the_time_needs_twice_the_steps(tmp_path):
    "At 2T it is where gradient descent is at T, with all examples and the same factor in every other step."
    how = dict(seeds=(3, 4), horizons=(1 / 4, 1 / 2, 1.), budget=3, rounds=2, store=tmp_path)
    found = compare({"white": WHITE}, {"whole": GD(.3), "half": EverySecond(.3), "again": GD(.3)}, **how)
    rows = {(r.first, r.second): r for r in found.pairs.itertuples()}
    half, same = rows["whole", "half"], rows["whole", "again"]
    assert .44 < half.ratio < .56 and half.wins == 2
    assert same.ratio == 1. and not same.told and same.p == same.holm == 1. and "too few" in same.flag
    for r in found.table.itertuples():
        assert r.examples == pytest.approx(30 * r.steps) and r.low <= r.steps <= r.high and len(r.by_seed) == 2 and r.seconds > 0
    for T in (16, 64):      # every end is a run that one can make alone
        spec = found.specs["white", "whole", T]
        run = Store(tmp_path / "alone").run(replace(spec, seed=4))
        value = found.ends.query(f"rule == 'whole' and horizon == {T} and seed == 4")["value"].item()
        assert spec.steps == T and spec.rule.schedule(T) == 0 and value == run.trace("train").columns["loss"][-1]
    def idle(jobs, worker):
        assert jobs == []
        return iter(())
    again = compare({"white": WHITE}, {"whole": GD(.3), "half": EverySecond(.3), "again": GD(.3)}, engine=idle, **how)
    assert again.ends.equals(found.ends) and again.pairs.equals(found.pairs)


def test_what_could_mislead_is_flagged(tmp_path):
    task = replace(WHITE, steps=8, model="deeplinear:depth=1", loss_goal=1.)
    found = compare(task, {"far": GD(1e-6), "own": AutomaticGradientDescent(), "good": GD(1.)}, (0, 1), (.5, 1.), budget=3, rounds=2, store=tmp_path)
    table, pairs = found.table.set_index("rule"), found.pairs.set_index(["first", "second"])
    for rule, says in (("far", "upper end"), ("far", "2 of 2 seeds miss"), ("own", "no learning rate"), ("good", "meet it at the shortest")): assert says in table.flag[rule]
    assert "too few for a sign test" in pairs.flag["far", "good"] and "far is flagged" in pairs.flag["far", "good"] and not pairs.told.any()
    assert table.low["good"] == 0 and table.steps["far"] == inf and table.lr["own"] == () and "!" in str(found)


def test_a_rule_that_answers_with_an_average_is_judged_there(tmp_path):
    how = dict(seeds=(0, 1), horizons=(.5, 1.), budget=3, rounds=2, store=tmp_path)
    found = compare(WHITE, ["gd:lr=0.3", free := ScheduleFreeSGD(.3)], **how)
    assert found.table.rule.tolist() == ["gd:lr=0.3", repr(free)]
    assert compare(WHITE, {"plain": "gd:lr=0.3", "free": free}, **how).table.rule.tolist() == ["plain", "free"]
    problem, stepper, _ = replace(found.specs["task", repr(free), 64], seed=1).build()
    state, _ = train(problem, stepper, 64, seed=1)
    there, elsewhere = (problem.evaluate(theta, "train").loss for theta in (average(problem, stepper, state), state.theta))
    value = found.ends.query("rule != 'gd:lr=0.3' and horizon == 64 and seed == 1")["value"].item()
    assert value == pytest.approx(float(there), rel=1e-6) and value != pytest.approx(float(elsewhere), rel=1e-3)


def test_gradients_of_a_step_are_counted():
    spec = Spec("digits-100", "fc-tanh:width=4", "mse", GD(.1), 10, MiniBatch(20))
    found = costs({"one": spec, "two": replace(spec, estimator=SAM(.05, MiniBatch(20))), "all": replace(spec, estimator=FullBatch())}, 2, 3)
    assert [c.examples for c in found.values()] == [20, 40, 100] and all(0 < c.seconds.value for c in found.values())


@pytest.mark.parametrize("task, rules, more, says", [
    (WHITE, {"a": GD(.1)}, {}, "two rules"), (WHITE, GD(.1), {}, "two rules"), (WHITE, "gd:lr=0.1", {}, "two rules"), (WHITE, {"a": GD(.1), "b": 3}, {}, "two rules"), (replace(WHITE, loss_goal=None), {}, {}, "loss_goal"),
    (replace(WHITE, dataset="digits", acc_goal=.9), {}, {}, "not both"), (WHITE, {}, dict(seeds=(0,)), "two seeds"), (WHITE, {}, dict(seeds=(-1, 0)), "none that tunes"),
    (WHITE, {}, dict(horizons=(1.,)), "between horizons"), (replace(WHITE, steps=1), {}, {}, "between horizons"), (WHITE, {}, dict(horizons=(.5, 2.)), "parts of")])
def test_what_cannot_be_compared_is_refused_before_any_run(tmp_path, task, rules, more, says):
    with pytest.raises(ValueError, match=says): compare(task, rules or {"a": GD(.1), "b": Adam()}, store=tmp_path, **more)
    assert not list(tmp_path.iterdir())
