"""Explorers in a real browser: pages by themselves, and notebooks in JupyterLab, driven as a person would.

Chromium (Debian's) and Playwright are needed; without them everything here is skipped. Screenshots go to the folder
$GRADNB_SHOTS, if that is set. Latencies are printed (pytest -s); `gradnb bench explore` compares them with their limits.
"""
import json
import os
import re
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from gradnb.bench.explore import CANVAS, CHROMIUM, FIVE, chromium, in_kernel, jupyterlab, latencies, open_notebook
from gradnb.ground.estimate import Estimate
from gradnb.show.claims import claim, save_claims
from gradnb.show.explorers.canvas import STATIC
from gradnb.show.explorers.drawing import y_limits
from gradnb.show.explorers.explorer import Explorer
from gradnb.show.explorers.series import EDGE, Line, Panel, Picture, Words, margin
from gradnb.show.gallery import write_gallery
from gradnb.show.plots.ticks import log_ticks, tick_label

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
    found.on("pageerror", lambda e: errors.append(e.stack or str(e)) if not harmless(str(e)) else None)
    found.on("console", lambda m: errors.append(m.text) if m.type == "error" and not harmless(m.text) else None)
    yield found
    if "lab" not in request.fixturenames: shoot(found, request.node.name)
    context.close()
    assert not errors, errors


