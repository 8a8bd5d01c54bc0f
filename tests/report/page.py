"""Reading a drawn page back, and changing a record: shared by the report's tests."""

from __future__ import annotations

import copy
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """The tags and text of a page; scripts and styles apart."""

    VOID = frozenset({"meta", "link", "input", "img", "br"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.open: list[str] = []
        self.crooked: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.crooked.append(tag)

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        self.raw.get(inside, self.text).append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def changed(record: dict[str, Any], path: tuple, put: Any) -> dict[str, Any]:
    """A copy with the entry at a path replaced, or left out if `put` is the type `object`."""
    copied = copy.deepcopy(record)
    at: Any = copied
    for key in path[:-1]:
        at = at[key]
    if put is object:
        del at[path[-1]]
    else:
        at[path[-1]] = put
    return copied
