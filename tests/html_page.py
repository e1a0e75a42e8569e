"""Reads a report's page the way its readers do: text, tooltips, headline numbers."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_VOID = {"meta", "img"}


class Page(HTMLParser):
    """A page's parts; requires that its tags are balanced.

    Attributes:
        text: All text, tooltips and style sheet included.
        tooltips: Of SVG elements, in order.
        facts: Headline numbers, each with what it is of: description to number.
        images: Attributes of every picture.
        elements: Every element's name, attributes and, so far as it is known, classes.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tooltips: list[str] = []
        self.facts: dict[str, str] = {}
        self.images: list[dict[str, str]] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self._open: list[str] = []
        self._described = ""
        self.feed(html)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        inner = self._open[-1] if self._open else ""
        if inner == "title" and "svg" in self._open:
            self.tooltips.append(data)
        elif inner == "dt":
            self._described = data
        elif inner == "dd":
            self.facts[self._described] = data

    def count(self, tag: str, name: str = "") -> int:
        """Elements of a kind, and of a class if one is named."""
        return sum(
            tag == found and (not name or name in attributes.get("class", "").split())
            for found, attributes in self.elements
        )

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag == "img":
            self.images.append(attributes)


def says_nan(html: str) -> bool:
    """Whether a number on the page is none; pictures may spell anything."""
    return re.search(r"\b(nan|inf)\b", re.sub(r'base64,[^"]*', "", html), re.IGNORECASE) is not None