def shoot(page, name):
    "A screenshot, of what is far below too."
    if folder := os.environ.get("GRADNB_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.set_viewport_size(dict(width=page.viewport_size["width"], height=1700))
        page.wait_for_timeout(300)                         # the panels have their new widths
        page.screenshot(path=Path(folder) / f"{name}.png")


def harmless(text):
    "What JupyterLab itself writes: files that it probes for, a debugger that it loses with a kernel."
    return "Failed to load resource" in text or "/api/" in text or "/lab/" in text or "debugger state" in text or "Canceled future" in text


# --- pages by themselves --------------------------------------------------------------------------------------------

class Two(Explorer):
    "Two linked panels and a framed one."
    def about(self, look): return [["", "slow", "fast"], ["same", 1, 1], ["<img src=x onerror=alert(1)>", "</script><b>", 2.5]]

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


def filled(page, panel):
    "Wait until a plot is as wide as its panel."
    page.wait_for_function("name => { const p = document.querySelector(`[data-panel='${name}']`); return p.querySelector('canvas').clientWidth === p.clientWidth; }", arg=panel)


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
    marked = page.locator("[data-panel=loss] .gradnb-marker").evaluate_handle("e => { document.querySelector('main').style.display = 'none'; return e; }")
    page.locator(".gradnb-slider").evaluate("e => { e.value = 3; e.oninput(); }")          # the step moves while a notebook keeps what is out of sight from the layout
    assert step_of(page) == 6 and marked.evaluate("e => e.style.display") == ""


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


class Ranges(Explorer):
    "One logarithmic panel for each range."
    ranges = (.1, .2), (15, 2000), (12, 30), (1e-30, 1e10), (1000.001, 1000.002), (1e-38, 1e38), (3., 3.)

    def panels(self, look):
        x = np.arange(50)
        lines = [Line(x, np.geomspace(*r, 50), key="a") for r in self.ranges]
        return [Panel(f"{r}", (line,), ylog=True) for r, line in zip(self.ranges, lines)] + [
            Panel("mixed", (Line(x, np.where(x % 3, x * .1, -1.), key="a"),), ylog=True),
            Panel("diverged", (Line(x, np.where(x < 40, 10. ** x, np.inf), key="a"),), ylog=True),
            Panel("negative", (Line(x, -1. - x, key="a"),), ylog=True)]


TEXTS = """window.texts = []; const fill = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function (t, ...at) { texts.push(t); return fill.call(this, t, ...at); };"""


def test_logarithmic_axes_of_any_range(page, alone):
    page.add_init_script(TEXTS)
    texts = {*alone(Ranges()).evaluate("texts")}           # an error in the page fails the test
    assert {"0.12", "0.2", "30", "300", "15", "25", "1e-30", "1e10", "990", "1e-40", "1e40", "2.98", "0.5", "1e20"} <= texts


def test_both_languages_have_the_same_ticks(page):
    source = (STATIC / "canvas.js").read_text().replace("export default", "return")
    draws, cases = np.random.default_rng(0), []
    while len(cases) < 4000:
        low = 10 ** draws.uniform(-300, 300)
        high, most = low * 10 ** 10 ** draws.uniform(-9, 1.9), int(draws.integers(3, 10))
        if np.isfinite(high): cases.append((low, high, most))
    theirs = page.evaluate("""([source, cases]) => { const { logTicks, tickLabel } = new Function("uPlot", source)({});
        return cases.map((c) => logTicks(...c)).map((t) => [t, t.map(tickLabel)]); }""", [source, cases])
    for case, (ticks, labels) in zip(cases, theirs):
        ours = log_ticks(*case)
        assert ([*map(float, ticks)], labels) == (ours, [*map(tick_label, ours)]), case
        assert 0 < len(ours) <= case[2] and ours == sorted(set(ours)) and case[0] <= ours[0] and ours[-1] <= case[1], case


def test_both_languages_have_the_same_range(page):
    source = (STATIC / "canvas.js").read_text().replace("export default", "return")
    draws, cases, ours = np.random.default_rng(0), [], []
    as_is = lambda v: None if v is None else [repr(float(u)) for u in v]
    for _ in range(1500):
        xlog, ylog = map(bool, draws.integers(0, 2, 2))
        lines = []
        for _ in range(draws.integers(1, 4)):
            x = np.unique(draws.integers(0, 60, draws.integers(1, 15))).astype(float)
            y = draws.normal(size=len(x)) * 10. ** draws.integers(-3, 4)
            y[draws.random(len(x)) < .2] = draws.choice([np.nan, np.inf, -1., 0.])
            wide = np.abs(draws.normal(size=len(x))) * 10. ** draws.integers(-3, 4)
            low, high = (y - wide, y + wide) if draws.random() < .4 else (None, None)
            lines.append(Line(x, y, low, high, style=str(draws.choice(["line", "edge", "steps", "bars", "points", "dashed"]))))
        window = None if draws.random() < .4 else sorted(draws.uniform(0, 60, 2))
        cases.append([[[as_is(line.x), as_is(line.y), as_is(line.low), as_is(line.high), line.style] for line in lines], window, xlog, ylog])
        ours.append(y_limits(lines, window, xlog, ylog))
    theirs = page.evaluate("""([source, cases]) => { const { yLimits } = new Function("uPlot", source)({}), number = (v) => v && v.map((t) => +t.replace("inf", "Infinity").replace("nan", "NaN"));
        return cases.map(([lines, ...how]) => yLimits(lines.map(([x, y, low, high, style]) => ({ x: number(x), y: number(y), low: number(low), high: number(high), style })), ...how)); }""", [source, cases])
    for case, a, b in zip(cases, ours, theirs): assert b == pytest.approx(a, rel=1e-9), case


def limits(page, panel): return json.loads(page.locator(f"[data-panel='{panel}']").get_attribute("data-limits"))


class Apart(Explorer):
    "A sparse trace, one of a million points, bands and thresholds."
    window = None

    def panels(self, look):
        x, many = np.arange(0, 1000, 100), np.arange(10**6)
        around = lambda y, by: Line(x, y, y - by, y + by, key=f"by {by}")
        return [Panel("sparse", (Line(x, x * 2. + 5, key="run"),)), Panel("many", (Line(many / 1000, np.sin(many / 1e5) * 1000, key="run"),)),
                Panel("bands", (around(x * .1, 1.), around(x * .1, 2.), around(x * .1, 1000.))),
                Panel("edges", (Line(x, 1 + x * .01, key="run"), Line(x, np.full(10, 12.), key="run", style=EDGE), Line(x, np.where(x < 500, 300., 20000.), key="run", style=EDGE))),
                Panel("bands on a log axis", (Line(x, np.geomspace(1, 100, 10), np.geomspace(-1, -100, 10), np.geomspace(2, 200, 10), key="run"),), ylog=True)]


def test_a_narrow_window_shows_what_is_between_the_points(alone):
    page = alone(Apart(window=(120., 140.)))
    assert limits(page, "sparse") == [[120, 140], pytest.approx([245 - .06 * 40, 285 + .06 * 40])]       # the line that joins 205 and 405
    low, high = limits(page, "many")[1]
    assert low == pytest.approx(1000 * np.sin(1.2), abs=20) and high == pytest.approx(1000 * np.sin(1.4), abs=20)
    plain = pixels(page, "sparse")
    page.locator("[data-panel=sparse] .gradnb-host").focus()
    for _ in range(60): page.keyboard.press("+")
    left, right = limits(page, "sparse")[0]
    assert right - left == pytest.approx(1.) and pixels(page, "sparse") != plain                   # a step; the width that meets all of them
    page.keyboard.press("0")
    page.get_by_role("button", name="logarithmic step axis").click()
    assert limits(page, "sparse")[0][0] > 0
    for bad in ((5., 5.), (7., 2.), (1.,)):
        with pytest.raises(ValueError, match="is no range of steps"): Apart().set(window=bad)


def test_what_is_far_is_marked_at_the_edge(alone):
    page = alone(Apart())
    beyond = lambda panel: page.locator(f"[data-panel='{panel}']").get_attribute("data-beyond")
    low, high = limits(page, "bands")[1]
    assert -12 < low < -2 and 92 < high < 104 and beyond("bands") == "below band, above band"
    assert limits(page, "edges")[1][1] < 14 and beyond("edges") == "above 20000"
    assert limits(page, "bands on a log axis")[1][0] > .3 and beyond("bands on a log axis") == "below band" and not beyond("sparse")
    figure = Apart().figure()
    for ax, name in zip(figure.axes, ("sparse", "many", "bands", "edges", "bands on a log axis")):
        assert ax.get_ylim() == pytest.approx(limits(page, name)[1], rel=1e-4), name
        assert {line.get_marker() for line in ax.lines} - {"None", ""} == {"sparse": set(), "many": set(), "bands": {"v", "^"}, "edges": {"^"}}.get(name, {"v"})


class Errors(Explorer):
    "Eight lines with errors in two linked panels."

    def panels(self, look):
        x = np.arange(10)
        lines = [Line(x, x * 0. + i, x * 0. + i - .25, x * 0. + i + .25, key=f"run {i}") for i in range(8)]
        return [Panel("first", tuple(lines)), Panel("second", tuple(lines[:3]))]


class Gap(Explorer):
    "A quantity that is not defined at one step."
    def panels(self, look): return [Panel("edge", (Line(np.arange(3), np.array([1., np.nan, 3.]), key="run"),))]


def test_what_is_undefined_is_no_number(alone):
    page = alone(Gap(step=1))
    assert reading(page, "edge") == "–" and "NaN" not in page.locator("body").inner_text()
    for where, name in ((".gradnb-reading", "title"), (".gradnb-host", "aria-label")):
        assert "undefined: no finite value was measured" in page.locator(f"[data-panel=edge] {where}").get_attribute(name)
    page.locator(".gradnb-slider").focus()
    page.keyboard.press("End")
    assert reading(page, "edge") == "3"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_values_at_the_pointer_are_read_in_all_panels(page, alone, scheme):
    page.emulate_media(color_scheme=scheme)
    page = alone(Errors())
    page.locator("[data-panel=first] .u-over").hover(position=dict(x=100, y=50))
    read = lambda panel: page.locator(f"[data-panel={panel}] .gradnb-readout div").all_inner_texts()
    page.wait_for_function("() => document.querySelector('[data-panel=second] .gradnb-readout').textContent")
    assert read("first") == [f"run {i} {i} ± 0.25" for i in range(7, -1, -1)] and read("second") == [f"run {i} {i} ± 0.25" for i in (2, 1, 0)]
    colours = page.evaluate("""() => { const c = document.createElement("canvas").getContext("2d", { willReadFrequently: true }), rgb = (v) => { c.fillStyle = v; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data]; };
        return [...document.querySelectorAll(".gradnb-readout div, .gradnb-reading span, .gradnb-legend button, .gradnb-title")].map((e) => [rgb(getComputedStyle(document.querySelector(".gradnb-canvas")).backgroundColor), rgb(getComputedStyle(e).color)]); }""")
    light = lambda rgb: sum(w * (c / 12.92 if c <= .04045 else ((c + .055) / 1.055) ** 2.4) for w, c in zip((.2126, .7152, .0722), (v / 255 for v in rgb)))
    contrast = [(max(a, b) + .05) / (min(a, b) + .05) for a, b in ((light(back), light(ink)) for back, ink in colours)]
    assert len(contrast) > 25 and min(contrast) >= 4.5                                             # WCAG 2, level AA
    page.locator("body").hover(position=dict(x=2, y=2))
    page.wait_for_function("() => !document.querySelector('.gradnb-readout div')")


def test_a_link_restores_the_view(alone):
    page = alone(Two())
    page.locator("[data-panel=loss] .gradnb-host").focus()
    page.keyboard.press("Home")
    page.keyboard.press("+")
    page.get_by_role("button", name="fast").click()
    before = limits(page, "rise")
    linked(page)
    assert step_of(page) == 0 and limits(page, "rise") == before and page.get_by_role("button", name="fast").get_attribute("aria-pressed") == "false"


def linked(page):
    "The page anew, by its link."
    url = page.url
    assert "#" in url
    page.goto("about:blank")
    page.goto(url)
    page.wait_for_selector(f"{CANVAS}[data-loaded]")


def test_panels_and_legend_stand_as_they_are_put(alone):
    "One panel alone, another order and size, the latest steps, one line alone: by mouse and by key; the link restores them, and a figure draws them."
    page = alone(Two())
    stand = lambda: [p.get_attribute("data-panel") for p in page.locator(".gradnb-panel").all() if p.is_visible()]
    assert stand() == ["loss", "rise", "at", "none"]
    title = lambda name: page.locator(f"[data-panel={name}] .gradnb-title")
    title("loss").drag_to(title("at"))
    assert stand() == ["rise", "at", "loss", "none"]
    host = page.locator("[data-panel=rise] .gradnb-host")
    host.focus()
    page.keyboard.press("Shift+ArrowLeft")                                 # there is nothing before it
    page.keyboard.press("Shift+ArrowRight")
    assert stand() == ["at", "rise", "loss", "none"] and host.evaluate("e => e === document.activeElement")

    page.get_by_text("what is shown").click()
    assert page.locator(".gradnb-about tr").all_inner_texts() == ["\tslow\tfast", "same\t1\t1", "<img src=x onerror=alert(1)>\t</script><b>\t2.5"]
    assert page.locator(".gradnb-differs th").all_inner_texts() == ["<img src=x onerror=alert(1)>"] and page.locator(".gradnb-canvas :is(img, b)").count() == 0
    host.focus()
    size = lambda name: (box := page.locator(f"[data-panel={name}] canvas").bounding_box())["width"] * box["height"]
    usual = size("rise")
    page.keyboard.press("m")
    assert stand() == ["rise"]
    filled(page, "rise")
    assert size("rise") > 4 * usual
    page.keyboard.press("Escape")
    assert stand() == ["at", "rise", "loss", "none"]
    filled(page, "rise")
    assert size("rise") == usual
    page.get_by_role("button", name="larger panels").click()
    assert page.locator("[data-panel=rise] canvas").bounding_box()["height"] == 263

    latest = page.get_by_label("latest steps")
    latest.fill("100")
    latest.press("Enter")
    assert limits(page, "rise") == [[898, 998], pytest.approx([89.8 - .6, 99.8 + .6])]
    shown = lambda: [b.get_attribute("aria-pressed") for b in page.locator(".gradnb-legend button").all()]
    slow, fast = (page.locator(".gradnb-legend button", has_text=name) for name in ("slow", "fast"))
    fast.dblclick()
    assert shown() == ["false", "true"]
    fast.dblclick()
    assert shown() == ["true", "true"]
    slow.click(modifiers=["Shift"])
    assert shown() == ["true", "false"] and slow.evaluate("e => e === document.activeElement")
    page.keyboard.press("Shift+Enter")
    assert shown() == ["true", "true"]
    page.keyboard.press("Shift+Enter")
    large = page.get_by_role("button", name="rise: large")
    large.click()
    linked(page)
    assert stand() == ["rise"] and large.get_attribute("aria-pressed") == "true" and shown() == ["true", "false"] and limits(page, "rise")[0] == [898, 998]
    assert latest.input_value() == "100" and page.locator("[data-panel=rise] canvas").bounding_box()["height"] == 600
    large.click()
    assert stand() == ["at", "rise", "loss", "none"]
    page.get_by_role("button", name="whole range").click()
    assert latest.input_value() == "" and limits(page, "rise")[0][0] < 0

    figure = lambda **look: [ax.get_title(loc="left") for ax in Two(order=("at", "rise"), size=1.25, window=100, **look).figure().axes if ax.get_title(loc="left")]
    assert figure() == ["at", "rise", "loss", "none"] and figure(large="rise") == ["rise"] and figure(large="gone") == figure()
    near = Two(order=("at",), large="rise", size=1.25, window=100)
    assert near.figure().axes[0].get_xlim() == (898, 998) and near.figure().get_size_inches()[0] == 2.5 * 3.7 and {*near.numbers()["panel"]} == {"rise"}
    for bad in (dict(window=0), dict(size=9.)):
        with pytest.raises(ValueError, match="is no range of steps|must lie in"): near.set(**bad)


def test_a_run_keeps_its_colour_and_stays_hidden_under_another_name(alone, tmp_path):
    class Named(Explorer):
        keys = "abc"
        def names(self, look): return {k: f"run {k}" for k in self.keys}
        def panels(self, look): return [Panel("loss", tuple(Line(np.arange(9), np.arange(9.) * i, key=k) for i, k in enumerate(self.keys)))]
    explorer = Named(hidden=("b",))
    explorer.widget
    seen = lambda page: {b.inner_text(): (b.get_attribute("aria-pressed"), b.locator("i").get_attribute("style")) for b in page.locator(".gradnb-legend button").all()}
    before = seen(alone(explorer))
    assert [shown for shown, _ in before.values()] == ["true", "false", "true"] and len({style for _, style in before.values()}) == 3
    explorer.keys = "bcd"
    explorer.refresh()
    after = seen(alone(explorer))
    assert {k: after[k] for k in ("run b", "run c")} == {k: before[k] for k in ("run b", "run c")} and after["run d"][1] not in [style for _, style in before.values()]
    explorer.close()


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
    page.wait_for_timeout(200)                             # four ticks of it
    assert step_of(page) == at


class Pictures(Explorer):
    "A picture whose pixels are squares, with words above it, and a line on a picture as dark and as light as can be."
    def panels(self, look):
        tile, shades = np.zeros((4, 16, 3), dtype=np.uint8), np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 3, 2)
        frame = lambda k: (Picture(tile, (0., 1., 0., .25), square=True), margin(0., 1., 0., .5), Words([0.], [.4], ("above",)))
        return [Panel("tiles", linked=False, axes=False, steps=np.array([0]), frame=frame),
                Panel("path", (Picture(shades), Line(np.array([0., 1.]), np.array([.5, .5]), key="run")), linked=False),
                Panel("beside", (Picture(shades), Picture(shades, (1.1, 1.2, 0., 1.)), margin(0., 2., 0., 1.)), linked=False)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_are_not_squashed_and_a_line_on_them_is_seen(page, alone, scheme):
    page.emulate_media(color_scheme=scheme)
    for width in (700, 1440, 480):
        if width == 700: alone(Pictures())
        page.set_viewport_size(dict(width=width, height=900))
        filled(page, "tiles")
        (left, right), (low, high) = limits(page, "tiles")
        box = page.locator("[data-panel=tiles] .u-over").bounding_box()
        assert (right - left) / box["width"] == pytest.approx((high - low) / box["height"], rel=.02)
        assert (left, high) == (0, .5) and right >= 1 and low <= 0                          # all of it is there, the words too
    seen = page.evaluate("""() => { const c = document.querySelector('[data-panel=path] canvas'), o = document.querySelector('[data-panel=path] .u-over'), r = devicePixelRatio,
        at = o.getBoundingClientRect(), of = c.getBoundingClientRect(), y = (at.top - of.top + at.height / 2) * r;
        return [.02, .5, .98].map((s) => { const d = c.getContext('2d').getImageData((at.left - of.left + s * at.width) * r, y - 6 * r, 1, 12 * r).data;
            return [...Array(d.length / 4).keys()].map((k) => [d[4 * k], d[4 * k + 1], d[4 * k + 2]]); }); }""")
    for column in seen: assert max(contrast(a, b) for a in column for b in column) > 3, column


def test_axes_end_where_a_picture_does(page, alone):
    page.add_init_script(TEXTS)
    numbers = {float(t) for t in alone(Pictures()).evaluate("texts") if re.fullmatch(r"[0-9.]+", t)}
    assert {0., 1.} <= numbers and max(numbers) == 1. < limits(page, "beside")[0][1]                # what is beside it is its colour bar
    beside_bar = page.evaluate("""() => { const c = document.querySelector('[data-panel=beside] canvas'), o = document.querySelector('[data-panel=beside] .u-over'), r = devicePixelRatio,
        at = o.getBoundingClientRect(), of = c.getBoundingClientRect(), d = c.getContext('2d').getImageData((at.left - of.left + .65 * at.width) * r, (at.top - of.top + 2) * r, 1, (at.height - 4) * r).data;
        return new Set(Array.from({ length: d.length / 4 }, (_, k) => d.slice(4 * k, 4 * k + 4).join())).size; }""")
    assert beside_bar == 1                                                                          # and no grid
    _, _, beside = Pictures().figure().axes
    assert max(beside.get_xticks()) == 1. < beside.get_xlim()[1]


def contrast(a, b):
    "Of two colours, as WCAG 2 has it."
    light = [sum(w * (v / 12.92 if v <= .04045 else ((v + .055) / 1.055) ** 2.4) for w, v in zip((.2126, .7152, .0722), np.array(c) / 255)) + .05 for c in (a, b)]
    return max(light) / min(light)


def test_page_in_the_dark_and_narrow(alone):
    page = alone(Two())
    light = pixels(page, "rise")
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector(f"{CANVAS}.gradnb-dark")
    assert pixels(page, "rise") != light
    for width in (1440, 1000, 900):                        # as many beside each other as have 420 px
        page.set_viewport_size(dict(width=width, height=900))
        filled(page, "rise")
        assert page.locator("[data-panel=rise]").bounding_box()["width"] >= 420 and page.locator("[data-panel=rise]").bounding_box()["y"] == page.locator("[data-panel=loss]").bounding_box()["y"]
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
    shoot(page, request.node.name)
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts() == []       # a warning is a blemish
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


def test_lab_every_shared_field_goes_both_ways(notebook):
    "What a cell sets is seen in the browser; what is pressed there is read in a cell."
    page = notebook("N = 100" + FIVE, "explorer")
    key = page.locator(".gradnb-legend button").first
    pressed = "(name) => document.querySelector(`[aria-label='${name}']`).getAttribute('aria-pressed')"
    log = lambda name: page.evaluate(pressed, name)
    assert (log("logarithmic step axis"), key.get_attribute("aria-pressed")) == ("false", "true")
    whole = pixels(page, "sharpness")
    in_kernel(page, f"explorer.set(step=40, log=('step',), hidden=({key.inner_text()!r},))")
    page.wait_for_function(f"({pressed})('logarithmic step axis') === 'true'")
    page.wait_for_function(f"() => document.querySelector('{CANVAS}').dataset.step === '40'")
    assert key.get_attribute("aria-pressed") == "false"
    whole = changed(page, "sharpness", whole)
    in_kernel(page, "explorer.set(window=(10., 60.))")
    changed(page, "sharpness", whole)
    in_kernel(page, "explorer.set(window=50, order=('spectrum',), size=1.25)")
    page.wait_for_function("() => document.querySelector('.gradnb-latest').value === '50' && document.querySelector('.gradnb-panel canvas').clientHeight === 263")
    assert page.locator(".gradnb-panel").first.get_attribute("data-panel") == "spectrum"
    in_kernel(page, "explorer.set(large='loss')")
    page.locator("[data-panel=sharpness]").wait_for(state="hidden")
    in_kernel(page, "explorer.set(step=None, window=None, log=(), hidden=(), large='', order=(), size=1.)")
    page.wait_for_function(f"({pressed})('logarithmic step axis') === 'false'")
    page.wait_for_function(f"() => document.querySelector('{CANVAS}').dataset.step === '99'")
    assert key.get_attribute("aria-pressed") == "true"

    page.get_by_role("button", name="logarithmic step axis").click()
    key.click()
    page.get_by_role("button", name="smaller panels").click()
    page.locator("[data-panel=sharpness] .gradnb-host").focus()
    for pressed in ("Shift+ArrowLeft", "m", "Home", "+"): page.keyboard.press(pressed)
    page.wait_for_function(f"() => document.querySelector('{CANVAS}').dataset.step === '0'")
    read = "import json; print(json.dumps([explorer.look.step, explorer.look.log, explorer.look.hidden, explorer.look.window, explorer.look.large, explorer.look.order[:2], explorer.look.size]))"
    heard = lambda: json.loads(in_kernel(page, read))
    step, logs, hidden, window, *stand = next(look for look in iter(heard, None) if look[3])        # the kernel hears of it in its own time
    assert (step, logs, hidden) == (0, ["step"], [key.inner_text()]) and 0 < window[0] < window[1] < 99 and stand == ["sharpness", ["sharpness", "loss"], .8]
    page.keyboard.press("Escape")
    page.get_by_label("latest steps").fill("20")
    page.get_by_label("latest steps").press("Enter")
    assert next(look for look in iter(heard, None) if not look[4] and look[3] != window)[3] == 20


RUNS = """
import warnings; warnings.simplefilter("ignore")
from gradnb import GD, Momentum, Spec, Store
from gradnb.show.explorers.runs import RunExplorer
store = Store("STORE")
spec = lambda rule, steps=30: Spec("digits-50", "fc-tanh:width=4", "mse", rule, steps, probes=("sharpness:every=5", "train:every=10"))
for rule in (GD(.1), GD(.2)): store.run(spec(rule), progress=False)
"""


def test_lab_run_explorer(notebook, tmp_path, request):
    "Its controls, one after another, on real runs; then another run that begins and goes on; then the end."
    page = notebook(RUNS.replace("STORE", str(tmp_path / "runs")), "explorer = RunExplorer(store, follow=.2, step=20); explorer")
    legend = page.locator(".gradnb-legend button")
    said = page.locator(".gradnb-said")
    assert sorted(legend.all_inner_texts()) == ["lr=0.1", "lr=0.2"]
    assert page.locator(".gradnb-panel").count() == 2 and step_of(page) == 20
    assert "lr=0.2 threshold 10" in page.locator("[data-panel=sharpness] .gradnb-reading").get_attribute("title")

    panels = page.locator(".widget-select-multiple select")
    colour = page.locator(".gradnb-legend button", has_text="lr=0.2").locator("i").get_attribute("style")
    page.get_by_role("checkbox", name=re.compile("^show 0.1 ")).uncheck()
    page.wait_for_function("() => document.querySelectorAll('.gradnb-legend button').length === 1")
    assert page.locator(".gradnb-legend button i").get_attribute("style") == colour
    for says in ("which runs are listed: fields, an expression, or words", "steps in which a weight of the mean halves; 0: raw", "logarithmic axis"):
        assert page.locator(f"[title='{says}']").first.is_visible()
    panels.select_option([])
    page.get_by_text("no panel is chosen; there are loss,").wait_for()
    panels.select_option(["train.accuracy", "loss"])
    page.wait_for_selector("[data-panel='train.accuracy'] canvas")
    filled(page, "train.accuracy")
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
    said.wait_for(state="hidden")                                          # what was wrong is a message of its own, and goes with another one

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
    shoot(page, f"{request.node.name}_dark")
    page.wait_for_selector("#jupyterlab-splash", state="detached")         # JupyterLab trips over a second change before it has taken this away
    page.evaluate("async () => { await window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Light' }); }")
    page.wait_for_selector(f"{CANVAS}:not(.gradnb-dark)")
    page.wait_for_selector("#jupyterlab-splash", state="detached")
    page.set_viewport_size(dict(width=640, height=900))
    page.wait_for_function(f"() => document.querySelector('{CANVAS}').scrollWidth <= document.querySelector('{CANVAS}').clientWidth")
    shoot(page, f"{request.node.name}_half")

    for box in (panels, page.get_by_label("where")):                       # all of the list or text, not all cells of the notebook
        box.focus()
        page.keyboard.press("Control+a")
        assert page.locator(".jp-Cell.jp-mod-multiSelected").count() == 0
    assert panels.evaluate("s => [...s.options].every(o => o.selected)")
    in_kernel(page, "explorer.refresh(); explorer.close(); explorer.refresh()")
    assert "Error" not in in_kernel(page, "explorer.set(smooth=0.); print('fine')")


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory):
    "Recorded runs: two rules, twenty rates, five seeds; a tenth of them diverged in the sense of their own numbers."
    from gradnb import Store
    store = Store(tmp_path_factory.mktemp("many") / "runs")
    for rule in ("GD", "Adam"):
        for i in range(1, 21):
            for seed in range(5):
                with store.record(f"{rule} {i} {seed}", dict(rule=rule, lr=i / 100, seed=seed)) as run:
                    for k in range(4): run.log(k, {"loss": i / (k + 1) + seed / 10})
    return store


