"""The site: every notebook a page, the reference of every public name, the explorers and the gallery, in one folder.

    site.py                  build _proc/site/html and check every link in it    (pip install 'gradnb[site]')
    site.py check DIR        only check the links of a site that is there

Nothing is fetched, neither to build the site nor to read it: index.html opens from a disk. Notebooks are shown with the
outputs that they store. The explorers run their notebooks in nbs/explore; the gallery is what `gradnb figures` has left
in figures/, and a page that says how to make it where there is none.
"""
import argparse
import ast
import contextlib
import inspect
import io
import json
import os
import re
import shutil
import sys
import tokenize
from copy import deepcopy
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
NBS, SITE, SPHINX = ROOT / "nbs", ROOT / "_proc" / "site", ROOT / ".ci" / "sphinx"
GIT = re.search(r"^git_url = (.*)$", (ROOT / "settings.ini").read_text("utf-8"), re.MULTILINE)[1]
LONG = 24                                                                # lines of a cell that is shown at once
DIRECTIVES = re.compile(r"\A(?:[ \t]*#\|.*(?:\n|\Z)|[ \t]*\n)*")         # the leading `#|` lines of a cell
CODE = re.compile(r"(^```.*?^```|^~~~.*?^~~~|\$\$.*?\$\$|\[[^\]\n]*`[^\]\n]*\]\([^)\n]*\)|^#.*?$)", re.MULTILINE | re.DOTALL)


# --- the notebooks ----------------------------------------------------------------------------------------------------

def notebooks():
    "The notebooks, in reading order."
    return [path for path in sorted(NBS.rglob("*.ipynb")) if not any(part[0] in "._" for part in path.relative_to(NBS).parts)]


def text_of(cell):
    return "".join(cell["source"])


def heading(path):
    "Title and question of a notebook."
    title, _, rest = text_of(json.loads(path.read_text("utf-8"))["cells"][0]).partition("\n")
    return title.removeprefix("# "), rest.strip().removeprefix("> ")


def module_of(notebook):
    "The module that a notebook exports, or None."
    named = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(text_of, notebook["cells"])), re.MULTILINE)
    return named and f"gradnb.{named[1]}"


def page_of(module):
    "The reference page that a module is on: that of its package."
    return "api/" + module.rpartition(".")[0]


