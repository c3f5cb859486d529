"Explorers without a browser: what their notebooks do not show."
import json
import re
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gradnb import GD, Spec, Store
from gradnb.show.explorers.explorer import Explorer
from gradnb.show.explorers.runs import RunExplorer
from gradnb.show.explorers.series import ROOM, Line, Panel, kept, pack, stops, thin

ROOT = Path(__file__).resolve().parents[1]


def head(scene):
    "The JSON head of a scene."
    return json.loads(scene[4:4 + struct.unpack_from("<I", scene)[0]])


@pytest.mark.parametrize("shape", ["noise", "spike", "gap", "falling", "constant", "infinite"])
@pytest.mark.parametrize("n", [0, 1, 2, 1999, 2001, 50_000])
def test_thinning_keeps_every_extreme(shape, n):
    "Whatever the curve: both ends, and beside every point one as high and one as low, nearer than a pixel of 400; no more than asked for."
    rng = np.random.default_rng(n)
    x = np.arange(n) * 7
    y = {"noise": rng.normal(size=n), "spike": np.where(x == 7 * (n // 3), 1., 0.), "gap": np.where(x % 3 == 0, np.nan, x * 1.),
         "falling": -x * 1., "constant": np.zeros(n), "infinite": np.where(x == 7 * (n // 2), np.inf, rng.normal(size=n))}[shape]
    index = kept(x, y, 2000)
    assert len(index) <= max(2000, 0) and (np.diff(index) > 0).all()
    if n < 2:
        return
    assert index[0] == 0 and index[-1] == n - 1
    near = (x[-1] - x[0]) / 400
    for i in rng.choice(np.flatnonzero(np.isfinite(y)), 300):
        seen = y[index][np.abs(x[index] - x[i]) <= near]
        seen = seen[np.isfinite(seen)]
        assert seen.max() >= y[i] >= seen.min()


def test_window_is_whole_where_it_is_narrow():
    x = np.arange(10**6) * 3
    line = thin(Line(x, np.sin(x)), window=(30_000., 33_000.))
    assert line.x[0] <= 30_000 and line.x[-1] >= 33_000 and not line.thinned
    assert (np.diff(line.x) == 3).all() and (line.y == np.sin(line.x)).all()


@pytest.mark.parametrize("runs, points", [(1, 10**6), (8, 10**6), (30, 10**5)])
def test_scene_fits_its_room(runs, points):
    x, rng = np.arange(points), np.random.default_rng(0)
    y = rng.normal(size=points)
    lines = tuple(Line(x, y, y - 1, y + 1, key=f"run {i}") for i in range(runs))
    panels = [Panel(f"panel {i}", lines) for i in range(5)] if runs < 30 else [Panel("panel", lines)]
    assert len(pack(panels)) <= 1.05 * ROOM


def test_stops_of_unequal_schedules():
    over = lambda *steps: Panel("p", (Line(np.array(steps), np.ones(len(steps))),))
    assert stops([over(0, 1, 2, 3, 10, 13), over(0, 50, 100)]) == (0, 1, 101)
    assert stops([over(10, 20), Panel("f", linked=False, steps=np.array([0, 40]), frame=lambda k: ())]) == (0, 10, 5)


# --- runs ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Two short runs of unequal schedules."
    store = Store(tmp_path_factory.mktemp("runs"))
    for lr, every in ((.1, 5), (.2, 7)):
        store.run(Spec("digits-50", "fc-tanh:width=4", "mse", GD(lr), 20, probes=(f"sharpness:every={every}", f"train:every={every}")), progress=False)
    return store


def test_unequal_schedules_stand_side_by_side(trained):
    explorer = RunExplorer(trained)
    sharpness = next(p for p in explorer.panels(explorer.look) if p.name == "sharpness")
    assert sorted(len(line.x) for line in sharpness.lines if not line.label) == [3, 5]
    assert explorer.figure(step=10, log=("sharpness", "step")).axes[1].get_yscale() == "log"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
@pytest.mark.parametrize("what", ["trace", "spec", "manifest"])
def test_damage_is_said_and_the_rest_is_shown(trained, tmp_path, what, damage):
    "Of two runs one is damaged: the other one's panels are there, and nothing is raised."
    import shutil
    store = Store(tmp_path / "runs")
    shutil.copytree(trained.root, store.root)
    sound, bad = store.list()
    file = {"trace": next(bad.path.glob("traces/sharpness.*")), "spec": bad.path / "spec.json", "manifest": bad.path / "manifest.json"}[what]
    data = file.read_bytes()
    if damage == "gone": file.unlink()
    else: file.write_bytes({"cut": data[:len(data) // 2], "flip": data[:-40] + bytes(8) + data[-32:], "empty": b""}[damage])
    explorer = RunExplorer(store)
    explorer.widget
    panels = {p.name: p for p in explorer._panels}
    assert {line.key for line in panels["sharpness"].lines} and explorer._canvas.message == ""
    if (what, damage) not in (("spec", "gone"), ("manifest", "gone"), ("trace", "flip")):
        assert bad.hash in panels["left out"].note or "sharpness" in panels["left out"].note
    explorer.figure()
    explorer.close()


def test_empty_and_missing_stores_say_so(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        explorer = RunExplorer(root)
        assert "has no runs yet" in head(explorer.widget.children[-1].scene)["panels"][0]["note"]
        assert explorer.figure().axes[0].texts
        explorer.close()


def test_a_run_is_followed_from_its_first_row(tmp_path):
    "The widget is there before the store; a run grows in another thread; no refresh fails."
    store = Store(tmp_path / "runs")
    explorer = RunExplorer(store, follow=.01, show=("loss",))
    explorer.widget
    said = []
    explorer._canvas.observe(lambda event: said.append(event["new"]), "message")
    spec = Spec("digits-50", "fc-tanh:width=4", "mse", GD(.1), 300, probes=("train:every=10",))
    worker = threading.Thread(target=lambda: store.run(spec, progress=False))
    worker.start()
    lengths, until = [], time.monotonic() + 120
    while time.monotonic() < until and (not lengths or lengths[-1] < 301):
        panel = explorer._panels[0]
        lengths.append(len(panel.lines[0].x) if panel.lines else 0)
        time.sleep(.005)
    worker.join()
    explorer.close()
    assert lengths[-1] == 301 and sorted(lengths) == lengths and not any(said)


def test_closing_while_others_refresh():
    class One(Explorer):
        def panels(self, look): return [Panel("loss", (Line(np.arange(10), np.arange(10.)),))]
    for _ in range(5):
        explorer, stop, failed = One(), threading.Event(), []
        explorer.widget

        def work():
            while not stop.is_set():
                try: explorer.refresh()
                except Exception as e: failed.append(e)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for t in threads: t.start()
        time.sleep(.02)
        explorer.close()
        time.sleep(.02)
        stop.set()
        for t in threads: t.join()
        assert not failed


def test_what_is_set_while_a_thread_refreshes_is_kept():
    "A refresh ends with the look that it began with; what is set in between must not be undone by it."
    seen = threading.Event()

    class One(Explorer):
        def panels(self, look):
            if threading.current_thread() is worker:
                seen.set()
                time.sleep(.2)
            return [Panel("loss", (Line(np.arange(10), np.arange(10.)),))]
    for change in (lambda: explorer.set(step=3, hidden=("loss",)), lambda: (setattr(explorer._canvas, "step", 3), setattr(explorer._canvas, "hidden", ["loss"]))):
        explorer, worker = One(), threading.Thread(target=lambda: explorer.refresh())
        explorer.widget
        seen.clear()
        worker.start()
        seen.wait()
        change()
        worker.join()
        assert explorer.look.step == explorer._canvas.step == 3 and explorer.look.hidden == ("loss",) == (*explorer._canvas.hidden,)
        explorer.close()


def test_memory_does_not_grow_as_the_window_moves():
    "What the kernel keeps: two hundred windows and frames of a million points."
    import tracemalloc
    x = np.arange(10**6)

    class One(Explorer):
        def panels(self, look):
            return [Panel("loss", (Line(x, np.sin(x)),)), Panel("at", linked=False, steps=x[::100], frame=lambda k: (Line(x[:50], np.full(50, k)),))]
    explorer = One()
    explorer.widget
    explorer._canvas.send = lambda *args: None
    ask = lambda i: (explorer.asked(None, {"kind": "window", "window": [i, 10**5 + i], "asked": i}, []), explorer.asked(None, {"kind": "frames", "step": 97 * i}, []))
    for i in range(5): ask(i)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for i in range(200): ask(i)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    explorer.close()
    assert grown < 200_000


@pytest.mark.parametrize("path", [*sorted((ROOT / "nbs" / "explore").glob("*.ipynb")), ROOT / "nbs" / "tour.ipynb"], ids=lambda p: p.stem)
def test_run_all_leaves_a_widget(path):
    "A notebook shows its explorer in a cell, and no later one closes it."
    sources = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert any(re.search(r"^(explorer|live)$", s.rstrip().rpartition("\n")[2]) for s in sources) and not any(re.search(r"\.close\(|close_all", s) for s in sources)


# --- packaging ----------------------------------------------------------------------------------------------------

def test_wheel_brings_the_scripts_and_their_licence(tmp_path):
    import shutil
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "gradnb", source / "gradnb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "nbs" / "figures", source / "nbs" / "figures")
    built = subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    wanted = {f"gradnb/show/explorers/static/{name}" for name in ("uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE", "canvas.js", "canvas.css")}
    assert wanted <= {*names}
