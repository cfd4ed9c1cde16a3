"""The documentation site, `make docs`: Sphinx with Furo, pages in Markdown (MyST), the reference from docstrings."""

from __future__ import annotations

import html
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.util import logging

import esam_kernels

project = "esam_kernels"
copyright = "the authors of esam_kernels, Apache-2.0"
version = release = esam_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
root_doc = "index"
html_theme = "furo"
html_title = f"esam_kernels {version}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
smartquotes = False  # quotation marks in signatures and arguments stay those of Python

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = []
if not (Path(__file__).parents[1] / "benchmarks/results/study/cost_and_accuracy.png").exists():
    suppress_warnings.append("image.not_readable")  # the study's page stands before its chart is drawn from rows

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 88  # a longer one has a line for each argument
napoleon_numpy_docstring = False

# A reference to a name of this package has to lead somewhere; other projects' pages are not at hand in a build without
# network.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!esam_kernels\.).*"), (r"py:.*", r".*\._.*")]

PUBLIC_MODULES = ("esam_kernels", "esam_kernels.diagnostics", "esam_kernels.schedules", "esam_kernels.ops")

# What a public name hands out.
HANDED_OUT = ("esam_kernels.ranking.base.Head",)

LONGEST_TABLE = 15  # rows that a page shows at once; a longer table is folded

logger = logging.getLogger(__name__)


def undocumented(documented: set[str]) -> list[str]:
    """The public names that have no entry among ``documented``, or no docstring."""
    missing = []
    for module in map(import_module, PUBLIC_MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            full = f"{module.__name__}.{name}"
            if full not in documented or not (inspect.getdoc(value) or "").strip():
                missing.append(full)
    return missing


def internal(documented: set[str]) -> list[str]:
    """The names among ``documented`` that are neither public nor members of what is."""
    modules = list(map(import_module, PUBLIC_MODULES))
    public = {f"{module.__name__}.{name}" for module in modules for name in module.__all__} | set(HANDED_OUT)
    return sorted(name for name in documented if not any(f"{name}.".startswith(f"{known}.") for known in public))


def check_public_names(app: Any, env: Any) -> None:
    """One warning, which fails the build, for each public name that the reference leaves out, and for each internal."""
    objects = list(env.get_domain("py").get_objects())
    for name in undocumented({name for name, *_ in objects}):
        logger.warning("%s is public and has no entry in the reference", name)
    # -1: the place where a public name is defined.
    for name in internal({name for name, _, kind, *_, priority in objects if kind != "module" and priority != -1}):
        logger.warning("%s has an entry in the reference and is not public", name)


def fold_long_tables(app: Any, doctree: nodes.document) -> None:
    """A table of more than LONGEST_TABLE rows is closed until the reader opens it; its line says what is in it."""
    for table in list(doctree.findall(nodes.table)):
        rows = sum(len(body.children) for body in table.findall(nodes.tbody))
        if rows > LONGEST_TABLE:
            names = (cell.astext() for head in table.findall(nodes.thead) for cell in head[0])
            columns = " · ".join(filter(None, names))
            line = f"Open the table: {rows} rows ({html.escape(columns)})"
            place = table.parent.index(table)
            table.parent.insert(place + 1, nodes.raw("", "</details>", format="html"))
            opening = f'<details class="long-table"><summary>{line}</summary>'
            table.parent.insert(place, nodes.raw("", opening, format="html"))


def visit_math(self: Any, node: Any) -> None:
    """Equations as MathML, which every current browser shows: no script, and nothing fetched from elsewhere."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    text = node.astext()
    if display == "block" and ("&" in text or r"\\" in text):
        text = rf"\begin{{align*}}{text}\end{{align*}}"
    self.body.append(latex2mathml.converter.convert(text, display=display))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("env-check-consistency", check_public_names)
    app.connect("doctree-read", fold_long_tables)


html_math_renderer = "mathml"