def staged(path, names):
    "A notebook as the site shows it: directives gone, long cells folded, names in the prose linked to the reference."
    notebook = json.loads(path.read_text("utf-8"))
    module, at = module_of(notebook), path.relative_to(NBS)
    known = names | {full.rpartition(".")[2]: full for full in names.values() if module and full.startswith(f"{module}.")}
    cells = [new for cell in notebook["cells"] for new in shown(cell, known)]
    if path.name != "index.ipynb":
        about = [f"[`{module}`]({'../' * (len(at.parts) - 1)}{page_of(module)}.md)"] if module else []
        about.append(f'<a href="{GIT}/blob/main/nbs/{at.as_posix()}">the notebook</a>')
        cells[0]["source"] = f"{cells[0]['source'].rstrip()}\n\n" + " · ".join(about)
    notebook.update(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"), language_info=dict(name="python")))
    return json.dumps(notebook, ensure_ascii=False)


def shown(cell, known):
    "The cells that stand for one."
    source, outputs = text_of(cell), cell.get("outputs", [])
    if cell["cell_type"] == "markdown":
        return [cell | dict(source=linked(source, known))]
    directives = DIRECTIVES.match(source)[0]
    source = source[len(directives):].rstrip()
    if re.search(r"#\|\s*hide\s*$", directives, re.MULTILINE) or not source:
        return []
    outputs = [] if "output: false" in directives else outputs
    words = [markdown(output) for output in outputs]
    cells = [dict(cell_type="markdown", id=f"{cell['id']}-{i}", metadata={}, source=linked(text, known)) for i, text in enumerate(words) if text]
    if "echo: false" in directives:
        return cells
    lines, is_imports = source.count("\n") + 1, cell["id"] == "imports"
    fold = dict(tags=["hide-input"], mystnb=dict(code_prompt_show="Imports" if is_imports else f"Show {lines} lines", code_prompt_hide="Hide"))
    code = cell | dict(source=source, outputs=[o for o, text in zip(outputs, words) if not text])
    return [code | dict(metadata=dict(anchor=f"cell-{cell['id']}") | (fold if is_imports or lines > LONG else {})), *cells]


def markdown(output):
    return "".join(output.get("data", {}).get("text/markdown", ""))


def linked(text, known):
    "Prose, with the code spans that name something public made links to it, and the files at the top made pages."
    text = re.sub(r"\]\((?:\.\./)+(\w+)\.md\)", lambda m: f"](/{m[1].lower()}.md)", text)
    span = lambda m: f"{{py:obj}}`{m[1]} <{known[m[1]]}>`" if m[1] in known else m[0]
    return "".join(piece if i % 2 else re.sub(r"(?<!`)`(?:gn\.)?([\w.]+)`(?!`)", span, piece) for i, piece in enumerate(CODE.split(text)))


# --- the reference ----------------------------------------------------------------------------------------------------

PUBLIC = {}                                                              # name → its full names
HANDED = set()                                                           # full names of what `gradnb` hands on itself


class Module:
    "What a module's source says of its public names: signatures, the comments beside them, docstrings, cells."

    def __init__(self, path):
        text = path.read_text("utf-8")
        self.name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        self.tree = ast.parse(text)
        self.says = ast.get_docstring(self.tree) or ""
        self.comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(text).readline)
                         if t.type == tokenize.COMMENT and t.line.strip() != t.string}
        self.cells = {i: line.split(" ", 2)[2] for i, line in enumerate(text.splitlines(), 1) if line.startswith("# %% ..")}
        self.imports = {a.name: ".".join([*self.name.split(".")[:-n.level], *filter(None, [n.module])]) for n in self.tree.body
                        if isinstance(n, ast.ImportFrom) and n.level for a in n.names}
        shown = next((ast.literal_eval(n.value) for n in self.tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), [])
        self.public = {name: node for node in self.tree.body for name in defined(node) if name in shown}

    def source(self, node):
        "Where a name is defined, as a link to the notebook's cell."
        path, _, cell = self.cells[max(i for i in self.cells if i < node.lineno)].rpartition(" #")
        page = re.sub(r"^(\.\./)+nbs/", "../", path).removesuffix(".ipynb")
        return f'<a class="cell-link" href="{page}.html#cell-{cell}">in the notebook</a>'

    def entry(self, name, node, depth=0):
        "The lines of the reference about a name."
        fence, kind, about, flags = ":" * (6 - depth), "py:function", getattr(node, "args", None), []
        if isinstance(node, ast.ClassDef):
            kind, made = "py:class", next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
            about = made.args if made else fields(node)
            signature = f"({self.unparsed(about, bool(made))})" if made or about else ""
        elif isinstance(node, ast.FunctionDef):
            kind = "py:method" if depth else kind
            signature = f"({self.unparsed(about, depth and not static(node))})" + (f" -> {self.typed(node.returns)}" if node.returns else "")
        else:
            value = ast.unparse(node.value)
            kind, signature, flags = "py:data", "", [f":value: {value}"] * (len(value) <= 60)
        flags += [f":{flag}:" for flag in ("classmethod", "staticmethod") if flag in decorators(node)]
        if is_property := bool({"property", "cached_property"} & {*decorators(node)}):
            kind, signature = "py:property", ""
        lines = [f"{fence}{{{kind}}} {name}{signature}", *flags, ""]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines += [prose(ast.get_docstring(node) or ""), "", *([] if is_property else self.parameters(node, about)), ""]
        elif node.lineno in self.comments:
            lines += [prose(self.comments[node.lineno]), ""]
        if not depth:
            handed = [f"`from gradnb import {name}`"] * (f"{self.name}.{name}" in HANDED)
            lines += [" · ".join([*handed, self.source(node)]), ""]
        if isinstance(node, ast.ClassDef):
            for n in node.body:
                if isinstance(n, ast.FunctionDef) and n.name[0] != "_":
                    lines += self.entry(n.name, n, depth + 1)
        return [*lines, fence, ""]

    def full(self, name):
        "The full name of a type, where it is one of ours."
        if name in self.public:
            return f"{self.name}.{name}"
        begins = self.imports.get(name)
        return next((f for f in PUBLIC.get(name, ()) if f.startswith(f"{begins}.")), name) if begins else name

    def typed(self, node):
        return ast.unparse(Types(self.full).visit(deepcopy(node)))

    def unparsed(self, about, bound=False):
        "Parameters as a signature has them, without `self`."
        if isinstance(about, list):
            return ", ".join(f"{n.target.id}: {self.typed(n.annotation)}" + (f" = {ast.unparse(short(n.value))}" if n.value else "") for n in about)
        about = deepcopy(about)
        if bound:
            (about.posonlyargs or about.args).pop(0)
        for a in every_arg(about):
            a.annotation = a.annotation and Types(self.full).visit(a.annotation)
        about.defaults, about.kw_defaults = [short(v) for v in about.defaults], [v and short(v) for v in about.kw_defaults]
        return ast.unparse(about)

    def parameters(self, node, about):
        "The comments beside parameters, fields and what is returned, as a field list."
        every = every_arg(about) if isinstance(about, ast.arguments) else about or []
        said = {(a.arg if isinstance(a, ast.arg) else a.target.id): (a.end_lineno, self.comments.get(a.end_lineno)) for a in every}
        once = [line for line, _ in said.values()]
        lines = [f":param {name}: {prose(comment)}" for name, (line, comment) in said.items() if comment and once.count(line) == 1 and line != node.lineno]
        returns = getattr(node, "returns", None)
        if returns and (comment := self.comments.get(returns.end_lineno)):
            lines.append(f":returns: {prose(comment)}")
        return lines


