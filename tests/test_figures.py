"Figures, claims and plots: what must keep holding beyond what their notebooks show."
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.collections import PolyCollection
import nbformat
import numpy as np
import pytest
import torch
from nbformat import v4

from gradnb.models import MODELS
from gradnb.show import build, figures
from gradnb.show.claims import batch_means, claim, claims_table, load_claims, mark, measurement, save_claims, status
from gradnb.ground.estimate import Estimate
from gradnb.show.build import dry_run, run_figures
from gradnb.show.gallery import verdict
from gradnb.show.figures import as_declared, figure_specs, find_figures, set_parameters
from gradnb.show.plots.traces import STYLE, label_end, palette, plot_sharpness, plot_trace, save_figure, style
from gradnb.runs import Lock, Spec, Store
from gradnb.runs.sweeps.engines import Here
from gradnb.ground.traces import Trace

PARAMETERS = 'size: str = "smoke"  # how long\nseed: int = 0  # of the weights\nstore: str = ""\nout: str = ""'
SPECS = "from gradnb import GD, Spec\nspecs = {'a': Spec('digits-50', 'fc-tanh:width=4', 'mse', GD(.05), 3, seed=seed)}"


def write(folder, name, parameters=PARAMETERS, specs=SPECS, body="pass"):
    "A throw-away figure notebook."
    cells = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}, id="parameters"),
             v4.new_code_cell(specs, metadata={"tags": ["specs"]}, id="specs"), v4.new_code_cell(body, id="body")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def drawn(monkeypatch):
    "Instead of a kernel: write what a good notebook writes, and note the parameters."
    seen = []

    def execute(path, folder, params, timeout, fork):
        seen.append((path.stem, params))
        for kind in ("png", "svg", "ipynb", "html"):
            (folder / f"{path.stem}.{kind}").write_text("new")
        save_claims([claim("one is positive", "Peano 1889", (0, math.inf), 1.)], folder / "claims.json")
    monkeypatch.setattr(build, "execute", execute)
    return seen


# --- the notebooks that come with gradnb --------------------------------------------------------------------------

@pytest.mark.parametrize("name", find_figures())
def test_shipped_notebooks(name):
    "Every figure notebook is smoke-sized as it stands, names its runs at each size, if any, and stores no outputs."
    path = find_figures()[name]
    cells = nbformat.read(path, as_version=4).cells
    assert not any(c.get("outputs") for c in cells), "figure notebooks are stored without outputs"
    assert any(re.search(r"\bclaims = as_judged\(", c.source) for c in cells), "a smoke test computes every claim, or raises"
    assert figures.known_parameters(path)["size"]["default"].strip("'\"") == "smoke"
    specs = {size: figure_specs(path, set_parameters(path, size, {})) for size in figures.SIZES}
    assert figure_specs(path, {}) == specs["smoke"]
    work = {size: sum(s.steps for s in found.values()) for size, found in specs.items()}
    assert not any(specs.values()) or 0 < work["smoke"] < min(work["default"], work["full"])
    for spec in specs["default"].values():
        assert Spec.from_json(spec.to_json()) == spec


def test_edge_of_stability(tmp_path):
    "The first figure, short but real: every file is there, and every claim can be checked from the file alone."
    params = {"datasets": "chebyshev-3-20", "rates": "0.4", "steps": "700"}
    call = dict(params=params, store=tmp_path / "runs", progress=False)
    result, = run_figures(["edge_of_stability"], tmp_path / "out", **call)
    assert result.ok, result.error
    wanted = {"claims.json", "made.json", *(f"edge_of_stability.{kind}" for kind in ("png", "svg", "ipynb", "html"))}
    assert {f.name for f in result.folder.iterdir()} == wanted
    assert plt.imread(result.folder / "edge_of_stability.png").std() > .01
    assert sorted(type(r.spec.rule).__name__ for r in Store(tmp_path / "runs").list()) == ["GD", "Momentum", "Momentum", "Scheduled"]
    claims = load_claims(result.folder / "claims.json")
    assert tuple(claims) == result.claims and len(claims) == 6
    rising, hovering, *_ = claims
    assert rising.holds and "keeps rising" in rising.text
    assert hovering.measured.low < hovering.measured.value < hovering.measured.high
    assert "<img" in (result.folder / "edge_of_stability.html").read_text("utf-8")


# --- the runner ---------------------------------------------------------------------------------------------------

def test_runs_are_reused_and_others_go_on(tmp_path, drawn):
    "A figure whose runs cannot be trained is reported; the next is made; what is trained is not trained again."
    home = tmp_path / "nbs"
    write(home, "a_bad", specs=SPECS.replace("digits-50", "digitz"))
    write(home, "b_good")
    call = dict(out=tmp_path / "out", store=tmp_path / "runs", folder=home, progress=False)
    first = run_figures(**call)
    assert [r.ok for r in first] == [False, True] and "digitz" in first[0].error
    assert drawn[0][1] == {"size": "default", "store": str(tmp_path / "runs"), "out": str(tmp_path / "out" / "b_good" / ".new")}
    run, = Store(tmp_path / "runs").list()
    stamp = (run.path / "manifest.json").stat().st_mtime_ns
    again, = run_figures(["b_good"], **call)
    assert again.ok and (run.path / "manifest.json").stat().st_mtime_ns == stamp
    run_figures(["b_good"], params={"seed": "1"}, **call)
    assert len(Store(tmp_path / "runs").list()) == 2


