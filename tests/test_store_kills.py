"""A run that is killed, loses its power, finds its disk full or is interrupted, at any point of the path on which it writes,
resumes bitwise: the same parameters, the same rows, the same arrays, none lost and none doubled.
"""
import errno
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from gradnb import PROBES, MiniBatch, Momentum, Probe, Run, Spec, Store
from gradnb.bench.runs import Fault, struck
from gradnb.runs import Lock, Recorder
from gradnb.runs.spec import MARKS
from gradnb.runs.tracefiles import read_trace
from gradnb.ground import files
from gradnb.ground.traces import as_row
import warm_probe  # noqa: F401

POINTS = 240
SPEC = Spec("linear-60-16", "deeplinear:depth=1", "mse", Momentum(0.02), 7, MiniBatch(10), ("warm/μ", "kill test/λ"))


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
    left = [p.name for p in run.path.rglob("*") if p.is_file() and p.suffix not in (".json", ".arrow", ".safetensors") and not p.name.startswith("lock")]
    assert all(".trace.corrupt-" in name for name in left), f"what is put in place as a whole is never damaged: {left}"
    assert not (run.path / "checkpoint.previous.safetensors").exists()


@pytest.fixture(scope="module")
def calls(tmp_path_factory): return struck(lambda: train(tmp_path_factory.mktemp("count")), None, "before", None)