def defined(node):
    "The names that a statement at the top of a module defines."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) and node.value else []
    return [t.id for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target]) if isinstance(t, ast.Name)]


def decorators(node):
    return [d.id for d in getattr(node, "decorator_list", ()) if isinstance(d, ast.Name)]


def static(node):
    return "staticmethod" in decorators(node)


def every_arg(args):
    return [a for a in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if a]


def fields(node):
    "The fields of a dataclass or a named tuple."
    return [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.target.id[0] != "_"]


def short(value):
    "A default as a signature shows it."
    return value if len(text := ast.unparse(value)) <= 40 and " for " not in text else ast.Name("...")


class Types(ast.NodeTransformer):
    "Names in annotations as full names, where they are ours."

    def __init__(self, full):
        self.full = full

    def visit_Name(self, node):
        return ast.Name(self.full(node.id))


def prose(text):
    "A docstring or comment as MyST: what only looks like markup stays what it is."
    return re.sub(r"([$<*]|_(?=\W|$))", r"\\\1", inspect.cleandoc(text)) if "`" not in text else inspect.cleandoc(text)


def modules():
    "The modules that notebooks export, by package."
    packages = {}
    for path in sorted((ROOT / "gradnb").rglob("*.py")):
        if path.name[0] != "_":
            module = Module(path)
            packages.setdefault(module.name.rpartition(".")[0], []).append(module)
            for name in module.public:
                PUBLIC.setdefault(name, []).append(f"{module.name}.{name}")
    return packages