def test_a_failure_leaves_the_last_good_picture(tmp_path, drawn, monkeypatch):
    "Whatever a notebook that fails has written, and when it fails: yesterday's files are as they were, and said to be."
    home = tmp_path / "nbs"
    write(home, "one")
    call = dict(out=tmp_path / "out", store=tmp_path / "runs", folder=home, progress=False)
    assert run_figures(**call)[0].ok
    (tmp_path / "out" / "one" / "mine.txt").write_text("keep")
    good = {f.name: f.read_text() for f in (tmp_path / "out" / "one").iterdir()}
    assert len(good) == 7
    def half(path, folder, *a):
        for file in ("one.png", "one.ipynb"): (folder / file).write_text("half")
        Path("/dev/full").write_text("more")
    for fails in (half, lambda path, folder, *a: (folder / "one.png").write_text("half")):
        monkeypatch.setattr(build, "execute", fails)
        result, = run_figures(**call, force=True)
        assert not result.ok and ("No space left on device: figure one is as it was; make room" in str(result) or "wrote no one." in str(result)) and "holds what was made at an earlier time" in str(result)
        assert {f.name: f.read_text() for f in result.folder.iterdir()} == good


def test_a_gallery_that_does_not_fit_says_so_and_figures_stay(tmp_path, drawn, monkeypatch):
    write(tmp_path / "nbs", "one")
    call = dict(out=tmp_path / "out", store=tmp_path / "runs", folder=tmp_path / "nbs", progress=False)
    with monkeypatch.context() as m:
        m.setattr(build, "write_gallery", lambda out: Path("/dev/full").write_text("more"))
        with pytest.raises(OSError, match="No space left on device: the figures that are drawn are kept; make room"): run_figures(**call)
    assert not run_figures(**call)[0].drawn and (tmp_path / "out" / "index.html").exists()


def test_a_notebook_that_is_edited_while_it_runs_is_drawn_again(tmp_path, drawn, monkeypatch):
    home, execute = tmp_path / "nbs", build.execute
    write(home, "one")

    def edited(path, *rest):
        execute(path, *rest)
        write(home, "one", body="pass  # another thought")
    call = dict(out=tmp_path / "out", store=tmp_path / "runs", folder=home, progress=False)
    with monkeypatch.context() as m:
        m.setattr(build, "execute", edited)
        assert run_figures(**call)[0].ok
    assert [run_figures(**call)[0].drawn for _ in range(2)] == [True, False]


def test_a_figure_that_names_what_is_unknown_fails_alone_and_one_whose_runs_are_done_is_drawn(tmp_path, drawn, monkeypatch):
    home = tmp_path / "nbs"
    write(home, "good"), write(home, "wrong", specs=SPECS.replace("fc-tanh", "fc-tan"))
    call = dict(out=tmp_path / "out", store=tmp_path / "runs", folder=home)
    assert [state.partition("'")[0] for state in dry_run(**call).state] == ["to be drawn", "ValueError: no model "]
    good, wrong = run_figures(**call, progress=False)
    assert good.ok and not wrong.ok and "Did you mean 'fc-tanh'" in wrong.error and len(Store(tmp_path / "runs").list()) == 1
    monkeypatch.delitem(MODELS, "fc-tanh")
    assert list(dry_run(["good"], **call).state) == ["up to date"]
    result, = run_figures(["good"], **call, force=True, progress=False)
    assert result.ok and result.drawn


def test_a_run_that_somebody_else_is_writing_is_named_and_left_alone(tmp_path, drawn):
    home = tmp_path / "nbs"
    path = write(home, "one")
    folder = tmp_path / "runs" / figure_specs(path, {})["a"].hash
    folder.mkdir(parents=True)
    call = dict(out=tmp_path / "out", store=tmp_path / "runs", folder=home, progress=False)
    with Lock(folder):
        result, = run_figures(**call)
        assert not result.ok and f"run {folder.name} is being written by process {os.getpid()}" in result.error and not drawn
    assert run_figures(**call)[0].ok


def test_a_page_needs_no_network(tmp_path):
    "Nothing is fetched, formulas are pictures, what stands in code is left alone."
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell(r"# Edge" "\n" r"The sharpness rises to $2/\eta$, $\frac{\lambda}{2}$, and `echo $HOME$`." "\n\n" r"$$\sum_i x_i^2$$ and $\undefinedword$"),
                                      v4.new_code_cell("1", outputs=[v4.new_output("stream", text="costs $5 or $6\n")], id="body")])
    nbformat.write(notebook, tmp_path / "a_figure.ipynb")
    page = figures.page_of(tmp_path / "a_figure.ipynb")
    assert not re.search(r"<script|<link|@import|(src|href)=.(https?:)?//", page) and "prefers-color-scheme: dark" in page and "<title>a figure</title>" in page
    assert page.count('class="math"') == 3 and r'alt="2/\eta"' in page and "echo $HOME$" in page and "costs $5 or $6" in page and r"<code>\undefinedword</code>" in page


def test_what_is_up_to_date_is_not_drawn_again(tmp_path, drawn):
    "Each cause by itself makes a figure out of date, and so does a file that is gone."
    home, out = tmp_path / "nbs", tmp_path / "out"
    for name in "ab": write(home, name)
    call = dict(out=out, store=tmp_path / "runs", folder=home, progress=False)
    assert [r.drawn for r in run_figures(["a"], **call)] == [True] and [r.drawn for r in run_figures(**call)] == [False, True]
    assert [(str(r)[:23], r.ok, len(r.claims)) for r in run_figures(**call)] == [("✓ a is up to date: " + str(out)[:4], True, 1), ("✓ b is up to date: " + str(out)[:4], True, 1)]
    assert dry_run(out=out, store=tmp_path / "runs", folder=home).state.tolist() == ["up to date"] * 2
    run, = Store(tmp_path / "runs").list()
    Store(tmp_path / "runs").mark(run.hash, "seen")
    assert not any(r.drawn for r in run_figures(**call))
    causes = {"notebook": lambda: write(home, "a", body="pass  # else"), "file": (out / "a" / "a.svg").unlink, "run": lambda: (run.path / "traces" / "more").write_text("x")}
    for cause, change in causes.items():
        change()
        changed = ["a", "b"] if cause == "run" else ["a"]
        assert [r.name for r in run_figures(**call) if r.drawn] == changed and not any(r.drawn for r in run_figures(**call)), cause
    assert [r.name for r in run_figures(**call, params={"seed": 1}) if r.drawn] == ["a", "b"]
    write(home, "new")
    assert [r.name for r in run_figures(**call, params={"seed": 2}, only_changed=True) if r.drawn] == ["a", "b"]
    assert [r.name for r in run_figures(**call, params={"seed": 2}, force=True) if r.drawn] == ["a", "b", "new"]


