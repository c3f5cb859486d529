"""Explorers in a real browser: pages by themselves, and notebooks in JupyterLab, driven as a person would.

Chromium (Debian's) and Playwright are needed; without them everything here is skipped. Screenshots go to the folder
$GRADNB_SHOTS, if that is set. Latencies are printed (pytest -s); `gradnb bench explore` compares them with their limits.
"""
import json
import os
import re
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from gradnb.bench.explore import CANVAS, CHROMIUM, FIVE, chromium, in_kernel, jupyterlab, latencies, open_notebook
from gradnb.explore.explorer import Explorer
from gradnb.explore.series import Line, Panel

pytest.importorskip("playwright", reason="playwright is not installed (pip install 'gradnb[dev]')")
if not CHROMIUM:
    pytest.skip("no chromium here (Debian: apt-get install chromium)", allow_module_level=True)

WAIT = 60_000                                              # ms: a limit for a busy machine, not an expectation


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser, request):
    "A fresh page; what its console complains about fails the test."
    errors = []
    context = browser.new_context(viewport=dict(width=1280, height=900), accept_downloads=True)
    context.set_default_timeout(WAIT)
    found = context.new_page()
    found.on("pageerror", lambda e: errors.append(e.stack or str(e)))
    found.on("console", lambda m: errors.append(m.text) if m.type == "error" and not harmless(m.text) else None)
    yield found
    if folder := os.environ.get("GRADNB_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        found.screenshot(path=Path(folder) / f"{request.node.name}.png")
    context.close()
    assert not errors, errors


def harmless(text):
    "What JupyterLab itself writes: files that it probes for."
    return "Failed to load resource" in text or "/api/" in text or "/lab/" in text


# --- pages by themselves --------------------------------------------------------------------------------------------

class Two(Explorer):
    "Two linked panels and a framed one."

    def panels(self, look):
        x = np.arange(0, 1000, 2)
        a, b = (Line(x, np.exp(-x / t), key=k) for t, k in ((200, "slow"), (50, "fast")))
        frame = lambda k: (Line(np.arange(5.), np.full(5, float(k)), key="slow", style="bars"),)
        return [Panel("loss", (a, b), ylog=True), Panel("rise", (Line(x, x / 10, key="slow"),)),
                Panel("at", linked=False, steps=np.arange(0, 1000, 100), frame=frame), Panel("none", note="nothing was measured")]


@pytest.fixture
def alone(page, tmp_path):
    "The page of an explorer, offline; every request to anywhere fails the test."
    def show(explorer):
        asked = []
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else asked.append(r.url))
        page.goto(explorer.save(tmp_path / "page.html").as_uri())
        page.wait_for_selector(f"{CANVAS}[data-loaded]")
        assert not asked, asked
        return page
    return show


def step_of(page): return int(page.locator(CANVAS).get_attribute("data-step"))


def pixels(page, panel):
    "What is drawn in a panel."
    return page.evaluate("name => document.querySelector(`[data-panel='${name}'] canvas`).toDataURL()", panel)


def reading(page, panel):
    "What stands beside a panel's title."
    return page.locator(f"[data-panel='{panel}'] .gradnb-reading").inner_text()


def test_page_follows_slider_click_and_keys(alone):
    page = alone(Two(step=500))
    assert step_of(page) == 500
    assert reading(page, "rise") == "50" and reading(page, "at") == "step 500"
    before = pixels(page, "at")
    page.locator(".gradnb-slider").focus()
    page.keyboard.press("Home")
    assert step_of(page) == 0 and reading(page, "rise") == "0" and pixels(page, "at") != before
    over = page.locator("[data-panel=rise] .u-over")
    width = over.bounding_box()["width"]
    over.click(position=dict(x=width / 2, y=30))
    assert abs(step_of(page) - 499) <= 6
    marker = page.locator("[data-panel=loss] .gradnb-marker").bounding_box()["x"] - page.locator("[data-panel=loss] .u-over").bounding_box()["x"]
    assert abs(marker - width / 2) < 4
    page.locator("[data-panel=loss] .gradnb-host").focus()
    at = step_of(page)
    page.keyboard.press("ArrowRight")
    assert step_of(page) == at + 2                         # to the next step that was measured
    page.keyboard.press("End")
    assert step_of(page) == 998
    page.get_by_role("button", name="the step follows the mouse").click()
    over.hover(position=dict(x=width / 4, y=30))
    assert abs(step_of(page) - 250) <= 12


