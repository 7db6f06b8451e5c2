"""How Sphinx builds these pages: ``tox -e docs`` does it."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "PyBreaker"
copyright = "the PyBreaker contributors"
html_theme = "furo"
html_title = "PyBreaker"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["phone.css"]
html_show_sphinx = False

extensions = ["sphinx.ext.autodoc"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
# Docstrings put names between single backticks: those that the reference has are links.
default_role = "py:obj"


def mark_code(app, what, name, obj, options, lines):
    """Put a "::" before each indented paragraph of a docstring: it is code."""
    text, lines[:] = list(lines), []
    is_code = False
    for before, line in zip(["", *text], text):
        is_indented = line.startswith("    ")
        if is_indented and not is_code and not before:
            lines += ["::", ""]
        if line:
            is_code = is_indented
        lines.append(line)


def setup(app):
    app.connect("autodoc-process-docstring", mark_code)