def test_lab_two_hundred_runs(notebook, two_hundred, request):
    "Chosen by a table that is sorted and searched and by filters, grouped, drawn over a field, read at the pointer; then the kernel goes."
    page = notebook("from gradnb.show.explorers.runs import RunExplorer", f"explorer = RunExplorer({str(two_hundred.root)!r}, follow=0); explorer")
    rows = page.locator(".gradnb-table tbody tr")
    counts = lambda text: page.wait_for_function("(t) => document.querySelector('.gradnb-count').textContent.includes(t)", arg=text)
    column = lambda name: [r.locator("td").nth(1 + names.index(name)).inner_text() for r in rows.all()]
    names = [t.rstrip(" ↑↓") for t in page.locator(".gradnb-table th button").all_inner_texts()]
    counts("200 of 200 runs, 4 shown")
    page.get_by_role("button", name="sort by lr").click()
    assert [*map(float, column("lr"))] == sorted(i / 100 for i in range(1, 21) for _ in range(10))
    page.get_by_role("button", name="sort by loss").click()
    page.get_by_role("button", name="sort by loss").click()
    losses = [*map(float, column("loss"))]
    assert losses == sorted(losses, reverse=True) and losses[0] == pytest.approx(20 / 4 + .4)      # the last values, as they were logged
    page.get_by_label("search runs").fill("adam 0.07")
    counts("5 of 200")
    rows.first.dblclick()
    keys(page, 1)

    tags, note = (rows.first.get_by_label(re.compile(f"^{k} of .*Adam")) for k in ("tags", "note"))      # written in the table, beside the run
    hash = rows.first.get_attribute("data-run")
    tags.fill("keep, figure 2")
    tags.press("Enter")
    page.wait_for_function("(t) => document.querySelector('.gradnb-table tbody input[type=text]').defaultValue === t", arg="keep, figure 2")
    note.fill("<b>slow</b>")
    two_hundred.mark(hash, tags="keep")                                                               # by somebody else, meanwhile
    in_kernel(page, "explorer.refresh()")
    page.wait_for_function("() => document.querySelector('.gradnb-table tbody input[type=text]').defaultValue === 'keep'")
    assert note.input_value() == "<b>slow</b>"                                                        # what is being written stays
    note.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.gradnb-table tbody input[type=text]')[1].defaultValue === '<b>slow</b>'")
    assert two_hundred.open(hash).marks == {"tags": ("keep",), "note": "<b>slow</b>"}
    page.get_by_label("search runs").fill("keep slow")
    counts("1 of 200")
    page.get_by_label("search runs").fill("")
    typed(page, "where", '"keep" in tags')
    counts("1 of 1 runs")

    typed(page, "where", 'lr > 0.18 and rule == "Adam"')
    counts("10 of 10 runs")
    typed(page, "where", "lr > ")
    page.get_by_text("is no filter").wait_for()
    typed(page, "where", "__import__('os')")
    page.get_by_text("is none of them").wait_for()
    typed(page, "where", "adam")
    counts("100 of 100")
    page.get_by_role("button", name="show all that are found").click()
    keys(page, 100)
    legend, board = page.locator(".gradnb-legend").bounding_box(), page.locator(CANVAS).bounding_box()
    assert legend["height"] < 100 and board["width"] <= 1280
    page.locator("[data-panel=loss] .u-over").hover(position=dict(x=60, y=60))
    page.wait_for_function("() => document.querySelectorAll('[data-panel=loss] .gradnb-readout div').length === 13")
    assert page.locator("[data-panel=loss] .gradnb-readout div").last.inner_text() == "… and 88 more"

    page.get_by_label("group", exact=True).select_option(label="seed")
    keys(page, 20)
    assert all("(n = 5)" in name for name in page.locator(".gradnb-legend button").all_inner_texts())
    page.locator("[data-panel=loss] .u-over").hover(position=dict(x=60, y=61))
    page.wait_for_function("() => document.querySelector('[data-panel=loss] .gradnb-readout').textContent.includes('±')")
    page.get_by_label("x axis", exact=True).select_option(label="lr")
    page.wait_for_function("() => JSON.parse(document.querySelector('[data-panel=loss]').dataset.limits)[0][1] < 1")
    (left, right), (low, high) = limits(page, "loss")
    assert left <= .01 and right >= .2 and low < .45 < 5.2 < high                                  # 1/4 + 0.2 … 20/4 + 0.2
    shoot(page, request.node.name + "_table")
    page.get_by_label("x axis", exact=True).select_option(label="parallel coordinates")
    page.wait_for_selector("[data-panel='parallel coordinates'] canvas")
    filled(page, "parallel coordinates")
    shoot(page, request.node.name + "_parallel")
    page.get_by_label("x axis", exact=True).select_option(label="step")
    page.get_by_label("group", exact=True).select_option(label="each run")
    typed(page, "where", "lr == 0.2 and seed < 2")
    counts("4 of 4")
    less = page.get_by_label("less", exact=True)
    page.wait_for_function("(select) => select.options.length === 5", arg=less.element_handle())
    base = less.locator("option").nth(3).inner_text().replace("\xa0", " ")
    less.select_option(label=base)
    page.get_by_text("what is shown").click()
    page.wait_for_function("(name) => document.querySelectorAll('.gradnb-about thead th')[1].textContent === name", arg=base)
    assert [row.partition("\t")[0] for row in page.locator(".gradnb-differs").all_inner_texts()] == ["run", "source", "rule", "seed"]
    assert len(page.locator(".gradnb-about tr").nth(1).locator("td").all_inner_texts()) == 4                # its column is the first, and no second

    in_kernel(page, "import time\nwith explorer._lock: time.sleep(3)", wait=False)                       # also where messages to widgets have a thread of their own
    less.select_option(label="nothing")
    page.locator(".gradnb-said").get_by_text("The kernel does not answer").wait_for()          # while it is busy
    page.locator(".gradnb-said").wait_for(state="hidden")                                                  # until it answers

    for kind, begin in (("CSV", b"panel,line,what,x,y,low,high"), ("HTML", b"<!doctype html>")):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"save as {kind}").click()
        assert Path(download.value.path()).read_bytes().startswith(begin)
    page.set_viewport_size(dict(width=700, height=900))
    page.wait_for_function(f"() => document.querySelector('{CANVAS}').scrollWidth <= document.querySelector('{CANVAS}').clientWidth")
    shoot(page, request.node.name + "_700")
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart(); }")
    page.get_by_role("button", name="save as PNG").click()
    page.locator(".gradnb-said").get_by_text(re.compile("The kernel (does not answer|is gone)")).wait_for()