def test_page_zooms_toggles_and_hides(alone):
    page = alone(Two())
    assert page.locator("[data-panel=none]").inner_text() == "none\nnothing was measured"
    whole = pixels(page, "rise")
    over = page.locator("[data-panel=loss] .u-over")
    over.drag_to(over, source_position=dict(x=60, y=40), target_position=dict(x=120, y=50))
    near = pixels(page, "rise")
    assert near != whole                                   # the window is shared
    over.dblclick(position=dict(x=80, y=40))
    assert pixels(page, "rise") == whole
    page.get_by_role("button", name="zoom in").click()
    assert pixels(page, "rise") != whole
    page.get_by_role("button", name="whole range").click()
    assert pixels(page, "rise") == whole
    button, before = page.get_by_role("button", name="loss: logarithmic axis"), pixels(page, "loss")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert button.get_attribute("aria-pressed") == "false" and pixels(page, "loss") != before
    fast, before = page.get_by_role("button", name="fast"), pixels(page, "loss")
    fast.click()
    assert fast.get_attribute("aria-pressed") == "false" and pixels(page, "loss") != before and pixels(page, "rise") == whole
    fast.click()
    assert pixels(page, "loss") == before
    page.get_by_role("button", name="logarithmic step axis").click()
    assert pixels(page, "rise") != whole


def test_page_steps_on_a_logarithmic_slider(alone):
    page = alone(Two(step=500))
    slider = page.locator(".gradnb-slider")
    count = int(slider.get_attribute("max"))
    page.get_by_role("button", name="slider in logarithmic steps").click()
    assert step_of(page) == 500 and int(slider.get_attribute("max")) < count
    slider.focus()
    page.keyboard.press("Home")
    seen = []
    for _ in range(12):
        seen.append(step_of(page))
        page.keyboard.press("ArrowRight")
    assert seen == sorted(set(seen)) and seen[:4] == [0, 2, 4, 6]          # no key without an effect


def test_page_plays(alone):
    page = alone(Two(step=0))
    page.get_by_role("button", name="play").click()
    page.wait_for_function(f"() => +document.querySelector('{CANVAS}').dataset.step > 20")
    page.get_by_role("button", name="play").click()
    at = step_of(page)
    page.wait_for_timeout(200)
    assert step_of(page) == at


def test_page_in_the_dark_and_narrow(alone):
    page = alone(Two())
    light = pixels(page, "rise")
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector(f"{CANVAS}.gradnb-dark")
    assert pixels(page, "rise") != light
    page.set_viewport_size(dict(width=420, height=900))
    page.wait_for_function("() => document.querySelector('[data-panel=rise]').offsetTop > document.querySelector('[data-panel=loss]').offsetTop")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_every_control_has_a_name_and_is_reached_by_tab(alone):
    page = alone(Two())
    unnamed = page.evaluate(f"""() => [...document.querySelectorAll('{CANVAS} button, {CANVAS} input, {CANVAS} [role=img]')]
        .filter((e) => e.offsetParent && !(e.getAttribute('aria-label') || e.textContent.trim())).length""")
    assert unnamed == 0
    page.locator("body").click(position=dict(x=2, y=2))
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"))
    assert {"play", "step", "zoom in", "slow", "fast"} <= reached and any(r.startswith("loss: ") for r in reached if r)


