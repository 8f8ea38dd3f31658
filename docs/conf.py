"""How the site is built, by ``python -m docs``: the README, the pages of this folder, lessons, results and reference.

The sources are those of the whole repository, so that a link that works in the repository works on the site.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

project = "lance-ref"
author = "The lance-ref authors"
release = importlib.metadata.version("lance-ref")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "numpydoc"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/**",
    "notebooks/*.ipynb",
    "benchmarks/README.md",
    "experiments/results/*.md",
]
exclude_patterns = ["docs/contents.md", "docs/templates"]
templates_path = [str(HERE / "templates")]
suppress_warnings = [
    "config.cache",  # the template of the reference is given functions
    "myst.header",  # committed tables begin with a heading of the third level
]

# ---- pages ---------------------------------------------------------------------------------------------------

nb_execution_mode = "off"  # lessons are shown with the outputs that are committed
nb_ipywidgets_js: dict[str, Any] = {}  # it would come from the network
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# ---- reference -----------------------------------------------------------------------------------------------

autodoc_inherit_docstrings = False  # those of Matplotlib use roles of their own
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
numpydoc_show_class_members = False
autosummary_generate = True
add_module_names = False
toc_object_entries_show_parents = "hide"


def public(fullname: str) -> dict[str, str]:
    """The names of a module's ``__all__``, and the module in which each is defined."""
    module = importlib.import_module(fullname)
    found = {}
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if not inspect.ismodule(thing):
            place = getattr(thing, "__module__", None) if callable(thing) else fullname
            found[name] = place if isinstance(place, str) else fullname
    return found


FOR_METHODS = ("check", "cost_model", "peak", "ranks", "reports", "rules", "steps")
IMPORTED_BY_OTHERS = ("lance_ref", *(f"analysis.{name}" for name in FOR_METHODS))
"""What other people's code imports. The rest of ``analysis``, and the experiments, are commands with a help text."""


def documented(place: str) -> bool:
    """Whether a module has a page of its own: others import it, and no part of its name begins with an underscore."""
    parts = place.split(".")
    known = place == "analysis" or any(place == name or place.startswith(name + ".") for name in IMPORTED_BY_OTHERS)
    return known and not any(part.startswith("_") for part in parts)


def here(fullname: str) -> str | None:
    """What the page of a module describes, for ``:members:``, or None for nothing.

    Without ``__all__`` that is all that the module defines. With it, what it defines and what has no page elsewhere.
    """
    if not hasattr(importlib.import_module(fullname), "__all__"):
        return ""
    names = [name for name, place in public(fullname).items() if place == fullname or not documented(place)]
    return ", ".join(names) or None


def elsewhere(fullname: str) -> list[str]:
    """Public names that the pages of other modules describe, as autosummary wants them."""
    found = [f"{place}.{n}" for n, place in public(fullname).items() if place != fullname and documented(place)]
    return [name.removeprefix(fullname + ".") for name in found]


def not_ours(_app: Any, _kind: str, _name: str, thing: Any, _skip: bool, _options: Any) -> bool | None:
    """Leave methods of other libraries out, which some of our classes are given by their base."""
    place = getattr(thing, "__module__", None)
    return True if isinstance(place, str) and place.partition(".")[0] == "matplotlib" else None


def no_signature(_app: Any, kind: str, *_: Any) -> tuple[None, None] | None:
    """Keep numpydoc from looking for the signature of an alias of a type, ``Ranks = tuple[int, ...]``."""
    return (None, None) if kind == "data" else None


autosummary_context = {"here": here, "elsewhere": elsewhere, "documented": documented}

# ---- what is shown -------------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = "lance-ref"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"README": []}
html_context = {"default_mode": "auto"}
html_theme_options = {
    "navigation_with_keys": False,
    "collapse_navigation": True,
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": ["page-toc"],
    "navbar_end": ["theme-switcher"],
    "footer_end": [],
}

MATHJAX = "tex-svg.js"  # one file with all shapes of letters in it: nothing is loaded later
mathjax_path = MATHJAX
mathjax3_config = {"options": {"enableMenu": False}}


def mathjax_file() -> Path:
    """MathJax as the installed package has it."""
    for file in importlib.metadata.files("django-static-mathjax") or ():
        if file.name == MATHJAX and file.parent.name == "es5":
            return Path(str(file.locate()))
    raise FileNotFoundError(f"django-static-mathjax has no es5/{MATHJAX}: python -m pip install -e '.[docs]'")


CONTENTS = {
    root_doc: (HERE / "contents.md").read_text(encoding="utf-8"),
    "docs/decisions/README": "\n```{toctree}\n:maxdepth: 1\n:glob:\n\n0*\n```\n",
}
"""Tables of contents that a reader of the repository need not see."""


def follow(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Lead a reference by an alias, ``lance_ref.trace``, to the page of the module that defines the thing."""
    target = node.get("reftarget", "")
    place, _, name = target.rpartition(".")
    if node.get("refdomain") != "py" or not documented(place):
        return None
    try:
        thing = getattr(importlib.import_module(place), name)
        home = f"{thing.__module__}.{thing.__qualname__}"
    except (ImportError, AttributeError):
        return None
    domain = env.get_domain("py")
    return None if home == target else domain.resolve_xref(env, node["refdoc"], app.builder, "obj", home, node, text)


def complete(_app: Any, name: str, source: list[str]) -> None:
    """Add what the site needs beside the files of the repository: contents, and titles of committed tables."""
    source[0] += CONTENTS.get(name, "")
    if name.startswith("experiments/results/") and not source[0].startswith("# "):
        source[0] = f"# {name.rpartition('/')[2].replace('_', ', ')}\n\n{source[0]}"
    source[0] = source[0].replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")  # a number and its error on one line


def finish(app: Any, error: Exception | None) -> None:
    """MathJax beside the pages, and an ``index.html`` that leads to the first one."""
    if error is None:
        shutil.copyfile(mathjax_file(), Path(app.outdir) / "_static" / MATHJAX)
        head = '<!doctype html><meta charset="utf-8"><title>lance-ref</title>'
        move = '<meta http-equiv="refresh" content="0; url=README.html"><a href="README.html">lance-ref</a>'
        (Path(app.outdir) / "index.html").write_text(f"{head}{move}\n", encoding="utf-8")


def setup(app: Any) -> None:
    shutil.rmtree(HERE / "reference", ignore_errors=True)  # pages of modules that may be gone
    app.connect("source-read", complete)
    app.connect("missing-reference", follow)
    app.connect("autodoc-process-signature", no_signature, priority=100)
    app.connect("autodoc-skip-member", not_ours)
    app.connect("build-finished", finish)
