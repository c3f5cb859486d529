"What is released runs without the clone: the wheel that is built from the source distribution."
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    "A folder with the two files that would be published."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("released")
    for file in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"): shutil.copy(ROOT / file, source)
    for folder in ("gradnb", "nbs/figures"): shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_wheel_holds_what_runs_and_nothing_else(released):
    wheel, = released.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        about = message_from_bytes(file.read(next(n for n in names if n.endswith("METADATA"))))
    wanted = {path.relative_to(ROOT).as_posix() for kind in ("*.py", "*.js", "*.css", "*.mplstyle", "*.LICENSE") for path in (ROOT / "gradnb").rglob(kind)}
    figures = {f"gradnb/figure_notebooks/{path.name}" for path in (ROOT / "nbs" / "figures").glob("*.ipynb")}
    assert {n for n in names if ".dist-info/" not in n} == wanted | figures
    assert {"3.11", "3.12", "3.13"} <= {c.rpartition(" ")[2] for c in about.get_all("Classifier")} and about["License-Expression"] == "Apache-2.0"
    assert {line.partition(",")[0] for line in about.get_all("Project-URL")} == {"Source", "Documentation", "Changelog", "Issues"}
    assert not [r for r in about.get_all("Requires-Dist") if "nbdev" in r and "extra" not in r]


def test_the_source_distribution_builds_by_itself(released):
    source, = released.glob("*.tar.gz")
    with tarfile.open(source) as file: names = {name.partition("/")[2] for name in file.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "nbs/figures/spectrum.ipynb"} <= names


def test_it_draws_a_figure_where_there_is_no_clone(released, tmp_path):
    wheel, = released.glob("*.whl")
    with zipfile.ZipFile(wheel) as file: file.extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "GRADNB_STORE": str(tmp_path / "runs")}
    def say(*words): return subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert Path(say("-c", "import gradnb; print(gradnb.__file__)").stdout.strip()).is_relative_to(tmp_path / "site")
    done = say("-m", "gradnb", "figures", "spectrum", "--size", "smoke", "--engine", "here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"index.html", "claims.html", "claims.json", "spectrum"} == {path.name for path in (tmp_path / "figures").iterdir()}


# --- what the workflow says ---------------------------------------------------------------------------------------

JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8"))["jobs"]
STEPS = [(name, step) for name, job in JOBS.items() for step in job["steps"]]


def test_every_command_of_the_workflow_can_be_read_and_names_what_is_there():
    extras = set(re.findall(r"^(\w+)_requirements", (ROOT / "settings.ini").read_text("utf-8"), re.MULTILINE))
    for name, step in STEPS:
        script = re.sub(r"\$\{\{.*?\}\}", "x", step.get("run", ""))
        assert not subprocess.run(["bash", "-n", "-c", script], capture_output=True, check=False).returncode, script
        assert all((ROOT / path).exists() for path in re.findall(r"(?<![\w/])(?:\.ci|tests)/[\w./]+", script)), script
        assert set(re.findall(r"\.\[(\w+)\]", script)) <= extras and re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1")), (name, step)
    assert all({"runs-on", "steps"} <= job.keys() and set(job.get("needs", ())) <= JOBS.keys() for job in JOBS.values())


def test_the_site_that_is_published_is_the_one_that_is_built():
    uploaded, = (step["with"]["path"] for name, step in STEPS if name == "site" and "upload-pages-artifact" in step.get("uses", ""))
    assert f'"{Path(uploaded).parent.name}"' in (ROOT / ".ci" / "site.py").read_text("utf-8") and uploaded == "_proc/site/html"
    assert JOBS["pages"]["permissions"] == {"pages": "write", "id-token": "write"} and JOBS["pages"]["if"] == "github.ref == 'refs/heads/main'"
    assert {*JOBS["pages"]["needs"]} == JOBS.keys() - {"pages"} and JOBS["pages"]["environment"]["name"] == "github-pages"


def test_the_pages_of_explorers_need_no_more_than_the_site_extra():
    "Their cells are run where the site is built, which has no development extra."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    there = {re.split(r"[<>=!~\[]", word)[0].replace("-", "_") for key in ("requirements", "site_requirements") for word in config["DEFAULT"][key].split()}
    cells = [cell for path in (ROOT / "nbs" / "explore").glob("*.ipynb") for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    roots = set(re.findall(r"^(?:from|import) (\w+)", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE))
    assert "fastcore" in roots and roots - sys.stdlib_module_names - {"gradnb"} <= there