@pytest.mark.parametrize("n", [10**3, 10**6])
def test_page_draws_as_many_points_as_there_are(alone, n):
    "A spike that is one point in a million is drawn."
    y = np.zeros(n)

    class Spike(Explorer):
        def panels(self, look): return [Panel("trace", (Line(np.arange(n), y, key="run"),))]
    flat = alone(Spike()).evaluate("() => document.querySelector('canvas').toDataURL()")
    y[n // 3] = 1e-9
    page = alone(Spike())
    page.reload()
    page.wait_for_selector(f"{CANVAS}[data-loaded]")
    assert page.evaluate("() => document.querySelector('canvas').toDataURL()") != flat


# --- JupyterLab -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed (pip install 'gradnb[dev]')")
    with jupyterlab(tmp_path_factory.mktemp("lab")) as found:
        yield found


@pytest.fixture
def notebook(lab, page, request):
    "Open a notebook of these cells and run it; its page."
    def go(*cells):
        open_notebook(page, lab, re.sub(r"\W+", "_", request.node.name), cells)
        return page
    yield go
    page.evaluate("async () => { await window.jupyterapp?.shell.currentWidget?.sessionContext.shutdown(); }")


def test_lab_slider_moves_without_the_kernel(notebook):
    "A million points: every key moves the panels, also while a cell runs; the kernel hears of it when it is free."
    page = notebook(f"N = {10**6}" + FIVE, "explorer")
    for state in ("idle", "busy"):
        if state == "busy": in_kernel(page, "import time; time.sleep(6)", wait=False)
        times = latencies(page)
        assert len(times) == 20, f"only {len(times)} of 20 keys moved the step while the kernel was {state}"
        print(f"\nkernel {state}: median {median(times):.1f} ms, 95th percentile {sorted(times)[18]:.1f} ms")
    assert in_kernel(page, "print(explorer.look.step)") == str(step_of(page))
    page.wait_for_function(f"() => document.querySelector('[data-panel=noise] .gradnb-reading').textContent === `step ${{20000 * Math.floor(document.querySelector('{CANVAS}').dataset.step / 20000)}}`")

    over = page.locator("[data-panel=loss] .u-over")       # a narrow window: the kernel sends what was left out
    assert reading(page, "loss").startswith("≈")
    over.drag_to(over, source_position=dict(x=60, y=40), target_position=dict(x=64, y=50))
    page.wait_for_selector(f"{CANVAS}[data-refined='1']")
    low, high = json.loads(in_kernel(page, "print(list(explorer.look.window))"))
    assert 0 < low < high < 10**6
    page.get_by_role("button", name="code that redraws this view").click()
    page.get_by_text("lives in this session only").wait_for()


RUNS = """
import warnings; warnings.simplefilter("ignore")
from gradnb import GD, Momentum, Spec, Store
from gradnb.explore.runs import RunExplorer
store = Store("STORE")
spec = lambda rule, steps=30: Spec("digits-50", "fc-tanh:width=4", "mse", rule, steps, probes=("sharpness:every=5", "train:every=10"))
for rule in (GD(.1), GD(.2)): store.run(spec(rule), progress=False)
"""


def test_lab_run_explorer(notebook, tmp_path):
    "Its controls, one after another, on real runs; then another run that begins and goes on; then the end."
    page = notebook(RUNS.replace("STORE", str(tmp_path / "runs")), "explorer = RunExplorer(store, follow=.2, step=20); explorer")
    legend = page.locator(".gradnb-legend button")
    said = page.locator(".gradnb-said")
    assert sorted(legend.all_inner_texts()) == ["lr=0.1", "lr=0.2"]
    assert page.locator(".gradnb-panel").count() == 2 and step_of(page) == 20
    assert "threshold" in reading(page, "sharpness")

    runs, panels = (page.locator(".widget-select-multiple select").nth(i) for i in (0, 1))
    runs.select_option(label="lr=0.2")
    page.wait_for_function("() => document.querySelectorAll('.gradnb-legend button').length === 1")
    panels.select_option(["train.accuracy", "loss"])
    page.wait_for_selector("[data-panel='train.accuracy']")
    page.wait_for_selector("[data-panel=sharpness]", state="detached")
    before = pixels(page, "loss")
    smooth = page.get_by_label("smooth")
    smooth.fill("5")
    smooth.press("Enter")
    page.wait_for_function("(before) => document.querySelector('[data-panel=loss] canvas').toDataURL() !== before", arg=before)

    where = page.get_by_label("where")
    where.fill("colour=red")
    where.press("Enter")
    page.get_by_text("no run has a field 'colour'").wait_for()
    assert page.locator("[data-panel=loss] canvas").count() == 1           # what was there stays
    where.fill("rule=Momentum")
    where.press("Enter")
    page.get_by_text("meets 'rule=Momentum'").wait_for()
    assert not said.is_visible()

    in_kernel(page, "store.run(spec(Momentum(.01)), progress=False)", wait=False)       # a run comes, while the kernel is busy with it
    page.wait_for_selector("[data-panel=loss] canvas")
    page.locator(".widget-slider [role=slider]").focus()
    page.keyboard.press("End")
    page.wait_for_function(f"() => document.querySelector('{CANVAS}').dataset.step === '30'")                    # its last, once it is written

    for kind, magic in (("PNG", b"\x89PNG"), ("SVG", b"<?xml")):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"save as {kind}").click()
        assert Path(download.value.path()).read_bytes().startswith(magic)
    page.get_by_role("button", name="code that redraws this view").click()
    page.wait_for_function("() => document.querySelector('.gradnb-code').value")
    code = page.locator(".gradnb-code").input_value()
    scope = {}
    exec(code.rpartition("\n")[0], scope)
    figure = eval(code.rpartition("\n")[2], scope)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["loss", "train.accuracy"]

    light = pixels(page, "loss")
    page.evaluate("async () => { await window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' }); }")
    page.wait_for_selector(f"{CANVAS}.gradnb-dark")
    assert pixels(page, "loss") != light
    page.evaluate("async () => { await window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Light' }); }")
    page.wait_for_selector(f"{CANVAS}:not(.gradnb-dark)")
    page.set_viewport_size(dict(width=640, height=900))
    page.wait_for_function(f"() => document.querySelector('{CANVAS}').scrollWidth <= document.querySelector('{CANVAS}').clientWidth")

    in_kernel(page, "explorer.refresh(); explorer.close(); explorer.refresh()")
    assert "Error" not in in_kernel(page, "explorer.set(smooth=0.); print('fine')")


