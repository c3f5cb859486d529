"""The house is as its plan says: folders, imports that point down, wings apart, one notebook for one module.

A notebook's floor is the numbers along its path: nbs/06_move/02_rules/03_momentum.ipynb stands on (6, 2, 3).
"""
import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from gradnb.ground.house import ROOMS, folder

ROOT = Path(__file__).resolve().parents[1]
DEVELOPMENT = {"nbdev", "fastcore", "execnb", "ghapi", "fastgit", "pytest", "hypothesis"}
DRAWS = re.compile(r"torch\.(random\.)?(manual_seed|seed|set_rng_state|rand\w*|normal|bernoulli|multinomial|poisson)"
                   r"|.*\.(normal_|uniform_|bernoulli_|random_|exponential_|cauchy_|log_normal_|geometric_)")


class Notebook:
    "One notebook: its room, its floor, its module and the syntax trees of its exported cells."

    def __init__(self, path):
        self.path = path.relative_to(ROOT / "nbs")
        sources = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
                   if cell["cell_type"] == "code"]
        names = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(sources), re.MULTILINE)
        self.module = f"gradnb.{names[0]}" if names else None
        self.room = next((room for room in ROOMS if self.path.parts[0] == folder(room)), None)
        self.floor = tuple(int(number) for number in re.findall(r"(?:^|/)(\d+)_", self.path.as_posix()))
        self.cells = [ast.parse(source) for source in sources if re.search(r"^#\|\s*export", source, re.MULTILINE)]

    def nodes(self, *kinds):
        "The nodes of these kinds in the exported cells."
        return [node for cell in self.cells for node in ast.walk(cell) if isinstance(node, kinds)]

    def imports(self):
        "The dotted names that the exported cells import; `from a import b` gives a.b."
        return imported(*self.nodes(ast.Import, ast.ImportFrom))


def imported(*nodes):
    "The dotted names that import statements name."
    for node in nodes:
        start = f"{'.' * node.level}{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
        yield from (start + alias.name for alias in node.names)


NOTEBOOKS = [path for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
             if not any(part[0] in "._" for part in path.relative_to(ROOT / "nbs").parts)]
HOUSE = [Notebook(path) for path in NOTEBOOKS]
MODULES = {notebook.module: notebook for notebook in HOUSE if notebook.module}
PACKAGES = {".".join(path.parent.relative_to(ROOT).parts): path for path in (ROOT / "gradnb").rglob("__init__.py")}
every_notebook = pytest.mark.parametrize("notebook", MODULES.values(), ids=MODULES)


def home(name):
    "The notebook that defines what is imported as `name`, through packages that hand it on; None where that is not ours."
    if name.split(".")[0] not in ("gradnb", ""):
        return None
    package, _, last = name.rpartition(".")
    if name in MODULES or package in MODULES:
        return MODULES.get(name) or MODULES[package]
    assert package in PACKAGES and package != "gradnb", f"{name} is imported; import from the module that defines it: gradnb.<room>.<module>."
    tree = ast.parse(PACKAGES[package].read_text(encoding="utf-8"))
    hands_on = [full for full in imported(*(n for n in tree.body if isinstance(n, ast.ImportFrom))) if full.endswith(f".{last}")]
    assert len(hands_on) == 1, f"{package} does not hand on {last}."
    return home(package + hands_on[0] if hands_on[0].startswith(".") else hands_on[0])


@every_notebook
def test_imports_point_down(notebook):
    for other in filter(None, map(home, notebook.imports())):
        assert other.room == notebook.room or other.room in ROOMS[notebook.room].imports, (
            f"{notebook.path} imports {other.path}, and {notebook.room} may import {', '.join(ROOMS[notebook.room].imports)}.")
        assert other.floor < notebook.floor, f"{notebook.path} imports from its own floor or above: {other.path}"


def test_the_folders_are_the_plan():
    assert sorted(path.name for path in (ROOT / "gradnb").iterdir() if path.is_dir() and path.name[0] not in "._") == sorted(ROOMS)
    assert [path.name for path in sorted((ROOT / "nbs").glob("[0-9]*"))] == [folder(room) for room in ROOMS]
    for room, about in ROOMS.items():
        assert ast.get_docstring(ast.parse(PACKAGES[f"gradnb.{room}"].read_text(encoding="utf-8"))) == about.says
        assert len(about.first) <= 3 and all((ROOT / "nbs" / folder(room) / f"{path}.ipynb").exists() for path in about.first)


def test_every_notebook_of_a_folder_has_a_number_of_its_own():
    for folder in {path.parent for path in NOTEBOOKS if path.name[0].isdigit()}:
        numbers = [path.name.partition("_")[0] for path in folder.iterdir() if path.name[0].isdigit()]
        assert len({*numbers}) == len(numbers), f"two things in {folder} have the same number: {sorted(numbers)}"


def test_the_wings_stay_apart():
    assert "measure" not in ROOMS["move"].imports and "move" not in ROOMS["measure"].imports


def test_the_page_of_the_rooms_lists_every_notebook():
    page = (ROOT / "nbs" / folder("ground") / "00_house.ipynb").read_text(encoding="utf-8")
    assert not [path for path in NOTEBOOKS if (at := path.relative_to(ROOT / "nbs").as_posix())[0].isdigit() and f"(../{at})" not in page]


@every_notebook
def test_a_module_lies_where_its_notebook_lies(notebook):
    parts = [re.sub(r"^\d+_", "", part) for part in notebook.path.with_suffix("").parts]
    assert notebook.module == ".".join(["gradnb", *parts])


@every_notebook
def test_no_name_repeats_its_folder(notebook):
    *_, above, name = notebook.module.split(".")
    noun = above.removesuffix("s")          # which may have a module of its own: layers/layer.py
    assert name == noun or not name.removesuffix("s").endswith(noun)


@every_notebook
def test_ships_without_development_tools(notebook):
    assert not DEVELOPMENT & {name.split(".")[0] for name in notebook.imports()}


@every_notebook
def test_names_what_it_imports(notebook):
    assert not [name for name in notebook.imports() if name.endswith(".*")]


def global_draws(node, around=""):
    "Calls below `node` that draw from or set torch's global generator, but for functions that fork or restore it."
    if isinstance(node, ast.FunctionDef):
        around += ast.unparse(node)
    if isinstance(node, ast.Call) and DRAWS.fullmatch(call := ast.unparse(node.func)):
        given = any(keyword.arg == "generator" for keyword in node.keywords)
        restores = call.endswith("set_rng_state") and "get_rng_state" in around
        if not (given or restores or "fork_rng" in around):
            yield ast.unparse(node)
    for child in ast.iter_child_nodes(node):
        yield from global_draws(child, around)


@every_notebook
def test_leaves_the_global_generator_alone(notebook):
    assert not [call for cell in notebook.cells for call in global_draws(cell)]


def test_one_notebook_is_one_module():
    exported = Counter(notebook.module for notebook in HOUSE if notebook.module)
    files = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "gradnb").rglob("*.py")}
    modules = {".".join(path.parts) for path in files if path.name not in ("__init__", "__main__", "_modidx")}
    assert not [module for module, count in exported.items() if count > 1]
    assert modules == set(exported), f"no notebook, or no module: {sorted(modules ^ set(exported))}"


def test_every_module_has_a_room_and_nothing_else_exports():
    assert not [str(notebook.path) for notebook in MODULES.values() if not notebook.room]
    assert not [str(notebook.path) for notebook in HOUSE if notebook.cells and not notebook.module]