def reference(package, members):
    "The reference page of a package."
    lines = [f"# {package}", "", f"::::::{{py:module}} {package}", "::::::", ""]
    for module in members:
        page = next(iter(module.cells.values())).split(" #")[0]
        page = re.sub(r"^(\.\./)+nbs/", "../", page)
        lines += [f"## {module.name.rpartition('.')[2]}", "", f"::::::{{py:module}} {module.name}", "::::::", "", f"{prose(module.says)} [Notebook]({page})", ""]
        for name, node in module.public.items():
            lines += module.entry(name, node)
    return "\n".join(lines)


# --- the pages between ------------------------------------------------------------------------------------------------

def toctree(entries, *options):
    return "\n".join(["```{toctree}", *options, "", *entries, "```", ""])


def listed(paths, here):
    "A line for each notebook: title and question."
    return "\n".join("- [{}]({}): {}".format(heading(p)[0], p.relative_to(here).as_posix(), heading(p)[1]) for p in paths if p.name[0] not in "._")


def folder_page(folder, title, says):
    "The page of a folder of notebooks, which lists them and its folders."
    inner = [path for path in sorted(folder.iterdir()) if path.name[0] not in "._"]
    entries = [f"{p.name}/index" if p.is_dir() else p.stem for p in inner if p.is_dir() or p.suffix == ".ipynb"]
    lists = [listed([p for p in inner if p.suffix == ".ipynb"], folder)]
    for path in filter(Path.is_dir, inner):
        lists += [f"\n## [{bare(path)}]({path.name}/index.md)\n", listed(sorted(path.glob("*.ipynb")), folder)]
    return f"# {title}\n\n{says}\n\n" + "\n".join(lists) + "\n\n" + toctree(entries, ":hidden:")


def bare(path):
    return re.sub(r"^\d+_", "", path.name)


GALLERY = """# Gallery

Each figure is a notebook that draws runs and checks what a paper claims of them; a verdict is undecided where the measured interval lies neither wholly inside nor wholly outside the expected one. `gradnb figures` makes them all, and `figures/index.html` shows them with their claims.

{made}

{figures}

{tree}"""
MADE = '<a href="../gallery/index.html">The gallery</a> as it was drawn for this site, and <a href="../gallery/claims.html">every claim</a>: {says}.\n\n<div class="pictures">{pictures}</div>\n\nThe notebooks:'
PICTURE = '<a href="../gallery/{at}/{at}.html"><img src="../gallery/{at}/{at}.png" alt="" loading="lazy"><span>{title}<br><small>{says}</small></span></a>'
UNMADE = """The pictures of this page are made by

```sh
gradnb figures
python .ci/site.py
```

The first trains what is missing and takes about half an hour on two cores (`--size smoke`: a few minutes, and too short for most claims); the second builds this site again, with them. The notebooks:"""
REFERENCE = """# Reference

Every public name, package by package, with its signature and the notebook that explains it; <a href="../genindex.html">all of them from A to Z</a>.

"""
EXPLORERS = """# Explorers

In JupyterLab an explorer shows runs while they go on. What it shows can be saved as a page that needs neither a server nor Python: here is one, alive; move its slider, or drag over a panel.

<iframe class="explorer" src="../pages/run_explorer.html" title="Run explorer"></iframe>

{pages}

{tree}"""


def gallery(figures):
    "What the page of the gallery says of the figures that are made."
    from gradnb.show.gallery import figures_in, verdict
    if not (figures / "index.html").exists():
        return UNMADE
    found = figures_in(figures)
    pictures = "".join(PICTURE.format(at=quote(name), title=escape(made["title"]), says=escape(verdict(claims))) for name, (made, claims) in found.items())
    return MADE.format(says=verdict([c for _, claims in found.values() for c in claims]), pictures=pictures)