def test_lab_saved_notebook_shows_a_picture(notebook, lab, request):
    "What a front end without widgets shows."
    page = notebook("N = 100" + FIVE, "explorer")
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.context.save(); }")
    saved = json.loads(next(lab[1].glob("test_lab_saved*.ipynb")).read_text())
    data = saved["cells"][1]["outputs"][0]["data"]
    assert data["image/png"].startswith("iVBOR") and "application/vnd.jupyter.widget-view+json" in data


# --- the notebooks in nbs/explore, their explorers moved by hand ------------------------------------------------------

def press_run(page):
    "Train 30 steps in the background, then at another rate."
    last = int(step_of(page))
    steps = page.get_by_label("for steps")
    steps.fill("30")
    steps.press("Enter")
    page.get_by_role("button", name="run", exact=True).click()
    page.wait_for_function(f"(last) => +document.querySelector('{CANVAS}').dataset.step >= last + 30", arg=last)
    rule = page.get_by_label("rule")
    rule.fill("adam:lr=0.01")
    rule.press("Enter")
    page.get_by_text("the rule's state begins anew").wait_for()
    rule.fill("adm")
    rule.press("Enter")
    page.get_by_text("no rule 'adm'").wait_for()
    page.get_by_role("button", name="fork", exact=True).click()
    page.wait_for_function("() => document.querySelectorAll('.gradnb-legend button').length === 2")
    assert in_kernel(page, "print(explorer.first.step)") == str(last + 30)


def choose_method(page):
    "Another estimator, and what was computed meanwhile."
    page.get_by_label("method").select_option("dedh")
    page.wait_for_selector("[data-panel='dedh over the share of extremes']")
    page.wait_for_function(f"() => !document.querySelector('{CANVAS}').innerText.includes('computed') && !document.querySelector('{CANVAS}').innerText.includes('computing')")
    page.get_by_text("On single coordinates").wait_for()


def sort_clusters(page):
    "Another order of clusters, and another snapshot."
    before = page.locator(".gradnb-panel").first.get_attribute("data-panel")
    page.get_by_label("sort by").select_option("pull")
    page.wait_for_selector("[data-panel='largest pull']")
    assert before == "largest loss"
    shown = pixels(page, "largest pull")
    page.locator(".widget-slider [role=slider]").focus()
    page.keyboard.press("Home")
    page.wait_for_function("(before) => document.querySelector(\"[data-panel='largest pull'] canvas\").toDataURL() !== before", arg=shown)


def turn_plane(page):
    "A plane of random directions."
    before = pixels(page, "surface")
    page.get_by_label("plane").select_option("filter-normalised")
    page.wait_for_function("(before) => document.querySelector('[data-panel=surface] canvas').toDataURL() !== before", arg=before)
    assert in_kernel(page, "print(explorer.look.plane)") == "filter"


HANDS = {"live_explorer": press_run, "tail_explorer": choose_method, "cluster_explorer": sort_clusters, "landscape_explorer": turn_plane}


@pytest.mark.parametrize("name", HANDS)
def test_lab_explorers_by_hand(notebook, name):
    "Up to the cell that shows the explorer."
    cells = [c for c in json.loads((Path(__file__).parents[1] / "nbs" / "explore" / f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    end = next(i for i, c in enumerate(cells) if c["id"] == "explorer")
    page = notebook(*("".join(c["source"]) for c in cells[:end + 1]))
    HANDS[name](page)
    unnamed = page.evaluate("() => [...document.querySelectorAll('.jp-OutputArea select, .jp-OutputArea input, .jp-OutputArea button')]"
                            ".filter((e) => e.offsetParent && !(e.labels?.length || e.getAttribute('aria-label') || e.title || e.textContent.trim())).map((e) => e.outerHTML)")
    assert unnamed == []
