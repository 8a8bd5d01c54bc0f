"""Sphinx configuration."""

project = "Residency"
author = "The Residency authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "Residency"
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
nitpicky = False


def _formulas(app, what, name, obj, options, lines):
    """Show the indented formulas of module docstrings as they stand, and take no bar for a substitution."""
    found, literal, before = [], False, ""
    for line in lines:
        if line.strip():
            starts = what == "module" and line.startswith("    ") and found and not found[-1].strip()
            if starts and not literal and not before.startswith(" "):
                found += ["::", ""]
                literal = True
            elif not line.startswith("    "):
                literal = False
            before = line
        found.append(line if literal else line.replace("|", "\\|"))
    lines[:] = found


def setup(app):
    """Connect the hook, after napoleon's."""
    app.connect("autodoc-process-docstring", _formulas, priority=900)
