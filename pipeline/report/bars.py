"""Charts of bars: one a name, stacked, and histograms. See `charts`.

Bars lie on their side, so that names of any length stand beside them unturned. Lengths are pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from stillroom.pipeline.report.charts import BOTTOM, EDGE, HEIGHT, TOP, frame, frame_x
from stillroom.pipeline.report.scales import MINUS, Axis, Scale
from stillroom.pipeline.report.svg import ROW, SERIES, WIDTH, Drawing, width_of

BAR: Final = 18
PITCH: Final = 27
HEAD: Final = 44  # heading alone
REST: Final = "the rest"


def bars(
    title: str,
    described: str,
    x: Axis,
    values: Mapping[str, float],
    *,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    form: str = ".3g",
) -> str:
    """One bar a name, its value beside it, with its interval if it has one; bars of negative values grow leftwards.

    Args:
        title: heading.
        described: what it shows, for those who do not see it.
        x: the axis of the values.
        values: in this order from the top.
        intervals: low and high end by name.
        form: how values are written.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    intervals = intervals or {}
    ends = [end for pair in intervals.values() for end in pair]
    drawing, scale = _lying(title, described, x, [*values], [0.0, *values.values(), *ends], HEAD)
    zero = scale(0.0)
    for index, (name, value) in enumerate(values.items()):
        middle = HEAD + PITCH * (index + 0.5)
        low, high = intervals.get(name, (value, value))
        words = format(value, form).replace("-", MINUS)
        _bar(drawing, zero, scale(value), middle, f"{name}: {words}", "s0 pale")
        if name in intervals:
            drawing.line(scale(low), middle, scale(high), middle, "whisker")
            for end in (low, high):
                drawing.line(scale(end), middle - 4, scale(end), middle + 4, "whisker")
        tip = scale(max(value, high)) + 6 if value >= 0 else scale(min(value, low)) - 6
        drawing.text(tip, middle + 4, words, "soft", anchor="start" if value >= 0 else "end")
    drawing.line(zero, HEAD, zero, HEAD + PITCH * len(values), "axis")
    return drawing.finish()


def stacked(title: str, described: str, x: Axis, rows: Mapping[str, Mapping[str, float]]) -> str:
    """One bar a name, cut into parts: what the whole is made of.

    Args:
        title, described, x: see `bars`.
        rows: by name, size by part; the parts' order is that in which they first occur. Of more than eight kinds of parts the
            smallest are put together.

    Raises:
        ValueError: no bar, or a part that is negative or not finite.
    """
    if any(size < 0 for row in rows.values() for size in row.values()):
        raise ValueError(f"{title}: a part is negative, and parts of a bar can not be")
    rows = _fewer(rows)
    parts = sorted(dict.fromkeys(part for row in rows.values() for part in row), key=lambda part: part == REST)
    legend: list[tuple[float, int]] = []
    across = 0.0
    for part in parts:  # a line of entries, as many as fit
        wide = width_of(part) + 34
        across = 0.0 if across + wide > WIDTH - 2 * EDGE else across
        legend.append((across, (legend[-1][1] if legend else -1) + (1 if across == 0.0 else 0)))
        across += wide
    top = HEAD + ROW * (legend[-1][1] + 1 if legend else 0) + 4
    sums = {name: sum(row.values()) for name, row in rows.items()}
    drawing, scale = _lying(title, described, x, [*rows], [0.0, *sums.values()], top)
    for index, (part, (across, line)) in enumerate(zip(parts, legend, strict=True)):
        at = HEAD + ROW * (line + 0.5) - 4
        drawing.add("rect", f"s{index} fill", x=EDGE + across, y=at - 6, width=12, height=12)
        drawing.text(EDGE + across + 18, at + 4, part)
    for place, (name, row) in enumerate(rows.items()):
        middle, begin = top + PITCH * (place + 0.5), 0.0
        for index, part in enumerate(parts):
            if size := row.get(part, 0.0):
                words = f"{name}, {part}: {size:.3g}"
                _bar(drawing, scale(begin), scale(begin + size), middle, words, f"s{index}")
                begin += size
        drawing.text(scale(begin) + 6, middle + 4, f"{sums[name]:.1f}", "soft")
    return drawing.finish()


def histogram(title: str, described: str, x: Axis, y: Axis, edges: Sequence[float], counts: Sequence[float]) -> str:
    """Bars that touch: `counts[i]` lie between `edges[i]` and `edges[i + 1]`.

    Args:
        title, described: see `bars`.
        x, y: the axes; y starts at 0.
        edges: ascending, one more than counts.
        counts: none negative.

    Raises:
        ValueError: as many edges as counts or fewer, or a value the axis can not show.
    """
    if len(edges) != len(counts) + 1:
        raise ValueError(f"{title}: {len(counts)} counts want {len(counts) + 1} edges, {len(edges)} came")
    drawing = Drawing(title, described, HEIGHT)
    y_scale = Axis(y.label, low=0.0, high=max(counts) * 1.05 or 1.0).scale(counts, HEIGHT - BOTTOM, TOP)
    left = EDGE + 8 + max(width_of(label) for _, label in y_scale.ticks(6))
    x_scale = Axis(x.label, x.log, low=edges[0], high=edges[-1]).scale(edges, left, WIDTH - EDGE)
    frame(drawing, x_scale, y_scale, x.label, y.label)
    for begin, end, count in zip(edges, edges[1:], counts):
        if count:
            drawing.add(
                "rect", "s0 fill edge", x=x_scale(begin), y=y_scale(count), width=x_scale(end) - x_scale(begin),
                height=y_scale.start - y_scale(count), tip=f"{begin:.4g} to {end:.4g}: {count:,.4g}",
            )  # fmt: skip
    return drawing.finish()


def _fewer(rows: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
    """The same bars of at most eight kinds of parts: the seven largest overall, and the rest."""
    total: Counter[str] = Counter()
    for row in rows.values():
        total.update(row)
    if len(total) <= SERIES:
        return rows
    large = {part for part, _ in total.most_common(SERIES - 1)}
    found: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        found[name] = {part: size for part, size in row.items() if part in large}
        found[name][REST] = sum(size for part, size in row.items() if part not in large)
    return found


def _lying(
    title: str, described: str, x: Axis, names: Sequence[str], values: Sequence[float], top: float
) -> tuple[Drawing, Scale]:
    """Drawing and scale of bars on their side, names and axis drawn."""
    if not names:
        raise ValueError(f"{title}: there is no bar to draw")
    bottom = top + PITCH * len(names)
    drawing = Drawing(title, described, bottom + BOTTOM)
    room = 48.0  # of the value written at a bar's end
    left = EDGE + 8 + max(map(width_of, names))
    least = min(values)
    scale = Axis(x.label, low=x.low if least < 0 else 0.0, high=x.high).scale(
        values, left + (room if least < 0 else 0.0), WIDTH - EDGE - room
    )
    frame_x(drawing, scale, bottom, x.label, top=top)
    for index, name in enumerate(names):
        drawing.text(left - 8, top + PITCH * (index + 0.5) + 4, name, anchor="end")
    return drawing, scale


def _bar(drawing: Drawing, begin: float, end: float, middle: float, tip: str, class_: str) -> None:
    left, right = sorted((begin, end))
    drawing.add("rect", f"{class_} fill", x=left, y=middle - BAR / 2, width=right - left, height=BAR, tip=tip)
