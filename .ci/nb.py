"""Notebooks as text: print, write, run and check them from the shell.

    nb.py cat NB [ID ...]      print the notebook, or the named cells, as text
    nb.py write NB < text      make the notebook from text; cells whose source is unchanged keep their outputs
    nb.py run NB [FLAG ...]    run the notebook in its own folder and store clean outputs in it; cells marked with
                               a test flag of settings.ini (`#| slow`) are skipped, unless the flag is named
    nb.py check [NB ...]       say what must not be committed (all notebooks under nbs by default)

In the text each cell starts with a header line: `# %% ID` for code, `# %% ID md` for Markdown, `# %% ID raw`;
tags follow as in `# %% params tags=parameters`. Ids are short slugs, chosen by hand and never regenerated, because
the exported modules name them.
"""
import argparse
import json
import os
import re
import sys
from pathlib import Path

import nbformat
from nbformat import v4

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
HEADER = re.compile(r"# %% (?P<id>\S+)(?P<kind> md| raw)?(?: tags=(?P<tags>\S+))?")
CELL_ID = re.compile(r"[a-zA-Z0-9-_]{1,64}")
CONFLICT = re.compile(r"^`?(<<<<<<<|>>>>>>>)", re.MULTILINE)  # git's marks, and nbdev_merge's in backticks
WIDGET = "application/vnd.jupyter.widget-view+json"
OUTPUT_LIMIT = 60_000                                     # bytes of stored outputs in one notebook
NEW_CELL = {"": v4.new_code_cell, " md": v4.new_markdown_cell, " raw": v4.new_raw_cell}
KIND = {"code": "", "markdown": " md", "raw": " raw"}


class Refused(Exception):
    "What the user asked for cannot be done; the message is one line that says why."


# --- text and notebook ------------------------------------------------------------------------------------------

def load(path):
    "The notebook stored at `path`."
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise Refused("no such notebook.") from None
    except (ValueError, nbformat.ValidationError) as error:
        raise Refused(f"not a notebook ({str(error).splitlines()[0]}).") from None


def save(notebook, path):
    "Write `notebook`, if that changes the file; readers see the old file or the new one, never half of it."
    path, text = Path(path), nbformat.writes(notebook) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def to_text(cell):
    "One cell under its header line."
    tags = cell.metadata.get("tags")
    return f"# %% {cell.id}{KIND[cell.cell_type]}{' tags=' + ','.join(tags) if tags else ''}\n{cell.source}\n"


def to_cell(header, lines, old):
    "One cell from its parsed header and source lines; `old` maps ids to the cells that were there before."
    name, source = header["id"], "\n".join(lines).rstrip("\n")
    metadata = {"tags": header["tags"].split(",")} if header["tags"] else {}
    cell = NEW_CELL[header["kind"] or ""](source, id=name, metadata=metadata)
    before = old.get(name)
    if before is not None and before.cell_type == cell.cell_type == "code" and before.source == source:
        cell.outputs = before.outputs
    return cell


def parse(text, old):
    "The cells that `text` describes; `old` maps ids to the cells that were there before."
    if CONFLICT.search(text):
        line = text[:CONFLICT.search(text).start()].count("\n") + 1
        raise Refused(f"line {line} is a conflict mark; resolve the conflict first.")
    cells, seen = [], set()
    header, lines = None, []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.startswith("# %%"):
            if header is None and line.strip():
                raise Refused(f"line {number} stands before the first cell header (`# %% ID`).")
            lines.append(line)
            continue
        if header is not None:
            cells.append(to_cell(header, lines, old))
        header, lines = HEADER.fullmatch(line.rstrip()), []
        if header is None:
            raise Refused(f"line {number} is no cell header: {line!r}; write `# %% ID [md|raw] [tags=a,b]`.")
        if not CELL_ID.fullmatch(header["id"]):
            raise Refused(f"line {number}: {header['id']!r} is no cell id; use 1 to 64 of a-z A-Z 0-9 - _.")
        if header["id"] in seen:
            raise Refused(f"line {number} repeats the cell id {header['id']!r}.")
        seen.add(header["id"])
    if header is None:
        raise Refused("no cells: the text is empty.")
    return [*cells, to_cell(header, lines, old)]


# --- running ----------------------------------------------------------------------------------------------------

def skipped(cell, flags):
    "Whether `run` leaves this cell alone, by the rules of nbdev_test."
    from nbdev.process import extract_directives
    if cell.cell_type != "code":
        return True
    directives = extract_directives(cell, remove=False)
    return bool(flags & directives.keys()) or directives.get("eval:", [""])[0].lower() == "false"


