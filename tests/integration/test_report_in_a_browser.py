"""The page of a profile in a real browser: at a desk and on a phone, light and dark."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from hetero_sglang.profile import shipped_profiles
from hetero_sglang.report import render_report
from hetero_sglang.report.style import STYLE
from tests.browser import Browser, Look, find_chromium
from tests.synthetic_behaviour import synthetic_behaviour

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium or Chrome was found (apt-get install chromium)"
)

DESK, PHONE = 1200, 390


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's page at the size that the command makes by default."""
    profile = shipped_profiles()["smollm2-135m-instruct"]
    behaviour = synthetic_behaviour(profile, num_steps=64, num_bins=64)
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render_report(profile, behaviour=behaviour), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[DESK, PHONE], ids=["desk", "phone"])
def width(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["light", "dark"])
def is_dark(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def look(browser: Browser, page: Path, width: int, is_dark: bool) -> Look:
    return browser.look(page, width=width, is_dark=is_dark)


def hues(*, is_dark: bool) -> dict[str, tuple[int, int, int]]:
    """Colours of the style sheet by name."""
    light, _, dark = STYLE.partition("prefers-color-scheme: dark")
    found = re.findall(r"--([\w-]+): #([0-9a-f]{6})", dark if is_dark else light)
    return {
        name: (int(value[:2], 16), int(value[2:4], 16), int(value[4:], 16)) for name, value in found
    }


def count_colours(look: Look) -> Counter[object]:
    counts = look.image.getcolors(look.image.width * look.image.height)
    assert counts is not None
    return Counter({colour: count for count, colour in counts})


def test_the_background_follows_the_readers_choice(look: Look, is_dark: bool) -> None:
    colours = count_colours(look)
    (most_common, count), *_ = colours.most_common(1)

    assert most_common == hues(is_dark=is_dark)["page"]
    # Dark is below a quarter of full brightness, light above three quarters.
    assert all(value < 64 if is_dark else value > 191 for value in most_common)
    assert look.image.getpixel((2, 2)) == most_common
    # Much of a page is background, but not all of it.
    assert 0.3 < count / colours.total() < 0.95


def test_roles_and_curves_are_drawn_in_their_colours(look: Look, is_dark: bool) -> None:
    colours = count_colours(look)

    for name, colour in hues(is_dark=is_dark).items():
        if name.endswith("-hue"):
            # At least a swatch; SmolLM2 has no anchor, whose colour its histogram shares.
            assert colours[colour] >= 50, name


def test_every_picture_can_be_decoded(look: Look) -> None:
    assert look.num_broken_images == 0


def test_nothing_but_wide_boxes_scrolls_sideways(look: Look, width: int) -> None:
    assert look.scroll_width == width


def test_nothing_is_asked_of_anybody_and_nobody_complains(look: Look, page: Path) -> None:
    assert look.requests == (page.as_uri(),)
    assert look.complaints == ()


def test_a_broken_page_is_seen_to_be_broken(browser: Browser, page: Path, tmp_path: Path) -> None:
    """The checks above can fail: each of these faults shows in what they look at."""
    broken = tmp_path / "broken.html"
    faults = (
        '<div style="width: 2000px">wide</div><img src="data:image/png;base64,AAAA">'
        '<link rel="stylesheet" href="file:///no/such/style.css">'
        '<script>console.error("wrong")</script><style>body { background: red; }</style>'
    )
    html = page.read_text(encoding="utf-8").replace("</body>", faults + "</body>")
    broken.write_text(html, encoding="utf-8")

    look = browser.look(broken, width=PHONE, is_dark=True)

    assert look.scroll_width >= 2000
    assert look.num_broken_images == 1
    assert look.requests == (broken.as_uri(), "file:///no/such/style.css")
    assert any("wrong" in complaint for complaint in look.complaints)
    assert look.image.getpixel((2, 2)) == (255, 0, 0)
