"""The page of a profile: whole, self-contained, and with the numbers of the profile."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from hetero_sglang import cli
from hetero_sglang.profile import HeadProfile, Provenance, shipped_profiles
from hetero_sglang.profile_report import render_report

if TYPE_CHECKING:
    from pathlib import Path

NAME = "smollm2-135m-instruct"


class Page(HTMLParser):
    """Counts elements, notes classes and tooltips, and requires that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str] = []
        self.tooltips: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        self.classes += [value or "" for name, value in attrs if name == "class"]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title" and "svg" in self.open:
            self.tooltips.append(data)
        self.text += data


@pytest.fixture(scope="module")
def profile() -> HeadProfile:
    return shipped_profiles()[NAME]


def test_the_page_shows_every_head_once_in_each_map(profile: HeadProfile) -> None:
    page = Page(render_report(profile))
    roles = [text for text in page.tooltips if re.match(r"layer \d+, head \d+: \w+( of|,|$)", text)]
    assert len(roles) == 90
    assert sum("pivot of" in text for text in roles) == 30
    assert sum("satellite of" in text for text in roles) == 58
    assert sum("volatile" in text for text in roles) == 2
    assert sum("weight" in text for text in page.tooltips) == 90
    # Three by three for each layer.
    assert sum(", heads " in text for text in page.tooltips) == 270
    binned = [re.search(r": (\d+) heads", text) for text in page.tooltips]
    assert sum(int(found[1]) for found in binned if found) == 90


def test_the_page_has_the_numbers_of_the_profile(profile: HeadProfile) -> None:
    page = Page(render_report(profile, ratios=(0.3,), prompt_tokens=(10_000,)))
    assert "A prompt of 10,000 tokens" in page.text
    assert f"{int((27 - 2 - 30 * 66 / 256) * 10_000 / 88):,}" in page.text
    assert "not above the floor, 35.6%" in page.text
    assert profile.digest[:16] in page.text
    assert "hetero-sglang" in page.text


def test_nothing_is_fetched_and_nothing_runs(profile: HeadProfile) -> None:
    text = render_report(profile)
    assert "<script" not in text
    assert "url(" not in text
    names = {name for name, _ in Page(text).attributes}
    assert not names & {"src", "href", "xlink:href"}
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_names_cannot_break_out_of_the_page(profile: HeadProfile) -> None:
    bad = Provenance(model="<script>alert(1)</script>", tool='"><img src=x>', texts=("<b>",))
    text = render_report(dataclasses.replace(profile, provenance=bad))
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


def test_what_was_not_recorded_is_said(profile: HeadProfile) -> None:
    bare = dataclasses.replace(profile, stability=None, similarity=None, thresholds=None)
    assert Page(render_report(bare)).text.count("Not recorded in this profile.") == 2


def test_report_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert cli.main(["profile", "report", NAME, "--html", str(out)]) == 0
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert str(out) in capsys.readouterr().out
    assert cli.main(["profile", "report", NAME, "--html", str(tmp_path / "no" / "p.html")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