def execute(path, force):
    "Run the notebook in a fresh shell; returns it with its new outputs, not yet cleaned."
    from execnb.nbio import nb2str, read_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    flags = set(get_config(path=ROOT).tst_flags.split()) - set(force)
    sys.path[0] = str(ROOT)                               # the package, not this script's neighbours
    os.chdir(path.parent)
    notebook, shell = read_nb(path), CaptureShell(path)
    for cell in notebook.cells:
        if not skipped(cell, flags):
            cell.outputs = []
    try:
        shell.run_all(notebook, exc_stop=True, preproc=lambda cell: skipped(cell, flags))
    except Exception:  # noqa: BLE001, whatever a cell raised
        raise Refused(shell.prettytb(fname=path)) from None
    return nbformat.reads(nb2str(notebook), as_version=4)


def worth_storing(output):
    "Progress bars and warnings go to stderr, and widget views carry a random model id: neither is stored."
    return output.get("name") != "stderr" and WIDGET not in output.get("data", {})


def output_bytes(cell):
    "Bytes that the outputs of `cell` take in the stored notebook."
    outputs = cell.get("outputs", [])
    return len(json.dumps(outputs, ensure_ascii=False).encode()) if outputs else 0


def outputs_fit(notebook):
    "Raise, naming the largest cell, if the notebook stores more than OUTPUT_LIMIT."
    sizes = {cell.id: output_bytes(cell) for cell in notebook.cells}
    total, largest = sum(sizes.values()), max(sizes, key=sizes.get, default=None)
    if total > OUTPUT_LIMIT:
        raise Refused(f"{total / 1000:.0f} kB of outputs, {OUTPUT_LIMIT // 1000} allowed; "
                      f"the largest is {largest!r} with {sizes[largest] / 1000:.0f} kB: show less of it.")


def run(path, force):
    "Run the notebook at `path` and store what is worth storing, so that a second run changes no byte."
    from nbdev.clean import clean_nb
    load(path)
    notebook = execute(path, force)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if worth_storing(output)]
    clean_nb(notebook, allowed_cell_metadata_keys=["tags"])
    outputs_fit(notebook)
    save(notebook, path)


# --- checking ---------------------------------------------------------------------------------------------------

def check(notebook):
    "Raise, naming the cell, if the notebook must not be committed as it is."
    exports = default = False
    for cell in notebook.cells:
        if CONFLICT.search(cell.source):
            raise Refused(f"cell {cell.id!r} holds a conflict mark; resolve the conflict.")
        if not all(map(worth_storing, cell.get("outputs", []))):
            raise Refused(f"cell {cell.id!r} stores a widget view or stderr; store outputs with `nb.py run` only.")
        if cell.cell_type == "code":
            exports |= bool(re.search(r"^#\|\s*export[is]?\b", cell.source, re.MULTILINE))
            default |= bool(re.search(r"^#\|\s*default_exp\b", cell.source, re.MULTILINE))
    if exports and not default:
        raise Refused("has `#| export` but no `#| default_exp`, so nothing of it is exported.")
    outputs_fit(notebook)


def all_notebooks():
    "Every notebook that nbdev sees: no part of its path starts with a dot or an underscore."
    paths = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [path for path in paths if not any(part[0] in "._" for part in path.relative_to(ROOT / "nbs").parts)]


def main():
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="cat|write|run|check")
    for name, rest in (("cat", "id"), ("write", None), ("run", "flag"), ("check", None)):
        command = commands.add_parser(name)
        command.add_argument("nb", type=Path, nargs="*" if name == "check" else None)
        if rest:
            command.add_argument("rest", nargs="*", metavar=rest)
    args = parser.parse_args()
    at = args.nb
    try:
        if args.command == "cat":
            cells = load(at).cells
            if unknown := set(args.rest) - {cell.id for cell in cells}:
                raise Refused(f"no cell {', '.join(sorted(unknown))}; there are {' '.join(cell.id for cell in cells)}.")
            print("\n".join(to_text(cell) for cell in cells if not args.rest or cell.id in args.rest), end="")
        elif args.command == "write":
            notebook = load(at) if at.exists() else v4.new_notebook(metadata=KERNEL)
            notebook.cells = parse(sys.stdin.read(), {cell.id: cell for cell in notebook.cells})
            save(notebook, at)
        elif args.command == "run":
            run(at.resolve(), args.rest)
        else:
            for at in args.nb or all_notebooks():
                check(load(at))
    except Refused as refusal:
        sys.exit(f"{at}: {refusal}")


if __name__ == "__main__":
    main()
