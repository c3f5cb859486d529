"""Every module imports, whichever folder comes first, and `import gradnb` stays light.

The modules of a folder are imported last first in a child of their own, forked from one process that holds what takes
long to load, and nothing of gradnb. So a name that a notebook forgot to export shows up, and an import cycle between
folders; within a folder `test_imports_point_down` allows none.
"""
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import gradnb

ROOT = Path(__file__).resolve().parents[1]
FILES = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "gradnb").rglob("*.py"))]
MODULES = [".".join(path.parts).removesuffix(".__init__") for path in FILES if path.name != "_modidx"]

IMPORT_EACH = """
import importlib, json, os, sys, traceback
import pandas, scipy.stats, scipy.optimize, scipy.sparse.linalg, sklearn.datasets
import matplotlib.pyplot, seaborn, ipywidgets, nbclient, papermill, torch._dynamo, torchvision
for names in sys.argv[1:]:
    end, start = os.pipe()
    if os.fork() == 0:
        with open(start, "w") as pipe:
            for name in names.split():
                try:
                    importlib.import_module(name)
                    said = ""
                except BaseException:
                    said = traceback.format_exc()
                print(json.dumps([name, said]), file=pipe, flush=True)
        os._exit(0)
    os.close(start)
    with open(end) as pipe:
        print(pipe.read(), end="")
    os.wait()
"""

LIGHT = """
import sys
import gradnb, gradnb.cli.command
print(*sorted({"torch", "numpy", "pandas", "matplotlib", "scipy"} & set(sys.modules)))
"""

RESOLVE = """
import json, traceback, types
import gradnb
first, failed = {}, {}
for name in gradnb.__all__:
    try:
        first[name] = getattr(gradnb, name)
    except Exception:
        failed[name] = traceback.format_exc()
for name, value in first.items():
    if isinstance(value, types.ModuleType) != (name == "optim") or getattr(gradnb, name) is not value:
        failed[name] = f"gradnb.{name} is {value!r} at first and {getattr(gradnb, name)!r} once modules are loaded"
print(json.dumps(failed))
"""


def python(code, *args):
    "What `code` prints in a fresh interpreter that finds this checkout of gradnb."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracebacks():
    "Module name → the traceback of its import, empty when it went well."
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    folders = defaultdict(list)
    for module in reversed(MODULES):
        folders[module.rpartition(".")[0]].append(module)
    return dict(map(json.loads, python(IMPORT_EACH, *map(" ".join, folders.values())).splitlines()))


@pytest.mark.parametrize("module", MODULES)
def test_imports(module, tracebacks):
    said = tracebacks.get(module, "the import ended the process")
    assert not said, said


def test_import_gradnb_is_light():
    assert python(LIGHT).split() == []


def test_public_names_resolve():
    failed = json.loads(python(RESOLVE))
    assert not failed, "\n".join(failed.values())


def test_public_names_have_one_home():
    names = [name for names in gradnb._NAMES.values() for name in names]
    assert sorted(names) == sorted(gradnb.__all__)
