from __future__ import annotations

import numpy as np
import pytest

from hetero_sglang.report.curves import Band, Line, band_chart, sparkline
from tests.html_page import Page


def corners(page: Page, tag: str) -> list[tuple[float, float]]:
    (points,) = (attributes["points"] for found, attributes in page.elements if found == tag)
    return [(float(x), float(y)) for x, y in (point.split(",") for point in points.split())]


@pytest.mark.parametrize("num_steps", [1, 2, 64])
def test_a_curve_spans_the_chart_with_a_corner_for_each_step(num_steps: int) -> None:
    values = np.linspace(0.0, 1.0, num_steps)[:, None]

    page = Page(band_chart([Band("stable", values)], [], label=""))

    curve = corners(page, "polyline")
    assert len(curve) == num_steps + 2
    assert (curve[0][0], curve[-1][0]) == (30, 430)
    assert [x for x, _ in curve] == sorted(x for x, _ in curve)
    # 1 is at the top, 0 at the bottom.
    assert curve[0][1] == 188
    assert curve[-1][1] == pytest.approx(188 - 180 * values[-1, 0])


def test_the_band_lies_between_the_quartiles() -> None:
    page = Page(band_chart([Band("stable", np.array([[0.0, 0.25, 0.5, 0.75, 1.0]]))], [], label=""))

    assert {y for _, y in corners(page, "polygon")} == {8 + 180 * 0.25, 8 + 180 * 0.75}
    assert page.tooltips == ["step 1: stable 0.50 (0.25 to 0.75)"]


def test_levels_are_named_with_their_number() -> None:
    lines = [Line("threshold", "threshold", 0.5), Line("chance", "random sets", 0.256)]

    page = Page(band_chart([Band("all", np.ones((3, 1)))], lines, label="what it shows"))

    assert page.tooltips[:2] == ["threshold 0.50", "random sets 0.26"]
    assert page.count("line", "threshold") == page.count("line", "chance") == 1
    assert page.elements[1][1]["aria-label"] == "what it shows"


def test_a_sparkline_has_its_level_only_where_there_is_one() -> None:
    values = np.array([0.5, 1.0])

    assert Page(sparkline(values, None, title="numbers")).count("line") == 0
    page = Page(sparkline(values, 0.5, title="numbers"))
    assert page.count("line", "threshold") == 1
    assert page.tooltips == ["numbers"]
