"The site: what it says of a signature, which links it finds broken, and the whole of it in a browser without a network."
import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gradnb.bench.explore import CHROMIUM, chromium
from gradnb.runs import spec

ROOT = Path(__file__).resolve().parents[1]
described = importlib.util.spec_from_file_location("gradnb_site", ROOT / ".ci" / "site.py")
site = importlib.util.module_from_spec(described)
described.loader.exec_module(site)
PACKAGES = site.modules()


# --- the reference ------------------------------------------------------------------------------------------------

def test_every_public_name_has_an_entry():
    for package, members in PACKAGES.items():
        for module in members:
            text = re.search(r"^__all__ = (\[.*?\])", (ROOT / module.name.replace(".", "/")).with_suffix(".py").read_text("utf-8"), re.MULTILINE | re.DOTALL)
            wanted = ast.literal_eval(text[1])
            page = site.reference(package, [module])
            assert set(wanted) == set(re.findall(r"^:{6}\{py:(?:function|class|data)\} (\w+)", page, re.MULTILINE)), module.name


@pytest.mark.parametrize("package", sorted(set(PACKAGES) - {"gradnb.bench", "gradnb.integrations", "gradnb.show.explorers"}))      # slow to import
def test_signatures_are_those_of_the_functions(package):
    "Against `inspect`, which imports what the site only reads."
    for module in PACKAGES[package]:
        real = importlib.import_module(module.name)
        for name, node in module.public.items():
            if not isinstance(node, ast.FunctionDef):
                continue
            text, function = "\n".join(module.entry(name, node)), inspect.unwrap(getattr(real, name))
            said = ast.parse(f"def {re.search(rf'^:+{{py:function}} (.*)', text, re.MULTILINE)[1]}: 0").body[0].args
            if inspect.isfunction(function):
                assert [a.arg for a in site.every_arg(said)] == [*inspect.signature(function).parameters], (module.name, name)
                assert (function.__doc__ or "").split("`")[0].split("\n")[0].strip() in text.replace("\\", ""), (module.name, name)


def test_comments_beside_parameters_are_said():
    module = next(m for m in PACKAGES["gradnb.measure"] if m.name.endswith("curvature"))
    text = "\n".join(module.entry("sharpness", module.public["sharpness"]))
    assert ":param k: how many of the largest eigenvalues" in text and ":returns: values (k,), the outermost first" in text
    assert 'href="../07_measure/02_curvature.html#cell-sharpness"' in text


def test_fields_of_a_spec_are_said():
    module = next(m for m in PACKAGES["gradnb.runs"] if m.name.endswith(".spec"))
    text = "\n".join(module.entry("Spec", module.public["Spec"]))
    assert all(f":param {name}:" in text or f"{name}:" in text for name in spec.Spec.__dataclass_fields__ if name[0] != "_")


# --- notebooks ----------------------------------------------------------------------------------------------------

def cells(*given):
    return [cell for one in given for cell in site.shown(dict(id="a", metadata={}, outputs=[]) | one, {"sharpness": "gradnb.measure.curvature.sharpness"})]


def test_directives_hidden_and_long_cells():
    code = lambda text, **more: dict(cell_type="code", source=text, **more)
    assert cells(code("#| hide\nx = 1"), code("#| default_exp a.b\n")) == []
    one, = cells(code("#| export\nx = 1\n"))
    assert one["source"] == "x = 1" and one["metadata"] == {"anchor": "cell-a"}
    long, = cells(code("\n".join(["x = 1"] * 30)))
    assert long["metadata"]["tags"] == ["hide-input"] and "30" in long["metadata"]["mystnb"]["code_prompt_show"]
    table = [{"data": {"text/markdown": ["| a |\n", "|---|"]}, "output_type": "display_data", "metadata": {}}]
    assert [c["cell_type"] for c in cells(code("show()", outputs=table))] == ["code", "markdown"]
    assert [c["source"] for c in cells(code("#| echo: false\nshow()", outputs=table))] == ["| a |\n|---|"]


def test_names_in_prose_are_links_and_code_is_not():
    text = lambda source: cells(dict(cell_type="markdown", source=source))[0]["source"]
    link = "{py:obj}`sharpness <gradnb.measure.curvature.sharpness>`"
    assert text("the `sharpness`, `gn.sharpness`, `sharpnes`") == f"the {link}, {link}, `sharpnes`".replace("gn.", "")
    for kept in ("```python\n`sharpness`\n```", "# `sharpness`", "[`sharpness`](a.ipynb)", "``sharpness``"):
        assert text(kept) == kept
    assert text("[it](../../SECURITY.md)") == "[it](/security.md)"