def test_lab_saved_notebook_shows_a_picture(notebook, lab):
    "What a front end without widgets shows, and JupyterLab too once the kernel is gone."
    page = notebook("N = 100" + FIVE, "explorer")
    still = page.locator(".jp-RenderedImage img")
    assert still.count() == 1 and not still.is_visible()                  # the widget itself is there
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.context.save(); }")
    saved = json.loads(next(lab[1].glob("test_lab_saved*.ipynb")).read_text())
    widget, picture = (output["data"] for output in saved["cells"][1]["outputs"])
    assert "application/vnd.jupyter.widget-view+json" in widget and picture["image/png"].startswith("iVBOR")
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.shutdown(); }")
    page.reload()
    still.wait_for()


AGAIN = """async (times) => {
    const { content } = window.jupyterapp.shell.currentWidget;
    content.activeCellIndex = 1;
    for (let i = 0; i < times; i++) await window.jupyterapp.commands.execute("notebook:run-cell");
}"""
OPEN = "import threading, ipywidgets; print(threading.active_count(), len(ipywidgets.Widget._active_widgets if hasattr(ipywidgets.Widget, '_active_widgets') else ipywidgets.widgets.widget._instances))"


@pytest.mark.parametrize("make", [pytest.param("RunExplorer(store, follow=.2)", marks=pytest.mark.slow), "LiveExplorer(problem, Descent(GD(.1)))"])
def test_lab_cell_run_again_closes_what_it_showed(notebook, tmp_path, make):
    "Threads and widgets do not pile up, and the trainer of an explorer that is gone stops."
    page = notebook(RUNS.replace("STORE", str(tmp_path / "runs")) + """
from gradnb import Descent, LiveExplorer, Problem, build_model, load_dataset
data = load_dataset("digits-50")
problem, made = Problem(build_model("fc-tanh:width=4", data), "mse", data), []
""", f"made.append({make}); made[-1].refresh(); getattr(made[-1], 'run', int)(); made[-1]")
    page.evaluate(AGAIN, 1)
    before = in_kernel(page, OPEN)
    page.evaluate(AGAIN, 6)
    assert in_kernel(page, "print(len(made), sum(e._box is not None for e in made), sum(getattr(e, 'running', False) for e in made[:-1]))") == "8 1 0"
    assert in_kernel(page, OPEN) == before