def test_runs_of_all_figures_are_one_sweep(tmp_path, drawn):
    "What two figures share is trained once, by the engine that is given; a figure whose run fails names it, and the others are drawn."
    home, jobs = tmp_path / "nbs", []
    for name in "ab": write(home, name, specs=SPECS + f"\nspecs['own'] = Spec('digits-50', 'fc-tanh:width=4', 'mse', GD(.05), 3, seed={ord(name)})")
    write(home, "c", specs=SPECS.replace("width=4", "width=0"))

    def engine(some, worker):
        jobs.extend(spec for job in some for spec in job)
        return Here()(some, worker)
    call = dict(names=["b", "a", "c"], out=tmp_path / "out", store=tmp_path / "runs", folder=home)
    planned = dry_run(**call)
    assert planned.missing.tolist() == [2, 2, 1] and planned.seconds.isna().all()
    results = run_figures(**call, progress=False, engine=engine, jobs=2)
    assert [(r.name, r.ok) for r in results] == [("b", True), ("a", True), ("c", False)] and len(jobs) == 4
    assert "run 'a': " in results[2].error and "width" in results[2].error
    write(home, "d", specs=SPECS.replace("seed=seed", "seed=5"))
    known = dry_run(**call | dict(names=["d"])).iloc[0]
    assert known.missing == 1 and known.isna().seconds                 # a run like it is known, its notebook is not


def test_notebooks_that_do_more_than_read_their_runs_come_first(tmp_path, drawn):
    home = tmp_path / "nbs"
    write(home, "a", body="runs = read_runs(specs, store)")
    write(home, "b", body="run = Store(store).run(specs['a'])")
    write(home, "c", specs="specs = {}")
    run_figures(None, tmp_path / "out", store=tmp_path / "runs", folder=home, progress=False)
    assert [name for name, _ in drawn] == ["b", "c", "a"]


