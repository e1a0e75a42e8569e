from __future__ import annotations

import re
from xml.etree import ElementTree

from hetero_sglang.profiler.sweep import SweepPoint
from hetero_sglang.report.heat_map import render_sweep

SVG = "{http://www.w3.org/2000/svg}"


def point(stable: float, similarity: float, ratio: float, kl: float | None) -> SweepPoint:
    top1 = None if kl is None else 1 - kl
    return SweepPoint(1024, stable, similarity, 1, 2, 3, 4, 0.25, ratio, kl, top1)


POINTS = [
    point(0.4, 0.5, 0.3, 0.25),
    point(0.4, 0.6, 0.3, 0.125),
    point(0.5, 0.5, 0.3, None),
    point(0.5, 0.6, 0.3, 0.5),
]


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_every_cell_bears_its_number_and_the_best_is_framed() -> None:
    svg = render_sweep(POINTS, title="a <model>")

    shown = texts(svg)
    assert shown[0] == "a <model>"
    titles = ["floor (top 1024)", "KL at ratio 0.3", "same top token at ratio 0.3"]
    assert [text for text in shown if text in titles] == titles
    for number in ("25.0%", "0.2500", "0.1250", "0.5000", "75.0%", "87.5%", "50.0%"):
        assert number in shown
    # The point under its floor, in the panels of KL and of top 1.
    assert shown.count("-") == 2
    # All floors are equal, so none is the best.
    frames = [
        (group.get("transform"), rect.get("x"), rect.get("y"))
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
        for rect in group.iter(f"{SVG}rect")
        if rect.get("class") == "best"
    ]
    assert len(frames) == 2
    # In both panels it is the left column (0.4) and the lower row (0.6).
    assert len({frame[1:] for frame in frames}) == 1


def test_numbers_stay_readable_on_the_darkest_cell() -> None:
    shades = [
        float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', render_sweep(POINTS))
    ]

    assert 0 < min(shades) < max(shades) <= 0.55


def test_each_set_size_has_its_row_and_each_ratio_its_panels() -> None:
    points = [
        SweepPoint(top_k, 0.5, 0.5, 1, 2, 3, 4, 0.1, ratio, 0.5, 0.5)
        for top_k in (512, 1024)
        for ratio in (0.3, 0.5)
    ]

    root = ElementTree.fromstring(render_sweep(points))

    groups = [group.get("transform") for group in root.iter(f"{SVG}g")]
    assert len(groups) == len(set(groups)) == 2 * 5
    assert int(root.get("width", "0")) > 0
