"""The plan of the house, read from the notebooks: imports point down, the wings stay apart, one notebook is one module.

A notebook's floor is the numbers along its path: nbs/31_rules/02_momentum.ipynb stands on (31, 2).
"""
import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEVELOPMENT = {"nbdev", "fastcore", "execnb", "ghapi", "fastgit", "pytest", "hypothesis"}
DRAWS = re.compile(r"torch\.(random\.)?(manual_seed|seed|set_rng_state|rand\w*|normal|bernoulli|multinomial|poisson)"
                   r"|.*\.(normal_|uniform_|bernoulli_|random_|exponential_|cauchy_|log_normal_|geometric_)")


class Room:
    "One notebook: its floor, its module and the syntax trees of its exported cells."

    def __init__(self, path):
        self.path = path.relative_to(ROOT / "nbs")
        sources = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
                   if cell["cell_type"] == "code"]
        names = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(sources), re.MULTILINE)
        self.module = f"gradnb.{names[0]}" if names else None
        self.floor = tuple(int(number) for number in re.findall(r"(?:^|/)(\d+)_", self.path.as_posix()))
        self.cells = [ast.parse(source) for source in sources if re.search(r"^#\|\s*export", source, re.MULTILINE)]

    @property
    def wing(self):
        "West proposes and moves, east measures."
        return None if not (30,) <= self.floor < (50,) else "west" if self.floor[0] % 10 < 5 else "east"

    def nodes(self, *kinds):
        "The nodes of these kinds in the exported cells."
        return [node for cell in self.cells for node in ast.walk(cell) if isinstance(node, kinds)]

    def imports(self):
        "The dotted names that the exported cells import; `from a import b` gives a.b."
        plain = [alias.name for node in self.nodes(ast.Import) for alias in node.names]
        return plain + [f"{'.' * node.level}{node.module or ''}.{alias.name}"
                        for node in self.nodes(ast.ImportFrom) for alias in node.names]


NOTEBOOKS = [path for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
             if not any(part[0] in "._" for part in path.relative_to(ROOT / "nbs").parts)]
HOUSE = [Room(path) for path in NOTEBOOKS]
ROOMS = [room for room in HOUSE if room.module]
every_room = pytest.mark.parametrize("room", ROOMS, ids=[room.module for room in ROOMS])


def imported_rooms(room):
    "The rooms that `room` imports from: a module, or all modules of a package."
    for name in room.imports():
        if name.split(".")[0] in ("gradnb", ""):
            package = name.rpartition(".")[0]
            found = ([other for other in ROOMS if f"{name}.".startswith(f"{other.module}.")]
                     or [other for other in ROOMS if package != "gradnb" and other.module.startswith(f"{package}.")])
            assert found, f"{room.path} imports {name}; import from the module that defines it: gradnb.<module>."
            yield from found


@every_room
def test_imports_point_down(room):
    higher = {str(other.path) for other in imported_rooms(room) if other.floor >= room.floor}
    assert not higher, f"{room.path} imports from its own floor or above: {', '.join(sorted(higher))}"


@every_room
def test_wings_stay_apart(room):
    across = {str(other.path) for other in imported_rooms(room) if room.wing and other.wing not in (None, room.wing)}
    assert not across, f"{room.path} ({room.wing}) imports from the other wing: {', '.join(sorted(across))}"


@every_room
def test_ships_without_development_tools(room):
    assert not DEVELOPMENT & {name.split(".")[0] for name in room.imports()}


@every_room
def test_names_what_it_imports(room):
    assert not [name for name in room.imports() if name.endswith(".*")]


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


@every_room
def test_leaves_the_global_generator_alone(room):
    assert not [call for cell in room.cells for call in global_draws(cell)]


def test_one_notebook_is_one_module():
    exported = Counter(room.module for room in ROOMS)
    files = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "gradnb").rglob("*.py")}
    modules = {".".join(path.parts) for path in files if path.name not in ("__init__", "_modidx")}
    assert not [module for module, count in exported.items() if count > 1]
    assert modules == set(exported), f"no notebook, or no module: {sorted(modules ^ set(exported))}"


def test_every_room_has_a_floor_and_nothing_else_exports():
    assert not [str(room.path) for room in ROOMS if not room.floor]
    assert not [str(room.path) for room in HOUSE if room.cells and not room.module]
