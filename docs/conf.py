"""Sphinx's settings: python -m sphinx -W --keep-going -b html docs build/docs (packages: docs/requirements.txt)."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mpitp                                                    # noqa: E402

project = "mpitp"
author = "The mpitp developers"
copyright = author
release = version = mpitp.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode", "numpydoc"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["packaging"]
myst_heading_anchors = 3

templates_path = ["_templates"]
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"                                      # the docstrings name the types
numpydoc_show_class_members = False                             # autodoc lists them

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"mpitp {release}"
html_copy_source = False
html_show_sphinx = False
pygments_style = "tango"
pygments_dark_style = "monokai"


def plain_docstring(app, what, name, obj, options, lines):
    """Make a docstring that people read as it stands into reStructuredText with the same look.

    Stars and bars are part of formulas, never markup, and an indented block behind a blank line is a figure or code.
    """
    last, literal = "", False
    for place, line in enumerate(lines):
        indented = line.startswith("    ")
        if line and not indented:
            literal = False
        if indented and not literal and not lines[place - 1].strip() and last and not last.startswith(" "):
            literal = True
            lines[place - 1] = "\n::\n"
        if line.strip():
            last = line
        if not literal and not line.lstrip().startswith((">>>", "...")):
            lines[place] = lines[place].replace("*", r"\*").replace("|", r"\|")
    lines[:] = "\n".join(lines).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)        # before numpydoc