def stage(source, figures, explorers):
    "Write what Sphinx reads; returns what was there and is not a page any more."
    from gradnb import _NAMES
    from gradnb.ground.house import ROOMS, folder
    written = set()
    def write(name, text):
        path = source / name
        written.add(path)
        if not path.exists() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    packages = modules()
    HANDED.update(full for place, handed in _NAMES.items() for name in handed for full in PUBLIC.get(name, ())
                  if full.startswith(f"gradnb.{place}."))
    names = {full.rpartition(".")[2]: full for full in HANDED}
    names |= {name: name for package, members in packages.items() for name in (package, *(m.name for m in members))}
    for path in notebooks():
        if path != NBS / "index.ipynb":
            write(path.relative_to(NBS), staged(path, names))
    shutil.copytree(NBS / "images", source / "images", dirs_exist_ok=True)
    for package, members in packages.items():
        write(f"api/{package}.md", reference(package, members))
    write("api/index.md", REFERENCE + toctree(sorted(packages), ":maxdepth: 1"))
    for room, about in ROOMS.items():
        write(f"{folder(room)}/index.md", folder_page(NBS / folder(room), room, about.says))
        for inner in (p for p in (NBS / folder(room)).rglob("*") if p.is_dir() and p.name[0] not in "._"):
            write(inner.relative_to(NBS) / "index.md", folder_page(inner, bare(inner), ""))
    write("essays/index.md", folder_page(NBS / "essays", "From elsewhere to gradnb", "Longer questions on one page each, and what one's calls of other libraries are here."))
    write("figures/index.md", GALLERY.format(figures=listed(sorted((NBS / "figures").glob("*.ipynb")), NBS / "figures"), tree=toctree(["*"], ":hidden:", ":glob:"),
          made=gallery(figures)))
    def live(page):
        title, question = heading(NBS / "explore" / f"{page.stem}.ipynb")
        return f'- <a href="../pages/{page.name}">{title.removesuffix(" by hand")}</a>: {question} [Its notebook]({page.stem}.ipynb)'
    write("explore/index.md", EXPLORERS.format(pages="\n".join(map(live, explorers)), tree=toctree(["*"], ":hidden:", ":glob:")))
    for file in ("CHANGELOG", "SECURITY"):
        write(f"{file.lower()}.md", (ROOT / f"{file}.md").read_text("utf-8"))
    home = json.loads(staged(NBS / "index.ipynb", names))
    tree = "\n".join([toctree(["tour", "figures/index", "explore/index", "essays/index"], ":hidden:"),
                      toctree([f"{folder(room)}/index" for room in ROOMS], ":hidden:", ":caption: Rooms"),
                      toctree(["api/index", "changelog", "security"], ":hidden:", ":caption: More")])
    home["cells"].append(dict(cell_type="markdown", id="pages", metadata={}, source=tree))
    write("index.ipynb", json.dumps(home, ensure_ascii=False))
    gone = {p for p in source.rglob("*.*") if p.is_file() and p.parent != source / "images"} - written
    for path in gone:
        path.unlink()
    return [path.relative_to(source) for path in gone]


# --- explorers --------------------------------------------------------------------------------------------------------

def explorer_pages(out):
    "The explorers of nbs/explore as pages of their own, made anew where a notebook or a module is newer."
    os.environ.setdefault("MPLBACKEND", "agg")
    out.mkdir(parents=True, exist_ok=True)
    newest = max(p.stat().st_mtime for p in (ROOT / "gradnb").rglob("*.py"))
    for path in sorted((NBS / "explore").glob("*.ipynb")):
        page, scope = out / f"{path.stem}.html", {}
        if page.exists() and page.stat().st_mtime > max(newest, path.stat().st_mtime):
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            for cell in json.loads(path.read_text("utf-8"))["cells"]:
                if cell["cell_type"] == "code":
                    exec(compile(text_of(cell), str(path), "exec"), scope)         # noqa: S102
        scope["explorer"].save(page)
    return sorted(out.glob("*.html"))


# --- links ------------------------------------------------------------------------------------------------------------

class Links(HTMLParser):
    "What a page refers to, what a browser fetches for it, and the anchors that it has."

    def __init__(self, text):
        super().__init__()
        self.to, self.fetched, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {v for k in ("id", "name") if (v := attrs.get(k))}
        if tag == "a" and attrs.get("href"):
            self.to.append(attrs["href"])
        elif tag == "link" and attrs.get("href"):
            self.fetched.append(attrs["href"])
        elif attrs.get("src"):
            self.fetched.append(attrs["src"])