# --- the notebooks in nbs/explore, their explorers moved by hand ------------------------------------------------------

def slider(page, name):
    "The handle of a slider by its label."
    return page.locator(".widget-slider", has=page.get_by_text(name, exact=True)).locator("[role=slider]")


def typed(page, label, value):
    "Write into a field."
    field = page.locator(".jupyter-widgets").get_by_label(label, exact=True)
    field.fill(value)
    field.press("Enter")


def keys(page, count):
    "Wait until the legend has so many entries."
    page.wait_for_function("(n) => document.querySelectorAll('.gradnb-legend button').length === n", arg=count)


def changed(page, panel, before):
    "Wait until a panel is drawn otherwise; how."
    page.wait_for_function("([name, before]) => document.querySelector(`[data-panel='${name}'] canvas`).toDataURL() !== before", arg=[panel, before])
    return pixels(page, panel)


def beyond(page, step):
    "Wait until the marker, at the end, has gone this far."
    page.wait_for_function(f"(step) => +document.querySelector('{CANVAS}').dataset.step >= step", arg=step)


def read_runs(page):
    "Every panel that there should be, at the first step; then by itself."
    names = [p.get_attribute("data-panel") for p in page.locator(".gradnb-panel").all()]
    assert names == ["loss", "preconditioned_sharpness", "tail_index", "grad_variance", "spectrum", "histogram: noise_norms.norms", "quantiles: noise_norms.norms"]
    drawn = {name: pixels(page, name) for name in names}
    assert len({*drawn.values()}) == len(names)
    for name, beside in zip(names[1:3], ("threshold", "Gaussian")):
        assert page.locator(f"[data-panel='{name}'] .gradnb-reading").get_attribute("title").count(beside) == 3       # of each run
    slider(page, "step").focus()
    page.keyboard.press("Home")
    for name in names[4:]:
        changed(page, name, drawn[name])
        assert reading(page, name) == "step 0"
    play = page.get_by_role("button", name="play")
    play.click()
    beyond(page, 3)
    play.click()
    at = step_of(page)
    page.get_by_role("button", name="slider in logarithmic steps").click()
    slider(page, "step").press("ArrowRight")
    page.wait_for_function(f"(at) => +document.querySelector('{CANVAS}').dataset.step > at", arg=at)
    page.locator(".gradnb-legend button").first.click()
    changed(page, "loss", drawn["loss"])