# --- links --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page, wrong", [
    ('<a href="b.html#here">', ""), ('<a href="https://example.org">', ""), ('<img src="data:image/png;base64,">', ""), ('<a href="#top"><p id="top">', ""),
    ('<a href="c.html">', "no such file"), ('<a href="b.html#there">', "no such place"), ('<a href="../out.html">', "no such file"), ('<a href="sub">', "no such file"),
    ('<script src="https://example.org/a.js">', "fetches"), ('<link href="//example.org/a.css" rel="stylesheet">', "fetches"), ('<img src="a.png">', "no such file"),
    ('<a href="#nowhere">', "no such place"), ('<iframe src="http://example.org">', "fetches"),
])
def test_what_a_link_may_be(tmp_path, page, wrong):
    (tmp_path / "site" / "sub").mkdir(parents=True)
    (tmp_path / "out.html").touch()
    (tmp_path / "site" / "a.html").write_text(page)
    (tmp_path / "site" / "b.html").write_text('<p id="here">')
    said = site.broken_links(tmp_path / "site")
    assert [wrong in line for line in said] == [True] * bool(wrong), said


def test_a_style_that_fetches_is_found(tmp_path):
    (tmp_path / "a.css").write_text('@import "https://example.org/b.css"; p { background: url(//example.org/c.png) } q { background: url(data:x) }')
    assert len(site.broken_links(tmp_path)) == 2


def test_without_sphinx_the_remedy_is_said(tmp_path):
    (tmp_path / "sphinx.py").write_text("raise ModuleNotFoundError(\"No module named 'sphinx'\", name='sphinx')")
    done = subprocess.run([sys.executable, ROOT / ".ci" / "site.py", "--out", tmp_path / "out"], env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pip install -e '.[site]'" in done.stderr and "Traceback" not in done.stderr


# --- all of it ----------------------------------------------------------------------------------------------------

class Text(HTMLParser):
    "The text of a page, without its markup."

    def __init__(self, page):
        super().__init__()
        self.words = []
        self.feed(page.read_text("utf-8"))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def built():
    "The site, as the one command builds it; what is up to date is not built again."
    for package in ("sphinx", "myst_nb", "furo", "latex2mathml", "sphinx_copybutton"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install 'gradnb[site]')")
    done = subprocess.run([sys.executable, ROOT / ".ci" / "site.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return site.SITE / "html"


@pytest.mark.slow
def test_every_notebook_is_a_page_with_its_words(built):
    for path in site.notebooks():
        text = "".join(Text((built / path.relative_to(site.NBS)).with_suffix(".html")).words)
        assert site.heading(path)[0].split("`")[0].split("$")[0] in text, path
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            if cell["cell_type"] == "code" and "#| export" in (source := site.text_of(cell)):
                assert "".join(source.partition("\n")[2].split()) in "".join(text.split()), (path, cell["id"])


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (Debian: apt-get install chromium)")
def test_it_is_read_without_a_network(built):
    "From disk, offline: no page asks for anything elsewhere, equations have a height, search finds, explorers are alive."
    pytest.importorskip("playwright", reason="playwright is not installed (pip install 'gradnb[dev]')")
    with chromium() as browser:
        context = browser.new_context(offline=True)
        page, asked, errors = context.new_page(), [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        for name in ("index", "tour", "07_measure/index", "api/gradnb.measure", "figures/index", "explore/index", "essays/index", "changelog", "genindex"):
            page.goto((built / f"{name}.html").as_uri())
            assert page.locator("h1").count() and page.locator(".sidebar-tree a").count() > 15
        page.goto((built / "02_linalg" / "06_krylov.html").as_uri())
        assert page.locator("math").count() > 20 and page.locator("math").first.bounding_box()["height"] > 8
        folded = page.locator("details.hide").first
        assert not folded.locator("pre").is_visible()
        folded.locator("summary").click()
        assert folded.locator("pre").is_visible()
        page.get_by_label("Search").first.fill("sharpness")
        page.keyboard.press("Enter")
        page.locator("ul.search a").first.wait_for()
        assert "gradnb.measure.curvature.sharpness" in page.locator("ul.search a").first.inner_text()
        page.locator("ul.search a").first.click()
        page.wait_for_url("**/api/gradnb.measure.html*")
        for explorer in sorted((built / "pages").glob("*.html")):
            page.goto(explorer.as_uri())
            page.locator(".gradnb-canvas canvas").first.wait_for()
        context.close()
    assert not errors, errors
    assert len(asked) > 20 and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
