"""Charts: whole XML, as many marks as points, labels escaped, round ticks, the same bytes every time."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from stillroom.pipeline.report.bars import bars, histogram, stacked
from stillroom.pipeline.report.charts import Level, Series, chart, reliability, wilson
from stillroom.pipeline.report.scales import Axis, linear_ticks, log_ticks
from stillroom.pipeline.report.svg import SERIES, WIDTH

SVG = "{http://www.w3.org/2000/svg}"
NASTY = """a<b & "c" 'd' </text>"""


def drawn(svg: str) -> ElementTree.Element:
    """The parsed drawing, held to what every figure has."""
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    title, described = root[0], root[1]
    assert (title.tag, described.tag) == (f"{SVG}title", f"{SVG}desc")
    assert root.get("aria-labelledby") == f"{title.get('id')} {described.get('id')}"
    assert "prefers-color-scheme:dark" in svg
    assert "nan" not in svg.lower()
    for text in root.iter(f"{SVG}text"):  # nothing begins off the drawing
        assert 0 <= float(text.get("x", "0")) <= WIDTH
    return root


def count(root: ElementTree.Element, tag: str, *classes: str) -> int:
    return sum({*classes} <= {*element.get("class", "").split()} for element in root.iter(f"{SVG}{tag}"))


def words(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_points_lines_bands_and_levels() -> None:
    series = [
        Series("one", [1, 2, 3], [1.0, 2.0, 3.0], [0.5, 1.5, 2.5], [1.5, 2.5, 3.5]),
        Series("two", [1, 10], [2.0, 2.5], kind="both"),
        Series("strip", [1, 10], [1.0, 1.5], [0.9, 1.4], [1.1, 1.6], kind="band"),
    ]
    root = drawn(chart("t", "d", Axis("x", log=True), Axis("y"), series, levels=[Level("floor", 0.7, dashed=True)]))
    assert count(root, "circle", "s0") == 3 + 1, "three points and the legend"
    assert count(root, "path", "s1", "fill") == 2 + 1
    assert count(root, "line", "s0", "stroke") == 3 * 3, "an interval is a line and two ends"
    assert count(root, "path", "s2", "band") == 1
    assert count(root, "line", "level", "dashed") == 1 + 1
    assert {"one", "two", "strip", "floor", "x", "y", "t"} <= {*words(root)}


def test_labels_are_escaped_everywhere() -> None:
    figures = [
        chart(NASTY, NASTY, Axis(NASTY), Axis(NASTY), [Series(NASTY, [1], [1]), Series("b", [2], [2])], levels=[Level(NASTY, 1)]),
        bars(NASTY, NASTY, Axis(NASTY), {NASTY: 1.0}),
        stacked(NASTY, NASTY, Axis(NASTY), {NASTY: {NASTY: 1.0}}),
    ]  # fmt: skip
    for svg in figures:
        assert words(drawn(svg)).count(NASTY) >= 3


def test_more_series_than_colours_differ_in_shape() -> None:
    many = [Series(f"s{index}", [index], [index]) for index in range(SERIES + 2)]
    root = drawn(chart("t", "d", Axis("x"), Axis("y"), many))
    first = [e for e in root.iter() if e.get("class", "").startswith("s0 ")]
    assert {element.tag for element in first} == {f"{SVG}circle", f"{SVG}path"}


def test_bars_grow_from_zero_both_ways() -> None:
    root = drawn(bars("t", "d", Axis("x"), {"up": 2.0, "down": -1.0}, intervals={"up": (1.5, 2.5)}))
    up, down = (e for e in root.iter(f"{SVG}rect") if "s0" in e.get("class", ""))
    zero = float(up.get("x", ""))
    assert float(down.get("x", "")) + float(down.get("width", "")) == pytest.approx(zero, abs=0.02)
    assert float(up.get("width", "")) == pytest.approx(2 * float(down.get("width", "")), abs=0.03)
    assert count(root, "line", "whisker") == 3


def test_stacked_parts_add_up_and_small_ones_go_together() -> None:
    rows = {"a": {f"p{index}": float(index + 1) for index in range(10)}, "b": {"p9": 5.0}}
    root = drawn(stacked("t", "d", Axis("bytes"), rows))
    assert count(root, "rect", "fill") == SERIES + (SERIES + 1), "eight in the legend, eight of a, one of b"
    assert {"the rest", "55.0", "5.0"} <= {*words(root)}
    assert "p0" not in words(root)


def test_histogram_has_a_bar_for_every_count_above_zero() -> None:
    root = drawn(histogram("t", "d", Axis("x"), Axis("rows"), [0, 1, 2, 3], [5, 0, 7]))
    assert count(root, "rect", "s0") == 2
    with pytest.raises(ValueError, match="want 4 edges, 3 came"):
        histogram("t", "d", Axis("x"), Axis("rows"), [0, 1, 2], [5, 0, 7])


def test_reliability_leaves_empty_bins_out() -> None:
    root = drawn(reliability("t", "d", [("student", ([10, 0, 30], [1.0, 0.0, 27.0], [2, 0, 25]))]))
    assert count(root, "circle", "s0") == 2 + 1
    low, high = wilson(0.2, 10)
    assert (low, high) == pytest.approx((0.05668, 0.50984), abs=1e-4)  # Wilson's interval of 2 in 10


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (4.66, 5.72, ["4.8", "5.0", "5.2", "5.4", "5.6"]),
        (0.1, 1.3, ["0.25", "0.50", "0.75", "1.00", "1.25"]),
        (-400.0, 110.0, ["\u2212400", "\u2212300", "\u2212200", "\u2212100", "0", "100"]),
        (0.0, 210_000.0, ["0", "50 k", "100 k", "150 k", "200 k"]),
        (0.0, 0.0021, ["0.0000", "0.0005", "0.0010", "0.0015", "0.0020"]),
        (0.0, 2.2e6, ["0.0", "0.5 M", "1.0 M", "1.5 M", "2.0 M"]),
    ],
)
def test_linear_ticks_are_round(low: float, high: float, labels: list[str]) -> None:
    found = linear_ticks(low, high, 5)
    assert [label for _, label in found] == labels
    assert all(low <= value <= high for value, _ in found)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 4.0, ["1", "10", "100", "1,000", "10,000"]),
        (-5.0, 0.0, ["10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1", "1"]),
        (-0.1, 1.1, ["1", "2", "5", "10"]),
        (0.0, 12.0, ["1", "100", "10,000", "10⁶", "10⁸", "10¹⁰", "10¹²"]),
    ],
)
def test_log_ticks_are_powers_and_their_parts(low: float, high: float, labels: list[str]) -> None:
    found = log_ticks(low, high, 7)
    assert [label for _, label in found] == labels
    assert all(low - 1e-6 <= math.log10(value) <= high + 1e-6 for value, _ in found)


def test_a_narrow_logarithmic_axis_falls_back_to_round_values() -> None:
    labels = [label for _, label in Axis("x", log=True).scale([30, 99], 0, 600).ticks(6)]
    assert labels == ["30", "40", "50", "60", "70", "80", "90", "100"]


def test_what_can_not_be_shown_is_refused() -> None:
    for values, axis in (([1.0, math.nan], Axis("y")), ([0.0, 1.0], Axis("y", log=True)), ([], Axis("y"))):
        with pytest.raises(ValueError, match=r"axis 'y' (can not show|has nothing)"):
            chart("t", "d", Axis("x"), axis, [Series("s", [1.0] * len(values), values)])


def test_the_same_chart_is_the_same_bytes() -> None:
    svg = [bars("t", "d", Axis("x"), {"a": 1 / 3, "b": 2 / 3}) for _ in range(2)]
    assert svg[0] == svg[1]
    assert not re.search(r"\d\.\d{3,}", svg[0].split("</style>")[1].replace("0.333", "").replace("0.667", "")), (
        "two decimals"
    )
