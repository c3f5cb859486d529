"""README.md is nbs/index.ipynb as Markdown.

    readme.py            write README.md
    readme.py --check    exit with 1 and a message if README.md is not what it would write

The stored outputs are shown, nothing runs. Cells marked `#| hide` are left out, of those marked `#| echo: false` only
the Markdown that they put out stays, of `#| output: false` only the code, other directives are removed, and links and
images that are relative to nbs/ are made relative to the top.
"""
import argparse
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbformat import v4
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
DIRECTIVES = re.compile(r"\A(?:[ \t]*#\|.*(?:\n|\Z)|[ \t]*\n)*")         # the leading `#|` lines of a cell
# fenced blocks and code spans
VERBATIM = re.compile(r"(^```.*?^```|^~~~.*?^~~~|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
TARGET = re.compile(r"""(\]\(|\b(?:src|href)=["'])(?![a-z][a-z0-9+.-]*:|[/#])([^)\s"'#]+)""", re.IGNORECASE)


def from_top(match):
    "A link target that was relative to nbs/, relative to the top."
    target = posixpath.normpath(posixpath.join("nbs", match[2]))
    if not (ROOT / target).exists():
        sys.exit(f"nbs/index.ipynb links to {match[2]!r}, but there is no {target}.")
    return match[1] + target


def outside_code(pattern, replacement, text):
    "`re.sub` on what is neither a fenced block nor a code span."
    pieces = VERBATIM.split(text)
    return "".join(piece if i % 2 else re.sub(pattern, replacement, piece) for i, piece in enumerate(pieces))


def marked(cell, directive):
    "Whether the cell begins with this directive."
    return re.search(rf"^\s*#\|\s*{directive}\s*$", DIRECTIVES.match(cell.source)[0], re.MULTILINE) is not None


def shown(cell):
    "The cell as README.md shows it."
    if marked(cell, "echo: false"):
        cell = v4.new_markdown_cell("\n\n".join(output.data["text/markdown"] for output in cell.outputs))
    if marked(cell, "output: false"):
        cell.outputs = []
    if cell.cell_type == "markdown":
        cell.source = outside_code(TARGET, from_top, cell.source)
    for output in cell.get("outputs", []):
        if any(kind.startswith("image/") for kind in output.get("data", {})):
            sys.exit(f"nbs/index.ipynb stores an image in cell {cell.id!r}; README.md cannot hold it: save the picture "
                     f"under nbs/images and show it in a Markdown cell.")
    if cell.cell_type == "code":
        cell.source = DIRECTIVES.sub("", cell.source, count=1)
    return cell


def render():
    "The text of README.md."
    index = nbformat.read(INDEX, as_version=4)
    index.metadata["language_info"] = {"name": "python"}                 # names the language of the code fences
    cells = [shown(cell) for cell in index.cells if not marked(cell, "hide")]
    index.cells = [cell for cell in cells if cell.source or cell.get("outputs")]
    text, _ = MarkdownExporter().from_notebook_node(index)
    text = outside_code(r"(?s)<style scoped>.*?</style>\n", "", text)    # what pandas puts above a table
    return outside_code(r"\n{3,}", "\n\n", text).strip() + "\n"


def main():
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if README.md is out of date")
    args, text = parser.parse_args(), render()
    if not args.check:
        README.write_text(text, encoding="utf-8")
    elif not README.exists() or README.read_text(encoding="utf-8") != text:
        sys.exit("README.md is out of date: run `python .ci/readme.py` and commit it with nbs/index.ipynb.")


if __name__ == "__main__":
    main()