def press_run(page):
    "Train in the background, change everything, go on, fork, and let flows go beside it; then an interrupt."
    last, going = step_of(page), page.get_by_title("train in the background")
    typed(page, "for steps", "30")
    going.click()
    beyond(page, last + 30)
    page.get_by_role("button", name="one step").click()
    beyond(page, last + 31)
    slider(page, "lr").press("PageUp")
    page.wait_for_selector("[data-panel='learning rate']")
    lr = page.locator(".widget-slider", has=page.get_by_text("lr", exact=True))
    page.wait_for_function("(said) => [...document.querySelectorAll('.widget-slider [role=slider]')].some((e) => e.getAttribute('aria-valuetext') === said)", arg=lr.locator(".widget-readout").inner_text())
    assert re.fullmatch(r"0?\.\d{1,4}|\d\.?\d{0,2}", in_kernel(page, "print(explorer.first.stepper.rule.lr)"))          # no more digits than are seen
    for name, count in (("gradient flow", 2), ("central flow", 3), ("fork", 4)):
        page.get_by_label("trajectory", exact=True).select_option("run")
        page.get_by_role("button", name=name, exact=True).click()
        keys(page, count)
    page.get_by_role("button", name="drop").click()
    keys(page, 3)
    page.get_by_label("trajectory", exact=True).select_option(f"gradient flow at {last + 31}")
    page.get_by_role("button", name="central flow", exact=True).click()
    page.get_by_text("has no rule whose oscillations").wait_for()
    page.get_by_role("button", name="one step").click()
    page.wait_for_selector("[data-panel=distance]")
    page.get_by_label("trajectory", exact=True).select_option("run")
    typed(page, "estimator", "minibatch:size=20")
    page.wait_for_function("() => [...document.querySelectorAll('.jupyter-widgets input')].some((e) => e.value === 'minibatch:size=20') && !document.querySelector('.jupyter-widgets input:disabled')")
    typed(page, "batch", "30")
    page.wait_for_function("() => [...document.querySelectorAll('.jupyter-widgets input')].some((e) => e.value === 'minibatch:size=30')")
    typed(page, "rule", "adam:lr=0.01")
    page.get_by_text("the rule's state begins anew").wait_for()
    typed(page, "rule", "adm")
    page.get_by_text("no rule 'adm'").wait_for()
    before = pixels(page, "loss")
    typed(page, "smooth", "5")
    changed(page, "loss", before)
    assert in_kernel(page, "print(explorer.first.step, explorer.first.stepper.estimator.size)") == f"{last + 32} 30"

    in_kernel(page, "explorer.drop('gradient flow at %d'); explorer.drop('central flow at %d')" % (last + 31, last + 31))
    keys(page, 1)
    typed(page, "for steps", "1000000")
    going.click()
    beyond(page, last + 40)
    assert in_kernel(page, "explorer.set(window=20); print(explorer.running)") == "True"                   # the kernel answers while it trains
    beyond(page, last + 80)
    page.wait_for_function("() => { const [[left, right]] = JSON.parse(document.querySelector('[data-panel=loss]').dataset.limits); return right - left === 20 && right > 60; }")      # the newest
    going.click()
    page.wait_for_function("() => document.querySelector('.widget-toggle-button').textContent === 'run'")
    for _ in range(50):                                                           # the step that it is at is finished first
        if (going_on := in_kernel(page, "print(explorer.running)")) == "False": break
        time.sleep(.2)
    assert going_on == "False"
    at = step_of(page)
    in_kernel(page, "explorer.advance(10**6)", wait=False)
    beyond(page, at + 5)                                                            # it is drawn while the cell runs
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt(); }")
    assert in_kernel(page, "print(explorer.running, len(explorer.first.traces['loss']) == explorer.first.step + 1)") == "False True"


