"""A run that is killed, loses its power, finds its disk full or is interrupted, at any point of the path on which it writes,
resumes bitwise: the same parameters, the same rows, the same arrays, none lost and none doubled.
"""
import errno
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest

from gradnb import PROBES, MiniBatch, Momentum, Probe, Spec, Store
from gradnb.bench.runs import Fault, struck
from gradnb.runs import Lock, Recorder
from gradnb.runs.tracefiles import read_trace
from gradnb.ground.traces import as_row

POINTS = 240
SPEC = Spec("digits-60", "fc-tanh:width=3", "mse", Momentum(0.02), 7, MiniBatch(10), ("sharpness:every=3", "kill test/λ"))


@PROBES.add("kill test/λ")
def pictures():
    def measure(view):
        view.memory["seen"] = view.memory.get("seen", 0) + 1
        return {"seen": view.memory["seen"], "norm": view.grad.norm(), "draws": view.grads(2), "quarter": view.grad[:4]}
    return Probe("kill test/λ", lambda step: step % 2 == 0, measure)


def train(root, interval=0.0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return Store(root).run(SPEC, progress=False, interval=interval)


def content(run):
    "Everything that a run has measured, as bytes."
    arrays = {(n, k, c): (a.dtype, a.shape, a.tobytes()) for n, steps in run.arrays.items() for k, row in steps.items() for c, a in row.items()}
    traces = {n: (t.steps.tobytes(), {c: v.tobytes() for c, v in t.columns.items()}) for n, t in run.traces.items()}
    return run.theta.numpy().tobytes(), traces, arrays


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return content(train(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def disk():
    "A folder in memory where there is one: what is tested is the order of the calls, not the disk."
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder: yield Path(folder)


def sound(root, whole):
    "Resume, and compare with the run that nothing stopped."
    run = train(root, interval=1e9)
    assert run.status == "finished" and run.damage() == {}
    assert content(run) == whole
    left = [p.name for p in run.path.rglob("*") if p.is_file() and p.suffix not in (".json", ".arrow", ".safetensors") and p.name != "lock"]
    assert all(".trace.corrupt-" in name for name in left), f"what is put in place as a whole is never damaged: {left}"
    assert not (run.path / "checkpoint.previous.safetensors").exists()


@pytest.fixture(scope="module")
def calls(tmp_path_factory): return struck(lambda: train(tmp_path_factory.mktemp("count")), None, "before", None)


def points(how, number, last):
    "Random calls, spread over the whole path, each with its own random numbers."
    draw, last = random.Random(how), int(last)
    return [(1 + (i * last + draw.randrange(last)) // number, random.Random(f"{how} {i}")) for i in range(number)]


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("how", ["before", "torn", "power"])
def test_killed_at_any_call(disk, whole, calls, how, part):
    assert calls > 100
    count = 0
    for at, draw in points(how, POINTS // 3, calls)[part::4]:
        root = disk / f"{at}-{count}"
        assert struck(lambda: train(root), min(at, calls), how, draw) is None, f"the process outlived call {at}"
        count += 1
        if draw.random() < 0.25: count += struck(lambda: train(root), draw.randrange(1, calls), how, draw) is None    # and again, while it resumes
        sound(root, whole)
    assert count >= POINTS // 12


@pytest.mark.parametrize("part", range(2))
def test_a_full_disk_is_said_and_costs_nothing(disk, whole, calls, part):
    said = 0
    for at, draw in points("full", 40, calls)[part::2]:
        root = disk / str(at)
        with Fault(at, "full", draw), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try: run = Store(root).run(SPEC, progress=False, interval=0.0)
            except OSError as e:
                assert e.errno == errno.ENOSPC and "make room, and the same call resumes it" in str(e)
                said += 1
            else: assert any("could not be compacted" in str(w.message) for w in caught) or not any(run.path.glob("traces/*.trace"))
        sound(root, whole)
    assert said >= 15


def test_a_row_that_did_not_fit_is_taken_back(disk):
    recorder = Recorder(disk)
    recorder.append("x", 0, as_row(0.0))
    real = os.write
    os.write = lambda fd, data: real(fd, bytes(data)[:5]) if len(data) > 10 else fail()

    def fail(): raise OSError(errno.ENOSPC, "full")

    try:
        with pytest.raises(OSError, match="full"): recorder.append("x", 1, as_row(1.0))
    finally: os.write = real
    recorder.append("x", 1, as_row(2.0))
    assert read_trace(disk / "traces" / "x.trace").values.tolist() == [0.0, 2.0]


def test_a_file_that_may_not_grow(disk, whole):
    "A quota, as the operating system enforces it."
    pid = os.fork()
    if not pid:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
            train(disk)
        except OSError as e: os._exit(7 if "make room" in str(e) else 8)
        finally: os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    sound(disk, whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_small_file_system(tmp_path, whole):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "gradnb", tmp_path], capture_output=True).returncode:
        pytest.skip("this machine does not let a file system be mounted")
    try:
        with pytest.raises(OSError, match="No space left on device: run .* make room"): train(tmp_path)
        subprocess.run(["mount", "-o", "remount,size=4m", tmp_path], check=True)
        sound(tmp_path, whole)
    finally: subprocess.run(["umount", "-l", tmp_path], check=True)


class Interrupt:
    "Ctrl-C at the n-th line that gradnb's own code for training and storing executes."
    def __init__(self, at): self.at, self.count = at, 0

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc): sys.settrace(None)

    def trace(self, frame, event, arg):
        if not any(part in frame.f_code.co_filename for part in ("gradnb/runs/", "gradnb/ground/traces", "gradnb/ground/files", "gradnb/move/steppers")):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at: raise KeyboardInterrupt
        return self.trace


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    with Interrupt(None) as trace: train(tmp_path_factory.mktemp("lines"))
    return trace.count


@pytest.mark.parametrize("interval", [0.0, 1e9])
def test_interrupted_at_any_line(disk, whole, lines, interval):
    assert lines > 2000
    count = 0
    for at, _ in points(f"interrupt {interval}", 40, lines * 0.9):
        root = disk / str(at)
        try:
            with Interrupt(int(at)): train(root, interval)
        except KeyboardInterrupt: count += 1
        sound(root, whole)
    assert count >= 30


def test_a_second_process_waits_or_is_refused(disk, whole):
    root = disk / SPEC.hash
    root.mkdir()
    with Lock(root):
        with pytest.raises(RuntimeError, match=rf"written by process {os.getpid()} on"): train(disk)
        held = Lock(root)
        assert held.held()
        thread = threading.Thread(target=lambda: Store(disk).run(SPEC, progress=False, interval=1e9, wait=60))
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive() and not (root / "spec.json").exists()
    thread.join(60)
    assert not held.held()
    sound(disk, whole)


def test_many_processes_on_one_run_write_it_once(disk, whole):
    pids = []
    for _ in range(6):
        if pid := os.fork(): pids.append(pid)
        else:
            code = 1
            try:
                code = 0 if Store(disk).run(SPEC, progress=False, interval=0.0, wait=60).done else 2
            finally: os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 6
    sound(disk, whole)


def test_the_lock_of_a_dead_process_is_no_lock(disk):
    root = disk / SPEC.hash
    root.mkdir()
    pid = os.fork()
    if not pid:
        Lock(root).__enter__()
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert not Lock(root).held() and f"process {pid} on" in (root / "lock").read_text()
    assert train(disk).status == "finished"
