"""Charts of points and lines: with intervals, bands, reference levels, logarithmic axes; and the reliability diagram.

Every function returns the text of an SVG file that stands alone or in a page, light or dark. Lengths are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from stillroom.pipeline.report.scales import Axis, Scale
from stillroom.pipeline.report.svg import ROW, SERIES, WIDTH, Drawing, width_of

HEIGHT: Final = 420
TOP: Final = 66  # heading and the vertical axis' label
BOTTOM: Final = 52
EDGE: Final = 16
Z: Final = 1.96  # of a 95 % interval


@dataclass(frozen=True, slots=True)
class Series:
    """Points that belong together.

    Attributes:
        name: in the legend; empty: not there.
        x, y: of each point.
        low, high: ends of the interval around each y, if it has one.
        kind: `points`; `line` through them; `both`; `band`: a line in the strip between `low` and `high`.
        colour: which of the eight colours and shapes; None: the next that no other series took.
        dashed: its line is.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    kind: Literal["points", "line", "both", "band"] = "points"
    colour: int | None = None
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line over the whole width: what the points are to be seen against."""

    name: str
    y: float
    dashed: bool = False


def chart(
    title: str, described: str, x: Axis, y: Axis, series: Sequence[Series], *, levels: Sequence[Level] = ()
) -> str:
    """A chart of series and levels.

    Args:
        title: heading.
        described: what it shows, in a sentence, for those who do not see it.
        x, y: the axes.
        series: drawn in this order.
        levels: drawn first.

    Raises:
        ValueError: nothing to show, a value that is not finite, or one at or below 0 on a logarithmic axis.
    """
    names = [name for name in (*(one.name for one in series), *(level.name for level in levels)) if name]
    height = max(HEIGHT, TOP + ROW * len(names) + BOTTOM)
    drawing = Drawing(title, described, height)
    legend = max(map(width_of, names)) + 34 if len(names) > 1 else 0.0
    values = [v for one in series for part in (one.y, one.low or (), one.high or ()) for v in part]
    y_scale = y.scale([*values, *(level.y for level in levels)], height - BOTTOM, TOP)
    left = EDGE + 8 + max(width_of(label) for _, label in y_scale.ticks(6))
    x_scale = x.scale((v for one in series for v in one.x), left, WIDTH - EDGE - legend - (12 if legend else 0))
    frame(drawing, x_scale, y_scale, x.label, y.label)

    at = TOP + ROW / 2
    entry_x = x_scale.stop + 24
    for place, one in _placed(series):
        _draw(drawing, one, place, x_scale, y_scale)
        if one.name and legend:
            if one.kind != "points":
                drawing.line(entry_x - 9, at, entry_x + 9, at, _stroke(one, place))
            if one.kind in ("points", "both"):
                drawing.mark(_shape(place), entry_x, at, _colour(place))
            drawing.text(entry_x + 16, at + 4, one.name)
            at += ROW
    for level in levels:
        style = "level stroke dashed" if level.dashed else "level stroke"
        drawing.line(left, y_scale(level.y), x_scale.stop, y_scale(level.y), style)
        if level.name and legend:
            drawing.line(entry_x - 9, at, entry_x + 9, at, style)
            drawing.text(entry_x + 16, at + 4, level.name)
            at += ROW
    return drawing.finish()


def reliability(title: str, described: str, models: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> str:
    """Reliability diagram: how often the first choice was right, by how sure the model was of it.

    Args:
        title, described: see `chart`.
        models: name, and `[3, bins]` of each: rows, summed confidence and hits of every bin. Empty bins are left out; the
            interval is Wilson's of 95 %.

    Raises:
        ValueError: no bin holds a row.
    """
    series = [Series("calibrated", (0, 1), (0, 1), kind="line", colour=SERIES - 1, dashed=True)]
    for index, (name, (rows, confidence, hits)) in enumerate(models):
        full = [(n, c / n, h / n) for n, c, h in zip(rows, confidence, hits, strict=True) if n > 0]
        if not full:
            raise ValueError(f"reliability of {name}: no bin holds a row")
        ends = [wilson(share, n) for n, _, share in full]
        series.append(
            Series(
                name, [c for _, c, _ in full], [share for *_, share in full], [low for low, _ in ends],
                [high for _, high in ends], kind="both", colour=index,
            )
        )  # fmt: skip
    sure = Axis("probability of the first choice", low=0.0, high=1.0)
    right = Axis("share of rows where it is right", low=0.0, high=1.0)
    return chart(title, described, sure, right, series)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in `n` rows (E. B. Wilson 1927)."""
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def frame(drawing: Drawing, x: Scale, y: Scale, x_label: str, y_label: str) -> None:
    """Grid, ticks and labels; the vertical axis' label lies on top, where it is read without turning the head."""
    for value, label in y.ticks(6):
        drawing.line(x.start, y(value), x.stop, y(value), "grid")
        drawing.text(x.start - 8, y(value) + 4, label, "soft", anchor="end")
    frame_x(drawing, x, y.start, x_label)
    drawing.text(EDGE, TOP - 18, y_label, "soft")


def frame_x(drawing: Drawing, x: Scale, bottom: float, label: str, *, top: float | None = None) -> None:
    """The horizontal axis: a line at `bottom` with ticks, or with grid lines up to `top`."""
    for value, text in x.ticks(max(2, int((x.stop - x.start) / 80))):
        drawing.line(x(value), bottom if top is None else top, x(value), bottom + 5, "axis" if top is None else "grid")
        drawing.text(x(value), bottom + 19, text, "soft", anchor="middle")
    drawing.line(x.start, bottom, x.stop, bottom, "axis")
    drawing.text((x.start + x.stop) / 2, bottom + 40, label, "soft", anchor="middle")


def _placed(series: Sequence[Series]) -> Iterator[tuple[int, Series]]:
    """Each series with the number that says its colour and shape."""
    taken = {one.colour for one in series}
    free = (index for index in range(len(series) + SERIES) if index not in taken)
    for one in series:
        yield (next(free) if one.colour is None else one.colour), one


def _colour(place: int) -> str:
    return f"s{place % SERIES}"


def _shape(place: int) -> int:
    return place + place // SERIES  # the ninth has the first one's colour, and another shape


def _stroke(one: Series, place: int) -> str:
    return f"{_colour(place)} stroke" + (" dashed" if one.dashed else "")


def _draw(drawing: Drawing, one: Series, place: int, x: Scale, y: Scale) -> None:
    class_ = _colour(place)
    points = [(x(a), y(b)) for a, b in zip(one.x, one.y, strict=True)]
    ends = [] if one.low is None or one.high is None else [(y(a), y(b)) for a, b in zip(one.low, one.high, strict=True)]
    if one.kind == "band" and ends:
        lower = [(across, low) for (across, _), (low, _) in zip(points, ends, strict=True)]
        upper = [(across, high) for (across, _), (_, high) in zip(points, ends, strict=True)]
        drawing.path([*upper, *reversed(lower)], f"{class_} band")
    if one.kind != "points":
        drawing.path(points, _stroke(one, place))
    if one.kind in ("points", "both"):
        for (across, _), (low, high) in zip(points, ends):
            drawing.line(across, low, across, high, f"{class_} stroke")
            for end in (low, high):
                drawing.line(across - 3, end, across + 3, end, f"{class_} stroke")
        for index, (across, height) in enumerate(points):
            told = f"{one.name}: {one.x[index]:.4g}, {one.y[index]:.4g}"
            if one.low is not None and one.high is not None:
                told += f" ({one.low[index]:.4g} to {one.high[index]:.4g})"
            drawing.mark(_shape(place), across, height, class_, told)