def choose_method(page):
    "Another estimator, length and share, and what was computed meanwhile."
    said = page.locator("[data-panel=verdict] .gradnb-note")
    assert not slider(page, "step").is_visible() and not page.get_by_role("button", name="play").is_visible()      # there are no steps
    page.get_by_label("method", exact=True).select_option("dedh")
    page.wait_for_selector("[data-panel='dedh over the share of extremes']")
    said.get_by_text("dedh, m = 1, k = 2.00%").wait_for()
    slider(page, "k").press("PageUp")
    said.get_by_text(re.compile("dedh, m = 1, k = (?!2.00)")).wait_for()
    slider(page, "m").press("PageUp")
    said.get_by_text(re.compile("dedh, m = (?!1,)")).wait_for()
    page.wait_for_function(f"() => !/computed …|computing/.test(document.querySelector('{CANVAS}').innerText)")
    said.get_by_text("On single coordinates").wait_for()


def sort_clusters(page):
    "Another order of clusters, fewer, with other pictures, and another snapshot."
    assert page.locator(".gradnb-panel").first.get_attribute("data-panel") == "largest loss"
    page.get_by_label("sort by").select_option("pull")
    page.wait_for_selector("[data-panel='largest pull']")
    typed(page, "clusters", "2")
    page.wait_for_selector("[data-panel='3. largest pull']", state="detached")
    filled(page, "largest pull")
    before = pixels(page, "largest pull")
    typed(page, "pictures", "8")
    before = changed(page, "largest pull", before)
    slider(page, "step").press("Home")
    changed(page, "largest pull", before)