SLOW = """
import time
from pathlib import Path
from gradnb.show.figures import read_runs
read_runs(specs, store)
(Path(out) / "begun").write_text("")
while not Path(NAME).exists(): time.sleep(.05)
import matplotlib.pyplot as plt
from gradnb.show.claims import save_claims
from gradnb.show.plots.traces import save_figure
save_figure(plt.figure(), out, FIGURE)
save_claims([], Path(out) / "claims.json")
"""


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_build_that_is_stopped_goes_on(tmp_path, how):
    "No kernel outlives it, nor the process that they are forked from; the same call draws what is missing, and nothing of it is trained again."
    home, gate = tmp_path / "nbs", tmp_path / "gate"
    for name in "ab": write(home, name, body=f"NAME, FIGURE = {str(gate)!r}, {name!r}\n" + SLOW)
    call = dict(out=str(tmp_path / "out"), store=str(tmp_path / "runs"), folder=str(home), progress=False, jobs=2)
    process = subprocess.Popen([sys.executable, "-c", f"from gradnb.show.build import run_figures\nrun_figures(**{call!r})"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    begun = [tmp_path / "out" / name / ".new" / "begun" for name in "ab"]
    deadline = time.monotonic() + 120
    while not all(map(Path.exists, begun)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(.1)
    children = lambda of: [p for p in Path("/proc").glob("[0-9]*") if b"ipykernel" in cmdline(p) and parent(p) == of]
    server, = children(process.pid)
    kernels = children(int(server.name))
    assert len(kernels) == 2
    os.kill(process.pid, how)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and ("KeyboardInterrupt: interrupted with 0 of 2 figures drawn; the same call goes on" in said or how == signal.SIGKILL)
    while any(b"ipykernel" in cmdline(p) for p in (server, *kernels)):
        assert time.monotonic() < deadline
        time.sleep(.1)
    gate.touch()
    run, = Store(tmp_path / "runs").list()
    stamp = (run.path / "manifest.json").stat().st_mtime_ns
    assert all(r.ok and r.drawn for r in run_figures(**call)) and (run.path / "manifest.json").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b", "claims.html", "claims.json", "index.html"]


def cmdline(p):
    with suppress(OSError): return (p / "cmdline").read_bytes()
    return b""


def parent(p):
    with suppress(OSError): return int((p / "stat").read_text().rpartition(")")[2].split()[1])


def test_missing_output_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, "silent")
    monkeypatch.setattr(build, "execute", lambda path, folder, *a: (folder / "silent.png").write_text(""))
    result, = run_figures(out=tmp_path / "out", store=tmp_path / "runs", folder=tmp_path, progress=False)
    assert not result.ok and "silent.svg" in result.error and "claims.json" in result.error


def test_interrupt_is_passed_on(tmp_path, monkeypatch):
    write(tmp_path, "one")

    def execute(*args): raise KeyboardInterrupt
    monkeypatch.setattr(build, "execute", execute)
    with pytest.raises(KeyboardInterrupt):
        run_figures(out=tmp_path / "out", store=tmp_path / "runs", folder=tmp_path, progress=False)


def test_the_memory_that_is_said_is_that_of_the_hungriest():
    "Against a process that is known to hold 0.8 GB for a moment, whatever the process holds that starts this one."
    script = ("import subprocess, sys; from gradnb.ground.memory import peak_memory; print(peak_memory());"
              "subprocess.run([sys.executable, '-c', \"x = b'x' * 800_000_000\"], check=True); print(peak_memory())")
    held = b"x" * 1_000_000_000
    before, after = map(int, subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())
    del held
    assert 5e7 < before < 7e8 and 8e8 < after < 9.5e8


@pytest.mark.parametrize("message, calls, ok", [
    ("Kernel died before replying to kernel_info", 2, True),
    ("no such file", 1, False),
])
def test_a_kernel_that_does_not_start_is_tried_once_more(tmp_path, monkeypatch, message, calls, ok):
    import papermill
    path, made = write(tmp_path, "one"), []

    def execute_notebook(source, target, *args, **kwargs):
        made.append(kwargs)
        if len(made) == 1: raise RuntimeError(message)
        Path(target).write_text(Path(source).read_text())
    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    (tmp_path / "out").mkdir()
    if ok: figures.execute(path, tmp_path / "out", {}, 60)
    else:
        with pytest.raises(RuntimeError, match=message): figures.execute(path, tmp_path / "out", {}, 60)
    assert len(made) == calls and (tmp_path / "out" / "one.html").exists() == ok


def test_everything_is_checked_before_any_work(tmp_path, drawn):
    home = tmp_path / "nbs"
    write(home, "a")
    write(home, "b", parameters=PARAMETERS.replace("seed", "start"), specs=SPECS.replace("seed=seed", "seed=start"))
    call = dict(out=tmp_path / "out", store=tmp_path / "runs", folder=home, progress=False)
    with pytest.raises(ValueError, match="figure 'b' has no parameter 'seed'.*\n.*size.*\n.*start = 0  of the weights"):
        run_figures(params={"seed": 1}, **call)
    with pytest.raises(ValueError, match="no figure 'c'.*Known: a, b"): run_figures(["a", "c"], **call)
    with pytest.raises(ValueError, match="no size 'huge'"): run_figures(size="huge", **call)
    with pytest.raises(TypeError, match="seed is declared int, got 1.5"):
        run_figures(["a"], params={"seed": "1.5"}, **call)
    assert not drawn and not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("parameters, message", [
    ("size: str = 'smoke'\nstore: str = ''", "declares no out"),
    (PARAMETERS + "\na, b = 1, 2", "nothing can be set in a, b"),
    (PARAMETERS + "\nwidth: int", "nothing can be set in width"),
    (PARAMETERS + "\nwidth: int = 'three", "is no Python"),
])
def test_a_parameters_cell_that_cannot_be_read(tmp_path, parameters, message):
    with pytest.raises(ValueError, match=message): set_parameters(write(tmp_path, "one", parameters), "smoke", {})


@pytest.mark.parametrize("kind, given, value", [
    ("str", "007", "007"), ("str", "1e-3", "1e-3"), ("str", "a b=c", "a b=c"), ("str", 3, "3"),
    ("int", "7", 7), ("float", "1e-3", 1e-3), ("float", "2", 2), ("bool", "true", True), ("bool", "False", False),
    ("None", "word", "word"), ("None", "(1, 2)", [1, 2]), ("list", "[1]", [1]),
])
def test_values_keep_their_declared_type(kind, given, value):
    got = as_declared("x", kind, given)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("kind, given", [
    ("int", "7.5"), ("int", "word"), ("int", True), ("float", "x"), ("bool", "1"), ("list", "3"),
])
def test_values_that_do_not_fit(kind, given):
    with pytest.raises(TypeError, match=f"parameter x is declared {kind}"): as_declared("x", kind, given)


@pytest.mark.parametrize("specs", ["specs = 3", "specs = {'a': 1}", "pass"])
def test_specs_cell_must_define_specs(tmp_path, specs):
    with pytest.raises(TypeError, match="must define specs"): figure_specs(write(tmp_path, "one", specs=specs), {})


# --- in print ---------------------------------------------------------------------------------------------------------

def faults(fig):
    "What an editor would send back: measured on the figure's objects, by matplotlib's own paths and boxes."
    fig.set_dpi(250)     # as it is printed
    fig.draw_without_rendering()
    found, inside, em = [], fig.bbox.padded(3), fig.dpi / 72 * 7.5
    if fig.get_size_inches()[0] not in (3.4, 7.): found.append(f"width {fig.get_size_inches()[0]}")
    shown = [t for t in fig.findobj(plt.Text) if t.get_visible() and t.get_text().strip()]
    found += [f"{t.get_text()!r} has {t.get_fontsize()} pt" for t in shown if not 7. <= t.get_fontsize() <= 9.]
    titles = [(ax._left_title, ax._left_title.get_window_extent()) for ax in fig.axes if ax.get_title("left")]
    panels = [ax for ax in fig.axes if ax.axison and not hasattr(ax, "_colorbar") and ax.get_subplotspec() is not None]
    axes = [(ax, axis) for ax in panels for axis in (ax.xaxis, ax.yaxis) if axis.get_visible()]
    labels = [(axis.label, axis.label.get_window_extent()) for _, axis in axes if axis.label.get_text()]
    whole = titles + labels + [(legend, legend.get_window_extent()) for legend in fig.legends]
    found += [f"{t} leaves the page" for t, box in whole if not (inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1)]
    found += [f"{a.get_text()!r} on {b.get_text()!r}" for i, (a, x) in enumerate(titles) for b, y in titles[:i] if x.padded(-1).overlaps(y.padded(-1))]
    for ax, axis in axes:
        low, high = sorted(axis.get_view_interval())
        ticks = [t.label1 if t.label1.get_visible() else t.label2 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
        boxes = [t.get_window_extent() for t in ticks if t.get_visible() and t.get_text()]
        span = "colspan" if axis is ax.xaxis else "rowspan"
        beside = [o for o in panels if {*getattr(o.get_subplotspec(), span)} & {*getattr(ax.get_subplotspec(), span)}]
        if not boxes: found.append(f"no tick numbers on the {axis.axis_name} axis of {ax.get_title('left')!r}")
        near = (lambda box: type(box).from_extents(box.x0 - .2 * em, box.y0, box.x1 + .2 * em, box.y1)) if axis is ax.xaxis else (lambda box: box)
        if any(near(a).overlaps(near(b)) for i, a in enumerate(boxes) for b in boxes[:i]): found.append(f"tick numbers of {ax.get_title('left')!r} run into each other")
        if ticks and re.match("[−0-9.]", ticks[0].get_text()) and not any((o.xaxis if axis is ax.xaxis else o.yaxis).label.get_text() for o in beside): found.append(f"no {axis.axis_name} label in {ax.get_title('left')!r}")
    found += [f"{t.get_text()!r} is no title in words" for t, _ in titles if re.search(r"\w=\w|_", t.get_text())]
    numbers = [(f"a tick number of {ax.get_title('left')!r}", t.get_window_extent()) for ax, axis in axes for t in axis.get_ticklabels() if t.get_visible() and t.get_text() and ax.bbox.padded(em).overlaps(t.get_window_extent())]
    words = [(t.get_text(), t.get_window_extent()) for ax in panels for t in ax.texts if t.get_visible() and t.get_text()]
    found += [f"{a!r} on {b!r}" for i, (a, x) in enumerate(words) for b, y in words[:i] if x.padded(-.1 * em).overlaps(y.padded(-.1 * em))]
    for ax in fig.axes:
        if legend := ax.get_legend():
            box = legend.get_window_extent().padded(-1)
            other = [(t.get_text(), b) for t, b in titles + labels] + numbers + words
            found += [f"the legend of {ax.get_title('left')!r} lies on {what!r}" for what, at in other if at.overlaps(box)]
            marks = [c.get_offset_transform().transform(c.get_offsets()) for c in ax.collections if len(c.get_offsets()) > 1]
            if any(box.contains(*at) for c in marks for at in c): found.append(f"the legend of {ax.get_title('left')!r} lies on marks")
            bands = [path.transformed(c.get_transform()) for c in ax.collections if isinstance(c, PolyCollection) for path in c.get_paths()]
            if any(path.intersects_bbox(box) for path in bands): found.append(f"the legend of {ax.get_title('left')!r} lies on a band")
            found += [f"the legend of {ax.get_title('left')!r} lies on {line.get_label()!r}" for line in ax.lines
                      if len(line.get_path()) > 1 and line.get_path().transformed(line.get_transform()).intersects_bbox(box, filled=False)]
    return found


@pytest.mark.parametrize("seed", [pytest.param(k, marks=[pytest.mark.slow] * (k not in (1, 4))) for k in range(6)])     # every day one of each number of rows
def test_a_figure_of_any_size_is_made_fit_for_print(seed):
    rng = np.random.default_rng(seed)
    with style():
        fig, axes = plt.subplots(1 + seed % 2, 3, figsize=(6 + 2 * seed, 4), squeeze=False)
        for i, ax in enumerate(axes.ravel()):
            for k in range(3): ax.plot(np.arange(8), rng.normal(size=8).cumsum(), label=f"a curve that is number {k}")
            ax.set(title="what is seen of a long and winding title " * (i % 3), xlabel="step", ylabel=f"a quantity of many words, whose unit is this: {i}")
            ax.legend(loc="center")
    assert save_figure(fig, "", "f") == [] and faults(fig) == []
    assert [ax.get_title("left")[:1] for ax in fig.axes] == list("abcdef")[:len(fig.axes)]
    assert all(t == int(t) for ax in fig.axes for t in ax.get_xticks())
    assert save_figure(fig, "", "f") == [] and faults(fig) == []                # once more changes nothing
    plt.close(fig)
    with style(): fig, ax = plt.subplots()
    ax.plot([1, 2])
    save_figure(fig, "", "f")
    assert fig.get_size_inches()[0] == 3.4 and ax.get_title("left") == ""
    plt.close(fig)


DAILY = "keskar_protocol", "gradient_flow", "lamb_anatomy", "what_was_published", "landscape", "optimizers_compared", "spectrum"

@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in DAILY)) for n in find_figures()])
def test_shipped_figures_are_fit_for_print(name, monkeypatch):
    "The figure of a smoke test, as its notebook leaves it; nothing warns, but training, of its loss, and where a smoke test has too few draws for an index."
    monkeypatch.setattr("IPython.display.display", lambda *a: None)
    space = {"__name__": "__main__"}
    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as said, ExitStack() as after:
        after.callback(torch.set_warn_always, False)
        warnings.simplefilter("ignore", DeprecationWarning)
        for cell in nbformat.read(find_figures()[name], as_version=4).cells:
            if cell.cell_type == "code": exec(compile(cell.source, cell.id, "exec"), space)
            if cell.id == "figure": break
    assert [text for w in said if not re.match("the loss |these draws have no tail index", text := str(w.message))] == []
    assert faults(space["fig"]) == []
    plt.close("all")


