"""What lies in a run's folder may have been changed by a failing disk or by a stranger. Reading it gives what was written, or a
ValueError that names the file; training on gives the run that nothing damaged, and says what was set aside.
"""
import random
import resource
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

from gradnb import PROBES, MiniBatch, Momentum, Probe, Run, Spec, Store
from gradnb.bench.runs import DAMAGES, damaged
import warm_probe  # noqa: F401

SPEC = Spec("linear-60-16", "deeplinear:depth=1", "mse", Momentum(0.02), 12, MiniBatch(10), ("warm/μ", "fuzz/λ"))
WEATHER = {"fair": True}
CHANGES = *DAMAGES, "swap", "gone"


@PROBES.add("fuzz/λ")
def pictures():
    def measure(view):
        if view.step == 8 and not WEATHER["fair"]: raise KeyboardInterrupt
        return {"norm": view.grad.norm(), "draws": view.grads(2), "quarter": view.grad[:4]}
    return Probe("fuzz/λ", lambda step: step % 4 == 0, measure)


def train(root, spec=SPEC, **more):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return Store(root).run(spec, progress=False, **more), [str(w.message) for w in caught]


def content(run):
    "Everything that can be read of a run."
    arrays = {(n, k, c): a.tolist() for n, steps in run.arrays.items() for k, row in steps.items() for c, a in row.items()}
    traces = {n: (t.steps.tolist(), {c: v.tolist() for c, v in t.columns.items()}) for n, t in run.traces.items()}
    return run.spec, run.manifest, run.status, run.theta.tolist(), traces, arrays


@pytest.fixture(scope="module")
def done(tmp_path_factory): return train(tmp_path_factory.mktemp("done"))[0]


@pytest.fixture(scope="module")
def going(tmp_path_factory):
    "A run that stopped at step 8, its last checkpoints at 7 and 8."
    root, WEATHER["fair"] = tmp_path_factory.mktemp("going"), False
    with pytest.raises(KeyboardInterrupt): train(root, interval=0.0)
    WEATHER["fair"] = True
    return Run(root / SPEC.hash)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    "Another run, from which files are mixed in."
    from dataclasses import replace
    return train(tmp_path_factory.mktemp("other"), replace(SPEC, seed=1))[0]


def files(run): return sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file() and p.name != "lock")


def copy(run, root):
    shutil.rmtree(root / run.hash, ignore_errors=True)
    shutil.copytree(run.path, root / run.hash)
    return Run(root / run.hash)


def change(run, file, how, other, draw):
    "Damage one file."
    path = run.path / file
    if how in DAMAGES: data = damaged(path.read_bytes(), how, draw)
    if how == "swap":
        source = draw.choice([r.path / f for r in (run, other) for f in files(r) if f.rpartition(".")[2] == file.rpartition(".")[2]])
        data = source.read_bytes()
    path.unlink()
    if how != "gone": path.write_bytes(data)


@contextmanager
def bounded(more=2**29):
    "No room for what a damaged file may ask for."
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_AS, before)


def right(found, true, live):
    "Is what was read what was written? A run that goes on may be read as it was a moment ago."
    if found == true: return True
    if not live: return False
    same = found[0] == true[0] and found[3] == true[3] or found[3] == "checkpoint"
    rows = all(true[4][n][0][:len(s)] == s and all(true[4][n][1][c][:len(s)] == v for c, v in columns.items())
               for n, (s, columns) in found[4].items())
    return same and rows and found[5].items() <= true[5].items()


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("which", ["done", "going"])
def test_what_is_read_is_right_or_named(request, tmp_path, other, which, how):
    sound, draw, named = request.getfixturevalue(which), random.Random(f"{which} {how}"), 0
    true, live = content(sound), which == "going"
    for file in files(sound):
        for _ in range({"gone": 1, "flip": 20}.get(how, 4)):         # few flips leave a text that still reads as JSON
            run = copy(sound, tmp_path)
            change(run, file, how, other, draw)
            try:
                with bounded(): found = content(run)
            except FileNotFoundError as e: assert how == "gone" and Path(e.filename).name == Path(file).name
            except ValueError as e:
                assert Path(file).name.split(".")[0] in str(e) or "trace" in str(e), f"{file} {how}: {e}"
                named += 1
            else: assert right(found, true, live) or file == "manifest.json" and how == "gone" and found[4:] == true[4:], f"{file} {how}"
    assert named >= (0 if how == "gone" else len(files(sound)))


@pytest.mark.parametrize("how", CHANGES)
def test_a_damaged_run_goes_on_from_what_is_sound(tmp_path, going, done, other, how):
    draw, true = random.Random(how), content(done)[3:]
    for file in files(going):
        run = copy(going, tmp_path)
        change(run, file, how, other, draw)
        hurt = run.damage()
        again, said = train(tmp_path)
        assert content(again)[3:] == true and again.status == "finished" and again.damage() == {}
        assert {e["file"] for e in again.manifest["damaged"]} >= hurt.keys() - ({"spec.json"} if how == "gone" else {})
        for entry in again.manifest["damaged"]:
            lost = entry["now"] is None and (how == "gone" or how == "cut" and "has lost rows" in entry["why"])
            assert lost or how == "gone" or (again.path / entry["file"]).with_name(entry["now"]).exists()
            assert any(message.startswith(entry["why"]) for message in said)


@pytest.mark.parametrize("how", CHANGES)
def test_a_damaged_finished_run_is_measured_again(tmp_path, done, other, how):
    draw, true = random.Random(how), content(done)[3:]
    for file in files(done):
        run = copy(done, tmp_path)
        change(run, file, how, other, draw)
        again, _ = train(tmp_path, verify=True)
        assert content(again)[3:] == true and again.damage() == {} and again.status == "finished"
