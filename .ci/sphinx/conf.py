"Sphinx on what `.ci/site.py` has staged: MyST pages and notebooks as they are, equations as MathML, nothing from elsewhere."
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

HERE = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(HERE.parents[1] / "settings.ini", encoding="utf-8")
about = settings["DEFAULT"]

project, author, copyright, release = about["title"], about["author"], about["copyright"], about["version"]
extensions = ["myst_nb", "sphinx_copybutton"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
nb_execution_mode = "off"                                # notebooks are shown as they are stored
nb_merge_streams = True
add_function_parentheses = add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 90
python_trailing_comma_in_multi_line_signatures = False
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]              # types of other libraries in signatures
suppress_warnings = ["misc.highlighting_failure"]        # code with an ellipsis
copybutton_exclude = ".linenos, .gp, .go"

smartquotes = False                                      # -- is no dash in a command
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = [str(HERE / "static")]
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_copy_source = html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = dict(footer_icons=[], navigation_with_keys=True, light_css_variables={"font-stack": "system-ui, sans-serif"})
pygments_style, pygments_dark_style = "friendly", "github-dark"

TRANSPOSE = '<mi mathvariant="normal" style="font-family: sans-serif">T</mi>'      # ⊤ floats where there is no font for mathematics


def equation(display):
    "A visitor that writes a node of TeX as MathML."
    def visit(self, node):
        number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
        mathml = convert(node.astext(), display=display).replace("<mo>&#x022A4;</mo>", TRANSPOSE)
        self.body.append(f'<div class="math">{mathml}{number}</div>' if display == "block" else mathml)
        raise nodes.SkipNode
    return visit


def name_cells(app, doctree):
    "A cell of a notebook can be linked to by its id."
    for cell in doctree.findall(nodes.container):
        if name := cell.get("cell_metadata", {}).get("anchor"):
            cell["ids"].append(name)


def setup(app):
    app.add_html_math_renderer("mathml", (equation("inline"), None), (equation("block"), None))
    app.connect("doctree-read", name_cells)
