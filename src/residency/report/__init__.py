"""Draw run.json: one self-contained page and its Markdown twin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from residency.report.compare import render_comparison
    from residency.report.html import render_html
    from residency.report.markdown import render_markdown

__all__ = ["render_comparison", "render_html", "render_markdown"]

_HOMES = {
    "render_comparison": "residency.report.compare",
    "render_html": "residency.report.html",
    "render_markdown": "residency.report.markdown",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