def broken_links(folder):
    "What is wrong with the links of a folder of pages, a sentence each."
    folder = Path(folder).resolve()
    pages = {path: Links(path.read_text("utf-8")) for path in sorted(folder.rglob("*.html"))}
    wrong = []
    for path, links in pages.items():
        here = path.relative_to(folder)
        for url in (*links.to, *links.fetched):
            to = urlsplit(url)
            if to.scheme == "data":
                continue
            if to.scheme or to.netloc:
                if url in links.fetched:
                    wrong.append(f"{here} fetches {url}.")
                continue
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            if not target.is_relative_to(folder) or not target.is_file():
                wrong.append(f"{here} refers to {url}, and there is no such file.")
            elif to.fragment and target in pages and unquote(to.fragment) not in pages[target].anchors:
                wrong.append(f"{here} refers to {url}, and there is no such place on that page.")
    for path in folder.rglob("*.css"):
        wrong += [f"{path.relative_to(folder)} fetches {url}." for url in re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", path.read_text("utf-8"))]
    return sorted(set(wrong))


# --- all of it --------------------------------------------------------------------------------------------------------

def build(out, figures, jobs):
    "Build the site in `out`/html. Raises SystemExit that says what is wrong with it."
    try:
        from sphinx.cmd.build import main as sphinx
        import myst_nb, furo, latex2mathml, sphinx_copybutton                   # noqa: E401, F401
    except ImportError as error:
        sys.exit(f"The site is built by Sphinx, and {error.name} is not installed: pip install -e '.[site]'.")
    source, html = out / "source", out / "html"
    for folder in ("pages", "gallery"):
        shutil.rmtree(html / folder, ignore_errors=True)
    pages = explorer_pages(out / "explorers")
    for path in stage(source, figures, pages):
        (html / path).with_suffix(".html").unlink(missing_ok=True)
    made = (html / "searchindex.js").stat().st_mtime if (html / "searchindex.js").exists() else 0
    afresh = ["-E", "-a"] if max(p.stat().st_mtime for p in SPHINX.rglob("*.*")) > made else []         # Sphinx does not look at its own set-up
    rc = sphinx([*afresh, "-q", "-W", "--keep-going", "-j", str(jobs), "-b", "html", "-c", str(SPHINX), "-d", str(out / "doctrees"), str(source), str(html)])
    shutil.copytree(out / "explorers", html / "pages")
    if (figures / "index.html").exists():
        shutil.copytree(figures, html / "gallery", ignore=shutil.ignore_patterns(".*", "*.failed.ipynb"))
    (html / ".nojekyll").touch()
    return rc


def main():
    "The command line."
    from gradnb.ground.processes import cpus
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=SITE, metavar="DIR", help="where it is built (default: _proc/site)")
    parser.add_argument("--figures", type=Path, default=ROOT / "figures", metavar="DIR", help="the gallery to show (default: figures)")
    parser.add_argument("-j", "--jobs", type=int, default=cpus(), help="processes (default: the CPUs)")
    args = parser.parse_args()
    if args.check and (len(args.check) != 2 or args.check[0] != "check"):
        parser.error("either nothing, or: check DIR")
    html, rc = (Path(args.check[1]), 0) if args.check else (args.out / "html", build(args.out.resolve(), args.figures, args.jobs))
    wrong = broken_links(html)
    for line in wrong:
        print(line)
    if rc or wrong:
        sys.exit(f"The site is in {html}, and something is wrong with it: {len(wrong)} links, and what Sphinx says above." if rc else f"{len(wrong)} links of the site in {html} are broken.")
    print(f"{len(list(html.rglob('*.html')))} pages, every link in them good: {html / 'index.html'}")


if __name__ == "__main__":
    main()