def points(how, number, last):
    "Random calls, spread over the whole path, each with its own random numbers."
    draw, last = random.Random(how), int(last)
    return [(1 + (i * last + draw.randrange(last)) // number, random.Random(f"{how} {i}")) for i in range(number)]


@pytest.mark.parametrize("part", [0, 2, *(pytest.param(p, marks=pytest.mark.slow) for p in (1, 3))])     # each part spans the whole path
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


@pytest.mark.parametrize("how", ["torn", "power"])
def test_marks_are_the_old_or_the_new_ones_whenever_their_writer_is_killed(disk, how):
    run = train(disk / "count")
    about, seen = {h: {k: v for k, v in line.items() if k not in MARKS} for h, line in Store(disk / "count").about().items()}, set()
    last = struck(lambda: Store(disk / "count").mark(run.hash, "new", "two"), None, how, None)
    for at in range(1, last + 1):
        store = Store(disk / "count")
        store.mark(run.hash, "old", "one")
        assert struck(lambda: store.mark(run.hash, "new", "two"), at, how, random.Random(at)) is None
        marks = store.open(run.hash).marks
        assert marks in ({"tags": ("old",), "note": "one"}, {"tags": ("new",), "note": "two"})
        seen.add(marks["note"])
        assert store.table(tags=marks["tags"][0])["note"].tolist() == [marks["note"]] and run.damage() == {}
    assert last > 3 and "one" in seen
    assert {h: {k: v for k, v in line.items() if k not in MARKS} for h, line in store.about().items()} == about and train(disk / "count").hash == run.hash


def test_two_writers_of_marks_lose_nothing_of_each_other(disk):
    "One process sets the tags, another the note, at once; what either has set is there until it sets it anew, and the writer of the run takes nothing of it away."
    run, times = train(disk), 150
    def write(what):
        for i in range(times):
            store.mark(run.hash, **{what: f"{what} {i}"})
            assert {"tags": run.marks["tags"][:1], "note": run.marks["note"]}[what] in (f"{what} {i}", (f"{what} {i}",))
            if what == "tags": [part.unlink(missing_ok=True) for part in run.path.glob("*.part")]
    store = Store(disk)
    store.mark(run.hash, "", "")
    if not (child := os.fork()):
        with suppress(BaseException):
            write("note")
            os._exit(0)
        os._exit(1)
    try: write("tags")
    finally: status = os.waitpid(child, 0)[1]
    assert status == 0 and run.marks == {"tags": (f"tags {times - 1}",), "note": f"note {times - 1}"}
    assert run.damage() == {} and not [*run.path.glob("*.part"), *(disk / ".marks").glob("new*")]


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


@cache
def stores(file): return any(part in file for part in ("gradnb/runs/", "gradnb/ground/traces", "gradnb/ground/files", "gradnb/move/steppers"))


class Interrupt:
    "Ctrl-C at the n-th line that gradnb's own code for training and storing executes."
    def __init__(self, at): self.at, self.count = at, 0

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc): sys.settrace(None)

    def trace(self, frame, event, arg):
        if not stores(frame.f_code.co_filename): return None
        if event == "line":
            self.count += 1
            if self.count == self.at: raise KeyboardInterrupt
        return self.trace


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    with Interrupt(None) as trace: train(tmp_path_factory.mktemp("lines"))
    return trace.count


@pytest.mark.parametrize("interval", [pytest.param(0.0, marks=pytest.mark.slow), 1e9])
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


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_a_state_half_written_over_is_never_stored(disk, whole, monkeypatch, kind):
    over = Momentum.over
    for at in range(SPEC.steps):
        left = [at]

        def cut(rule, state, blocks, grads):
            after = over(rule, state, blocks, grads)
            left[0] -= 1
            if left[0] < 0: raise kind("while a step is taken")
            return after

        monkeypatch.setattr(Momentum, "over", cut)
        with suppress(kind): train(disk / str(at), 1e9)
        assert left[0] < 0
        monkeypatch.setattr(Momentum, "over", over)
        sound(disk / str(at), whole)


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


def in_forks(works):
    "Each in a process of its own; what they return as exit statuses, in order."
    pids = []
    for work in works:
        if pid := os.fork(): pids.append(pid)
        else:
            code = 99
            try: code = work()
            finally: os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def no_flock(*_): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.fixture(params=["flock", "turns"])
def locking(request, monkeypatch):
    "With the system's lock, and on a file system that has none."
    if request.param == "turns": monkeypatch.setattr("fcntl.flock", no_flock)
    warnings.filterwarnings("ignore", message=".*has no locks")
    return request.param


def test_ten_processes_in_one_folder_one_at_a_time(disk, locking):
    "Each adds one to a number, in two steps with time between them: whoever is not alone loses a count."
    (disk / "count").write_text("0")

    def add():
        for _ in range(5):
            with Lock(disk / "run", wait=120) as lock:
                seen = int((disk / "count").read_text())
                time.sleep(random.random() / 100)
                lock.check()
                (disk / "count").write_text(str(seen + 1))
        return 0

    assert in_forks([add] * 10) == [0] * 10
    assert (disk / "count").read_text() == "50"
    assert not Lock(disk / "run").held()


def test_a_killed_owner_of_a_turn_is_succeeded_and_a_living_one_is_not(disk, monkeypatch):
    monkeypatch.setattr("fcntl.flock", no_flock)
    files.SAID.clear()
    with pytest.warns(RuntimeWarning, match="has no locks"), Lock(disk / "a"): pass
    assert in_forks([lambda: (Lock(disk / "run").__enter__(), os.kill(os.getpid(), 9))]) == [-9]
    assert not Lock(disk / "run").held()
    with Lock(disk / "run") as lock:
        assert in_forks([lambda: 3 if Lock(disk / "run").held() else 4]) == [3]
        with pytest.raises(RuntimeError, match=rf"written by process {os.getpid()} on"), Lock(disk / "run"): pass
        name, = (p for p in (disk / "run").iterdir() if p.name.startswith("lock."))
        about = json.loads(name.read_text())
        for age, machine, free in [(30, "far", False), (90, "far", True), (90, about["machine"], False)]:       # of the last sign of life
            other = disk / f"{age} {machine[:3]}"
            other.mkdir()
            (other / "lock.7").write_text(json.dumps(about | {"machine": machine}))
            os.utime(other / "lock.7", (time.time() - age,) * 2)
            assert Lock(other).held() != free
            if free:
                with Lock(other): assert [p.name for p in other.glob("lock.*")] == ["lock.8"]
            else:
                with pytest.raises(RuntimeError, match="is being written by"), Lock(other): pass
        lock.check()


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_run_without_locks_and_flushes(disk, whole, monkeypatch, error):
    def cannot(*_): raise OSError(error, os.strerror(error))
    monkeypatch.setattr("fcntl.flock", cannot)
    monkeypatch.setattr("os.fsync", cannot)
    assert content(train(disk)) == whole and content(train(disk)) == whole


def test_a_folder_that_is_removed_while_one_waits(disk, whole, locking):
    "The waiting process writes a whole run in a folder of its own."
    train(disk)
    run = Store(disk).open(SPEC)
    (run.path / "manifest.json").unlink()

    def wait(): return 0 if Store(disk).run(SPEC, progress=False, wait=60).done else 2

    def remove():
        Store(disk).remove(SPEC)
        return 0

    with Lock(run.path):
        waiting = threading.Thread(target=lambda: results.extend(in_forks([wait] * 3)))
        results = []
        waiting.start()
        time.sleep(0.5)
        os.rename(run.path, disk / "away")                      # as Store.remove does, which would wait for us
    waiting.join(120)
    assert results == [0] * 3 and not any((disk / "away" / "traces").glob("*.trace"))
    sound(disk, whole)
    assert in_forks([remove]) == [0] and not (disk / SPEC.hash).exists() and not [*disk.glob(".removed*")]


@pytest.mark.parametrize("what, again", [("", False), ("", True), ("traces", False), ("traces/loss.trace", False), ("arrays", False), ("lock", False), ("lock", True)])
def test_a_run_whose_files_are_removed_says_so(disk, whole, monkeypatch, what, again, locking):
    "At step 4; another process may have begun the run again, which this one must not touch."
    spec, struck_once, before = replace(SPEC, probes=(*SPEC.probes, "kill test/strike")), [], []
    run = disk / spec.hash

    def strike(view):
        if view.step == 4 and not struck_once:
            struck_once.append(True)
            (disk / "away").mkdir()
            for path in [run / what] if what != "lock" else [*run.glob("lock*")]: os.rename(path, disk / "away" / (path.name or "run"))
            if again: assert in_forks([lambda: 0 if Store(disk).run(spec, progress=False).done else 1]) == [0]
            before.extend((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
        return 0.0

    monkeypatch.setitem(PROBES, "kill test/strike", lambda: Probe("strike", lambda step: True, strike))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(RuntimeError, match="removed or (replaced|changed).*the same call"): Store(disk).run(spec, progress=False, interval=1e9)
        if again: assert before == [(p, p.stat().st_mtime_ns) for p in run.rglob("*")]
        done = Store(disk).run(spec, progress=False)
    assert done.status == "finished" and done.damage() == {} and len(done.traces["loss"]) == 8


def test_a_link_in_place_of_a_run_is_refused(disk, whole):
    run = train(disk / "there")
    (disk / "here").mkdir()
    (disk / "here" / SPEC.hash).symlink_to(run.path)
    (run.path / "x.part").write_text("not ours")
    before = sorted((str(p), p.stat().st_mtime_ns) for p in run.path.rglob("*"))
    store = Store(disk / "here")
    for call in (lambda: store.run(SPEC), lambda: store.run(SPEC, verify=True), lambda: store.open(SPEC), lambda: store.remove(SPEC),
                 lambda: Recorder(store.root / SPEC.hash), lambda: Lock(store.root / SPEC.hash).__enter__(), lambda: Run(store.root / SPEC.hash).spec,
                 lambda: Run(store.root / SPEC.hash).traces, lambda: Run(store.root / SPEC.hash).theta):
        with pytest.raises(ValueError, match="is a link"): call()
    files.SAID.clear()
    assert store.list() == [] and len(store.table()) == 0
    assert before == sorted((str(p), p.stat().st_mtime_ns) for p in run.path.rglob("*"))
    (disk / "here" / SPEC.hash).unlink()
    (disk / "here" / SPEC.hash).symlink_to(disk / "nowhere")
    with pytest.raises(ValueError, match="is a link"): store.run(SPEC, progress=False)
    assert not (disk / "nowhere").exists()


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_a_failing_disk_is_said_and_the_run_goes_on_elsewhere(disk, whole, monkeypatch, name):
    for at in (2, 7, 12):
        root, count, real = disk / str(at), iter(range(1, 10**6)), getattr(os, name)

        def failing(*args):
            if next(count) >= at: raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            with pytest.raises(OSError, match="see to the disk that failed, and the same call resumes it"): train(root)
        sound(root, whole)


def test_the_clock_may_go_backwards(disk, whole, monkeypatch):
    ticks, real = iter(range(10**9)), time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * next(ticks))
    run = train(disk)
    assert content(run) == whole and 0 <= run.manifest["seconds"] < 600


def test_ten_processes_on_one_run_some_of_which_are_killed(disk, whole):
    def work(i):
        if i % 2: threading.Timer(0.05 + i / 20, os.kill, (os.getpid(), 9)).start()
        try: return 0 if Store(disk).run(SPEC, progress=False, interval=0.0, wait=60).done else 2
        finally:
            if i % 2: os.kill(os.getpid(), 9)
    assert in_forks([lambda i=i: work(i) for i in range(10)]) == [0, -9] * 5
    sound(disk, whole)


def test_the_index_is_written_by_many_some_of_whom_are_killed(disk, monkeypatch):
    "Whoever reads beside them sees what the files say; what is left of the index is of use to nobody or right."
    monkeypatch.setattr("gradnb.runs.store.FRESH", 1)
    for seed in range(4): Store(disk).run(replace(SPEC, seed=seed, probes=()), progress=False)
    looks = lambda: [f.to_csv() for f in (Store(disk).table(), Store(disk).frame("loss"), Store(disk).frame())]
    true = looks()

    def work(i):
        if i % 2: threading.Timer(0.01 + i / 8, os.kill, (os.getpid(), 9)).start()
        for _ in range(10**6 if i % 2 else 12):
            for file in disk.glob(".index*"):
                with suppress(OSError): file.unlink()
            if looks() != true: return 2
        return 0
    assert in_forks([lambda i=i: work(i) for i in range(6)]) == [0, -9] * 3
    assert looks() == true and looks() == true and len([f for f in disk.glob(".index*") if f.suffix != ".part"]) == 3
    for at in range(1, 30, 3):                       # at any call of the writer
        for file in disk.glob(".index*"): file.unlink()
        struck(looks, at, ("before", "torn", "power")[at % 3], random.Random(at))
        assert looks() == true