# --- claims -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, low, high, holds", [
    (1., 1., 1., True), (1., 1., 2., True), (2., 1., 2., True), (1 - 1e-12, 1., 2., False), (2 + 1e-12, 1., 2., False),
    (5., -math.inf, 3., False), (-5., -math.inf, 3., True), (5., 3., math.inf, True),
    (math.nan, -math.inf, math.inf, False), (math.inf, 0., math.inf, False), (-math.inf, -math.inf, 0., False),
])
def test_claims_hold_by_their_interval_alone_and_survive_a_file(tmp_path, value, low, high, holds):
    made = claim("x", "y", (low, high), Estimate(value, 0., value, value), note="α ≤ β")
    assert made.holds is holds
    save_claims([made], tmp_path / "c.json")
    json.loads((tmp_path / "c.json").read_text("utf-8"), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    back, = load_claims(tmp_path / "c.json")
    assert (back.text, back.source, back.expected, back.holds, back.note) == ("x", "y", (low, high), holds, "α ≤ β")
    assert back.measured.value == value or not math.isfinite(value) and math.isnan(back.measured.value)
    assert [f.name for f in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize("value, low, high, expected, said", [
    (1.5, 1., 2., (1., 2.), "holds"), (1.5, .9, 1.6, (1., 2.), "holds undecided"), (1.5, 1.4, 2.1, (1., 2.), "holds undecided"), (1.5, .9, 2.1, (1., 2.), "holds undecided"),
    (.5, .1, .9, (1., 2.), "fails"), (.5, .1, 1., (1., 2.), "fails undecided"), (.5, .1, 3., (1., 2.), "fails undecided"), (3., 2.1, 4., (1., 2.), "fails"), (3., 2., 4., (1., 2.), "fails undecided"),
    (5., 3., 9., (3., math.inf), "holds"), (5., 2.9, 9., (3., math.inf), "holds undecided"), (2., 1., 2.9, (3., math.inf), "fails"), (2., 1., 3., (3., math.inf), "fails undecided"),
    (5., 3., math.inf, (3., math.inf), "holds"), (5., 3., math.nan, (3., math.inf), "holds"), (5., 3., math.inf, (3., 1e300), "holds undecided"), (-5., -math.inf, 3., (-math.inf, 3.), "holds"),
    (2., math.nan, 2.9, (3., math.inf), "fails"), (2., math.nan, 2.9, (-1e300, 1.), "fails undecided"), (math.inf, 3., math.inf, (0., 2.), "fails"), (math.inf, 1., math.inf, (0., 2.), "fails undecided"),
    (math.nan, math.nan, math.nan, (0., 1.), "fails undecided"), (math.inf, math.inf, math.inf, (0., 1.), "fails undecided"), (math.nan, math.nan, math.nan, (-math.inf, math.inf), "fails undecided"),
    (2., 2., 2., (2., 2.), "holds"), (2., 2., 2., (0., 1.), "fails"), (2., math.nan, math.nan, (-math.inf, math.inf), "holds"), (1.5, 3., 4., (1., 2.), "holds undecided"),
])
def test_an_interval_that_reaches_over_an_end_decides_nothing(tmp_path, value, low, high, expected, said):
    "In memory, and as read from a file, which keeps no sign of what is not finite; what is not judged is not undecided."
    made = claim("x", "y", expected, Estimate(value, 1., low, high))
    save_claims([made], tmp_path / "c.json")
    for one in (made, *load_claims(tmp_path / "c.json")):
        assert " ".join(status(one)) == said and one.decided is ("undecided" not in said)
        assert measurement(one.measured) == measurement(made.measured) and "nan" not in claims_table([one])
    assert mark(made) == said.replace("holds", "✓").replace("fails", "✗").replace(" undecided", "?")
    assert ("undecided" in claims_table([made])) == ("undecided" in said) == ("undecided" in verdict([made]))
    smoke = replace(made, judged=False)
    assert status(smoke) == ("open",) and mark(smoke) == "–" and not smoke.decided


def test_undecided_verdicts_are_counted():
    undecided = [claim("x", "y", (0, high), Estimate(1., 1., -1., 3.)) for high in (2, 2, .5)]
    sure = [claim("x", "y", (0, high), 1.) for high in (1, .5)]
    assert verdict(sure) == "1 of 2 claims hold" and verdict(undecided[:2]) == "2 of 2 claims hold (2 undecided)"
    assert verdict(sure + undecided) == "3 of 5 claims hold (2 undecided), 2 fail (1 undecided)" and verdict(undecided[2:]) == "0 of 1 claims hold, 1 fail (1 undecided)"


@pytest.mark.parametrize("text", ["{}1", "3", "[3]", '{"schema": 9, "claims": []}', '{"schema": "2", "claims": []}', '{"schema": 2, "claims": {}}', '{"schema": true, "claims": []}', '[{"text": "x"}]', '{"a": 1}', "null",
                                  '[{"text":"x","source":"y","expected":[0,1],"measured":{"value":0},"holds":true}]'])
def test_a_file_that_holds_no_claims(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match="c.json holds no claims"): load_claims(tmp_path / "c.json")


def test_claims_of_any_schema_are_read(tmp_path):
    "What was written before schemas had numbers, what somebody else wrote with fields of their own, and what is written now."
    row = {"text": "x", "source": "Euler 1744", "expected": [None, 2], "measured": {"value": 1, "stderr": 0, "low": 1, "high": 1}, "holds": True}
    wanted = claim("x", "Euler 1744", (-math.inf, 2), 1.)
    for data in ([row], [row | {"note": "", "judged": True}], {"schema": 1, "claims": [row]}, {"schema": 2, "claims": [row | {"figure": "mine", "colour": "blue"}], "by": "me"}):
        (tmp_path / "c.json").write_text(json.dumps(data))
        assert load_claims(tmp_path / "c.json") == [wanted]
    save_claims([wanted], tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text("utf-8")) == {"schema": 2, "claims": [row | {"expected": [None, 2.], "note": "", "judged": True}]}


def test_claims_are_listed(tmp_path, drawn, monkeypatch, capsys):
    "A line a claim with all that is asked for, of one's own notebooks, by name, by status, and as JSON that load_claims reads; what was not made is named."
    from gradnb.cli import main
    monkeypatch.chdir(tmp_path)
    for name in "ab": write(tmp_path / "mine", name)
    run_figures(["a"], "figures", store=tmp_path / "runs", folder="mine", progress=False)
    save_claims([claim("two is one", "Nobody 1900", (1, 1), 2.), claim("few", "Nobody 1900", (1, 3), Estimate(2., 1., 0., 4.)), *load_claims("figures/a/claims.json")], "figures/a/claims.json")
    def say(*words):
        assert main(["claims", *words]) == 0
        return capsys.readouterr().out
    head, fails, unsure, holds, _, waiting = say("--folder", "mine").splitlines()
    assert waiting == "not made yet: b" and re.match("holds +a ", holds) and "one is positive [Peano 1889]" in holds
    assert all(re.search(what, fails) for what in ("^fails +a ", " 1 +2 ", r"\d s", r" 20\d\d-\d\d-\d\d \d\d:\d\d ", r"two is one \[Nobody 1900\]"))
    assert unsure.startswith("holds, undecided  a ") and "few" in say("--status", "holds") and len({line.index(" a ") for line in (fails, unsure, holds)}) == 1
    assert [line[:17] for line in say("--status", "undecided", "a").splitlines()[1:]] == ["holds, undecided "]
    few, = json.loads(say("--json", "--status", "undecided"))["claims"]
    assert few["text"] == "few" and few["decided"] is False and few["holds"] is True
    assert "two" not in say("--status", "holds") and "two" in say("a") and "spectrum" in say() and len(say("b", "--folder", "mine").splitlines()) == 3
    (tmp_path / "all.json").write_text(say("--json", "--status", "fails"))
    assert [c.text for c in load_claims(tmp_path / "all.json")] == ["two is one"]
    row, = json.loads((tmp_path / "all.json").read_text())["claims"]
    assert row["figure"] == "a" and row["seconds"] > 0 and row["drawn"][:2] == "20" and row["size"] == "default" and row["decided"] is True
    assert main(["claims", "c"]) == 2 and "no figure 'c'" in capsys.readouterr().err
    assert main(["claims", "--folder", "nowhere"]) == 2 and "nowhere" in capsys.readouterr().err
    assert main(["figures", "--folder", "mine", "--list"]) == 0 and capsys.readouterr().out == "a\nb\n"


@pytest.mark.slow
def test_a_new_figure_passes_a_smoke_test(tmp_path, monkeypatch, capsys):
    "The very line that the command says."
    from gradnb.cli import main
    monkeypatch.chdir(tmp_path)
    assert main(["new-figure", "my_own"]) == 0
    path, line = capsys.readouterr().out.splitlines()
    assert path == "mine/my_own.ipynb" and main([*line.split()[1:], "--store", "runs", "--engine", "here"]) == 0
    assert "1 claims computed, none judged" in capsys.readouterr().out and load_claims("figures/my_own/claims.json") and Path("figures/index.html").exists()
    assert main(["figures", "mine/my_own.ipynb", "--size", "smoke", "--dry-run"]) == 0 and "my_own" in capsys.readouterr().out
    assert not {"my_own", "_template"} & {*find_figures()} and main(["new-figure", "my_own"]) == 2 and "is there already" in capsys.readouterr().err


def test_table_shows_what_fails_and_why():
    claims = [claim("a long text " * 12, "s", (1, math.inf), 2.), claim("no", "s", (0, 1), 2., "too hot")]
    lines = claims_table(claims).split("\n")
    assert max(map(len, lines)) < 110
    assert lines[1].startswith("✓") and "≥ 1" in lines[1]
    assert lines[-2].startswith("✗") and "FAILS: too hot" in lines[-1]


def test_batch_means_of_independent_draws():
    "Without correlation the blocks add nothing: the textbook's standard error, up to the spread of 50 blocks."
    x = np.random.default_rng(0).standard_normal(5000)
    blocks, plain = batch_means(x, blocks=50), Estimate.mean(x)
    assert blocks.value == pytest.approx(plain.value) and .7 < blocks.stderr / plain.stderr < 1.4


# --- plots --------------------------------------------------------------------------------------------------------

def test_style_is_found_and_colours_differ():
    assert STYLE.is_file()
    assert len({tuple(c) for c in palette(8)}) == 8 and len({tuple(c) for c in palette(20)}) == 20


def test_bands_only_where_something_was_measured():
    interval = {"value": np.array([1., 2.]), "stderr": np.ones(2), "low": np.zeros(2), "high": np.full(2, 3.)}
    estimate, plain = Trace("noise", [0, 10], interval), Trace("loss", [0, 1], {"value": np.array([1., 2.])})
    wide = Trace("q", [0, 1], {"value": np.ones((2, 3))})
    eigs = Trace("sharpness", [0, 10], {"value": np.array([5., 6.]), "error": np.array([.1, .2])})
    with style(): fig, axes = plt.subplots(4)
    counts = [(len(plot_trace(ax, t)), len(ax.collections)) for ax, t in zip(axes, (estimate, plain, wide))]
    assert counts == [(1, 1), (1, 0), (3, 0)]
    plot_sharpness(axes[3], eigs, [10, 20])
    band, = axes[3].collections
    corners = band.get_paths()[0].get_extents()
    assert (corners.y0, corners.y1) == pytest.approx((5., 6.2))      # an eigenvalue lies above its Ritz value
    label_end(axes[3], 20, "2/η")
    plt.close(fig)


def test_saving_creates_folders_or_nothing(tmp_path):
    fig = plt.figure()
    assert [p.name for p in save_figure(fig, tmp_path / "a" / "b", "f")] == ["f.png", "f.svg"]
    assert "<dc:date>" not in (tmp_path / "a" / "b" / "f.svg").read_text()
    assert save_figure(fig, "", "f") == []
    plt.close(fig)


@pytest.mark.parametrize("name", [r"$\frac{$", r"a$\alpha$b", "$", "$$", r"\$x$", "a_b^c"])
def test_a_name_is_never_mathematics(tmp_path, name):
    "The picture is the same as with matplotlib told in its own words that nothing is mathematics."
    from gradnb.show.explorers.drawing import draw_panels
    from gradnb.show.explorers.series import Line, Panel
    def figure(**how):
        fig, ax = plt.subplots()
        ax.plot([1, 2], [1, 2])
        ax.set_title(name, **how)
        ax.set_xlabel(name, **how)
        ax.set_yticks([1, 2], [name, name], **how)
        return fig
    ours, theirs = figure(), figure(parse_math=False)
    save_figure(ours, tmp_path, "ours")
    save_figure(theirs, tmp_path, "theirs", math=True)
    assert (plt.imread(tmp_path / "ours.png") == plt.imread(tmp_path / "theirs.png")).all()
    draw_panels([Panel(name, [Line(np.arange(3), np.arange(3.), key=name)], ylabel=name)]).savefig(tmp_path / "panels.png")
    plt.close("all")


PLANTED = ("gradnb", "safetensors", "ipykernel_launcher", "IPython", "random", "matplotlib", "sitecustomize")


@contextmanager
def killed():
    with figures.warm_kernels() as fork:
        fork.server.kill()
        fork.server.wait()
        yield fork


@pytest.mark.parametrize("warm", [figures.warm_kernels, killed])
def test_nothing_that_lies_in_a_figures_folder_is_imported(tmp_path, monkeypatch, warm):
    "Modules, settings and templates lie in the figure's folder and in the working folder; the notebook writes into the first. Its kernel is forked, or where that fails begins as any does."
    body = "import matplotlib.pyplot as plt, gradnb, safetensors\nopen('written', 'w').write(str(plt.rcParams['lines.linewidth']))"
    path, folders = write(tmp_path, "one", body=body), (tmp_path / "out", tmp_path / "here")
    for folder in folders:
        (folder / "lab").mkdir(parents=True)
        for module in PLANTED: (folder / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        (folder / "matplotlibrc").write_text("lines.linewidth: 77")
        (folder / "lab" / "conf.json").write_text('{"base_template": "base"}')
        (folder / "lab" / "index.html.j2").write_text("{{ ''.__class__ }} a stranger's page")
    monkeypatch.chdir(folders[1])
    monkeypatch.setenv("PYTHONPATH", f"{figures.__file__.rpartition('/gradnb/')[0]}:")       # an empty entry is the working folder
    with warm() as fork: figures.execute(path, folders[0], {}, 60, fork)
    assert not (tmp_path / "ran").exists() and (folders[0] / "written").read_text() not in ("", "77.0")
    assert "stranger" not in (folders[0] / "one.html").read_text("utf-8")


def test_what_cannot_work_is_said_before_any_work(tmp_path, drawn, capsys):
    from gradnb.cli import main
    (tmp_path / "file").write_text("")
    for flags, says in ((["--device", "cuda:9"], "no device 'cuda:9'"), (["--out", str(tmp_path / "file")], "file is no folder"), (["--out", "/proc/nothing"], "nothing"),
                        (["--out", str(tmp_path / "file" / "deeper")], "file is no folder"), (["--store", str(tmp_path / "file")], "file is no folder")):
        assert main(["figures", "spectrum", "--size", "smoke", *flags]) in (1, 2)
        said = capsys.readouterr()
        assert says in said.err + said.out and "Traceback" not in said.err + said.out
    assert not drawn


def test_none_for_a_parameter_of_text_is_no_word():
    from gradnb.show.figures import as_declared
    assert as_declared("model", "str", None) is None and as_declared("model", "str", "None") == "None"


@pytest.mark.parametrize("line, kind, value, told", [
    ("model: str = 'fc:width=3'  # a model = its words", "str", "fc:width=3", "a model = its words"), ("name = 'a=b'", "None", "a=b", ""),
    ("wide: dict = {'a': 1 == 1}  # help", "dict", {"a": True}, "help"), ("width = 3  # type: int  of a layer", "int", 3, "of a layer"),
    ("grid: list = [  # not this\n    1,\n    2,\n]  # of widths", "list", [1, 2], "of widths"), ("word: 'str' = '#=#'  # \u00e9 = \u00e8", "str", "#=#", "\u00e9 = \u00e8"),
])
def test_what_a_parameters_cell_may_say(tmp_path, line, kind, value, told):
    path = write(tmp_path, "one", PARAMETERS + "\n" + line)
    name, = set(found := figures.known_parameters(path)) - {"size", "seed", "store", "out"}
    assert (found[name]["inferred_type_name"], found[name]["help"]) == (kind, told) and eval(found[name]["default"]) == value
    assert found["size"]["help"] == "how long" and found["seed"]["help"] == "of the weights"
    assert set_parameters(path, "smoke", {name: value})[name] == value


DRAW = """
import json, os
from pathlib import Path
for kind in ("png", "svg"): Path(out, "one." + kind).write_text(word)
Path(out, "claims.json").write_text("[]")
"""


@pytest.mark.slow
def test_a_notebook_without_a_kernelspec_with_a_default_that_has_an_equals_sign(tmp_path):
    path = write(tmp_path, "one", PARAMETERS + "\nword: str = 'a=b'  # = and =", body=DRAW)
    bare = nbformat.read(path, as_version=4)
    bare.metadata.clear()
    nbformat.write(bare, path)
    for given, drawn in (({}, "a=b"), ({"word": "c==d"}, "c==d")):
        result, = run_figures(out=tmp_path / "out", store=tmp_path / "runs", folder=tmp_path, progress=False, params=given)
        assert result.ok, result.error
        assert (result.folder / "one.png").read_text() == drawn


@pytest.mark.slow
@pytest.mark.parametrize("body, said", [("import time\ntime.sleep(60)", "CellTimeoutError.*longer timeout"), ("import os\nos._exit(3)", "DeadKernelError.*compiled code")])
@pytest.mark.parametrize("names", ["a", "ab"])      # the kernel of one begins as any does; those of several are forked
def test_a_cell_that_ends_badly_is_named(tmp_path, body, said, names):
    for name in names: write(tmp_path, name, body=body)
    for result in run_figures(out=tmp_path / "out", store=tmp_path / "runs", folder=tmp_path, progress=False, timeout=15):
        assert not result.ok and re.search(f"cell 'body': {said}", result.error), result.error