def turn_plane(page):
    "A plane of random directions, another one, coarser and wider."
    before = pixels(page, "surface")
    page.get_by_label("plane", exact=True).select_option("filter-normalised")
    before = changed(page, "surface", before)
    for name, value in (("draw", "1"), ("points", "5")):
        typed(page, name, value)
        before = changed(page, "surface", before)
    slider(page, "span").press("PageUp")
    before = changed(page, "surface", before)
    slider(page, "step").press("Home")
    assert step_of(page) == 0
    assert in_kernel(page, "print(explorer.look.plane, explorer.look.draw, explorer.look.points)") == "filter 1 5"


HANDS = {"run_explorer": read_runs, "live_explorer": press_run, "tail_explorer": choose_method, "cluster_explorer": sort_clusters, "landscape_explorer": turn_plane}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("run_explorer", "live_explorer"))) for n in HANDS])
def test_lab_explorers_by_hand(notebook, name):
    "Up to the cell that shows the explorer."
    cells = [c for c in json.loads((Path(__file__).parents[1] / "nbs" / "explore" / f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    end = next(i for i, c in enumerate(cells) if c["id"] == "explorer")
    page = notebook(*("".join(c["source"]) for c in cells[:end + 1]))
    HANDS[name](page)
    unnamed = page.evaluate("() => [...document.querySelectorAll('.jp-OutputArea select, .jp-OutputArea input, .jp-OutputArea button')]"
                            ".filter((e) => e.offsetParent && !(e.labels?.length || e.getAttribute('aria-label') || e.title || e.textContent.trim())).map((e) => e.outerHTML)")
    assert unnamed == []


def test_the_gallery_needs_nobody(tmp_path, browser):
    "From disk and without a network: figures are found, chosen by study, and ordered; every link leads to a file."
    made = dict(title="One", question="Does it?", params={}, runs={}, seeds=[0], seconds=1.0, devices=["cpu"], versions={}, drawn="2026-01-01")
    claims = {"one": [claim("one is two", "Cohen et al. 2021, §3", (2, 2), 1.0, note="it is not")], "two": [claim("two is two", "Faghri et al. 2020", (2, 2), 2.0), claim("few", "Faghri et al. 2020", (1, 3), Estimate(2.0, 1.0, 0.0, 4.0))]}
    for seconds, name in enumerate(claims):
        (tmp_path / name).mkdir()
        for kind in ("png", "svg", "ipynb", "html"): (tmp_path / name / f"{name}.{kind}").touch()
        save_claims(claims[name], tmp_path / name / "claims.json")
        (tmp_path / name / "made.json").write_text(json.dumps(made | dict(title=name.title(), seconds=seconds)))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "made.json").write_text("{")
    at = write_gallery(tmp_path)
    context = browser.new_context(offline=True)
    page, asked = context.new_page(), []
    page.on("request", lambda r: asked.append(r.url))
    page.goto(at.as_uri())
    shown = lambda: page.locator("article:not([hidden]) h2").all_text_contents()
    assert shown() == ["One", "Two"] and "2 of 3 claims hold (1 undecided)" in page.locator("header").inner_text()
    assert page.locator("article li").all_text_contents() == ["one is two: 1, expected 2; it is not"]
    page.get_by_label("Order").select_option("longest first")
    assert shown() == ["Two", "One"]
    page.get_by_label("Study").select_option("Cohen et al. 2021")
    assert shown() == ["One"]
    page.get_by_label("Find").fill("two")
    assert shown() == ["One"]
    page.get_by_label("Find").fill("faghri")
    assert shown() == []
    links = lambda: page.eval_on_selector_all("a", "all => all.map(a => a.getAttribute('href'))")
    assert all((tmp_path / link).exists() for link in links())
    page.get_by_role("link", name="Claims", exact=True).click()
    rows = lambda: [row.split("\t")[:2] for row in page.locator("tbody tr:not([hidden])").all_inner_texts()]
    assert rows() == [["✗", "one"], ["✓", "two"], ["✓?", "two"]] and page.get_by_text("undecided (?)").is_visible() and all((tmp_path / link).exists() for link in links())
    page.get_by_label("Verdict").select_option("fails")
    assert rows() == [["✗", "one"]]
    for word, marks in (("undecided", ["✓?"]), ("holds", ["✓", "✓?"]), ("all", ["✗", "✓", "✓?"])):
        page.get_by_label("Verdict").select_option(word)
        assert [mark for mark, _ in rows()] == marks
    page.get_by_label("Study").select_option("Faghri et al. 2020")
    assert rows() == [["✓", "two"], ["✓?", "two"]]
    assert asked and all(url.startswith("file:") for url in asked)
    context.close()
