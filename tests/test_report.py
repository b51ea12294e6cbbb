"""The report page and the grid: complete, self-contained, and safe with any text."""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ladd import report


def picture(shade: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), shade, np.uint8))


def page(**changes: Any) -> report.Page:
    numbers = {
        "fid": {"mean": 3.25, "std": 0.5},
        "recall": {"mean": math.nan, "std": math.nan},
        "seconds": {"mean": 0.01, "std": 0.0},
    }
    content: dict[str, Any] = {
        "title": "A <title> & more",
        "lead": "What was done.",
        "facts": [("0.01 s", "a picture")],
        "prompts": ["red heart", 'cat "quoted" <b>'],
        "strips": [
            report.Strip("teacher", [picture(0), picture(50)], "50 steps"),
            report.Strip("student", [picture(100), picture(255)], highlight=True),
        ],
        "charts": [report.Chart("Loss", [report.Series("student", range(100), np.sin(np.arange(100)))], smooth=True)],
        "tables": [report.Table("Quality", "All rows.", {"student": numbers}, frozenset({"student"}))],
        "notes": ["OpenMoji, CC BY-SA 4.0"],
        "sections": {"pictures": "Rows are models."},
    }
    return report.Page(**{**content, **changes})


class Tags(HTMLParser):
    """Checks that tags close in order and collects what they refer to."""

    VOID = frozenset({"meta", "img", "br", "line", "polyline", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(tmp_path: Any) -> None:
    path = tmp_path / "report.html"
    report.write_html(path, page())
    text = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert "script" not in tags.seen and "link" not in tags.seen
    assert len(tags.references) == 4 and all(r.startswith("data:image/png;base64,") for r in tags.references)
    assert not re.search(r"https?://|url\(|@import", text)
    shades = [np.asarray(Image.open(io.BytesIO(base64.b64decode(r.split(",")[1]))))[0, 0, 0] for r in tags.references]
    assert shades == [0, 50, 100, 255]
    assert "prefers-color-scheme: dark" in text


def test_page_escapes_text() -> None:
    text = report.page_html(page())
    assert "A &lt;title&gt; &amp; more" in text
    assert "<b>" not in text.replace("<b>0.01 s</b>", "")


def test_table_shows_means_deviations_and_gaps() -> None:
    text = report.page_html(page())
    assert "3.25 ± 0.50" in text
    assert "<td>–</td>" in text  # the recall that could not be measured
    assert "KID" not in text  # a number that no row has gets no column


def test_strip_with_a_missing_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match="'teacher' must have 2 pictures, one a prompt, got 1"):
        report.page_html(page(strips=[report.Strip("teacher", [picture(0)])]))


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(svg)
    return [[tuple(map(float, p.split(","))) for p in line.attrib["points"].split()] for line in root.iter("polyline")]


def test_chart_places_values() -> None:
    chart = report.Chart("c", [report.Series("a", [0, 5, 10], [1.0, 3.0, 2.0]), report.Series("b", [0, 10], [0.0, 4.0])])
    first, second = polylines(report.chart_svg(chart))
    assert [x for x, _ in first] == pytest.approx([52, 250, 448], abs=0.1)
    heights = [y for _, y in first]
    assert heights[1] < heights[2] < heights[0]  # larger values are higher up
    assert second[0][1] > heights[0] and second[1][1] < heights[1]
    assert (heights[0] - heights[1]) == pytest.approx((second[0][1] - second[1][1]) / 2, abs=0.2)


def test_chart_on_a_logarithmic_axis_spaces_ratios_evenly() -> None:
    chart = report.Chart("c", [report.Series("a", [1, 2, 4], [9.0, 6.0, 3.0])], log_x=True, points=True)
    svg = report.chart_svg(chart)
    x = [x for x, _ in polylines(svg)[0]]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert svg.count("<circle") == 3


def test_chart_leaves_out_what_is_not_finite_and_survives_constants() -> None:
    chart = report.Chart("c", [report.Series("a", [1, 2, 3], [math.nan, 2.0, math.inf]), report.Series("none", [], [])])
    (line,) = polylines(report.chart_svg(chart))
    assert len(line) == 1 and all(map(math.isfinite, line[0]))
    assert "no values" in report.chart_svg(report.Chart("c", [report.Series("a", [1], [math.nan])]))


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    chart = report.Chart("c", [report.Series("a", range(10_000), range(10_000))])
    (line,) = polylines(report.chart_svg(chart))
    assert len(line) < 700
    assert line[-1][0] == pytest.approx(448, abs=0.1)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3.0, 7.0, [-2, 0, 2, 4, 6]), (0.0, 1234.0, [0, 500, 1000]), (2.0, 2.0, [2.0])],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert report.ticks(low, high) == pytest.approx(wanted)


def test_running_mean() -> None:
    assert report.running_mean([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]


def test_grid_places_every_picture(tmp_path: Any) -> None:
    content = page()
    report.write_grid(tmp_path / "samples.png", content.prompts, content.strips, cell_size=32)
    sheet = np.asarray(Image.open(tmp_path / "samples.png"))
    height, width = sheet.shape[:2]
    cells = [sheet[height - 38 * (2 - row) + 16, width - 38 * (2 - column) + 10, 0] for row in range(2) for column in range(2)]
    assert cells == [0, 50, 100, 255]
    assert (sheet[height - 38 + 16, width - 3] == (255, 243, 214)).all()  # the highlighted row's background
