"""SVG by hand: elements, escaping, a stylesheet with a light and a dark side, marks. The same drawing is the same bytes.

Colours are classes: `s0` ... `s7` of series, in an order that people who see few colours can tell apart, each with a shape of
its own. Every colour is given twice, plain and as a variable, for viewers that know no variables.
"""

from __future__ import annotations

import hashlib
from typing import Final
from xml.sax.saxutils import escape, quoteattr

WIDTH: Final = 760
ROW: Final = 20  # of a legend
SERIES: Final = 8
_LIGHT: Final = {
    "paper": "#ffffff", "ink": "#1d2126", "soft": "#5c6670", "line": "#dfe3e8",
    "s0": "#0a62a8", "s1": "#c4520a", "s2": "#00805f", "s3": "#a8478a",
    "s4": "#a97d00", "s5": "#2f9bd6", "s6": "#7a5c3e", "s7": "#6b6f76",
}  # fmt: skip
_DARK: Final = {
    "paper": "#15181c", "ink": "#e6e9ec", "soft": "#a2abb5", "line": "#363c44",
    "s0": "#5aa9ea", "s1": "#f0894a", "s2": "#3cc39c", "s3": "#d987bd",
    "s4": "#e0b43c", "s5": "#8fd0f5", "s6": "#c3a07c", "s7": "#a6abb2",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return ".stillroom{" + ";".join(f"--{name}:{colour}" for name, colour in colours.items()) + "}"


def _paint(selector: str, what: str, name: str) -> str:
    return f".stillroom {selector}{{{what}:{_LIGHT[name]};{what}:var(--{name})}}"


STYLE: Final = "\n".join(
    [
        _variables(_LIGHT),
        f"@media (prefers-color-scheme:dark){{{_variables(_DARK)}}}",
        '.stillroom text{font:12px system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}',
        ".stillroom .title{font-size:14px;font-weight:600}",
        _paint(".paper", "fill", "paper"),
        _paint("text", "fill", "ink"),
        _paint(".soft", "fill", "soft"),
        _paint(".grid", "stroke", "line"),
        _paint(".axis", "stroke", "soft"),
        _paint(".edge", "stroke", "paper"),
        _paint(".whisker", "stroke", "ink"),
        _paint(".level", "color", "soft"),
        *(_paint(f".s{index}", "color", f"s{index}") for index in range(SERIES)),
        ".stillroom .fill{fill:currentColor}",
        ".stillroom .band{fill:currentColor;opacity:.18}",
        ".stillroom .pale{opacity:.65}",
        ".stillroom .stroke{fill:none;stroke:currentColor;stroke-width:1.75}",
        ".stillroom .dashed{stroke-dasharray:6 4}",
    ]
)


class Drawing:
    """An SVG being drawn.

    Args:
        title: heading, and the figure's name to those who hear it.
        described: what it shows, for those who do not see it.
        height: pixels; the width is `WIDTH`.
    """

    def __init__(self, title: str, described: str, height: float) -> None:
        self._title, self._described, self._height = title, described, height
        self._parts: list[str] = []

    def add(
        self, tag: str, class_: str = "", *, text: str | None = None, tip: str = "", **attributes: float | str
    ) -> None:
        """Append an element; `tip` is shown while the pointer rests on it. `_` in a name stands for `-`."""
        told = "".join(f" {name.replace('_', '-')}={quoteattr(_text(value))}" for name, value in attributes.items())
        opened = f"<{tag}" + (f' class="{class_}"' if class_ else "") + told
        inside = (f"<title>{escape(tip)}</title>" if tip else "") + ("" if text is None else escape(text))
        self._parts.append(f"{opened}>{inside}</{tag}>" if inside else f"{opened}/>")

    def text(self, x: float, y: float, words: str, class_: str = "", *, anchor: str = "start") -> None:
        """A line of text whose base line begins, ends or has its middle at (x, y)."""
        self.add("text", class_, x=x, y=y, text=words, **({} if anchor == "start" else {"text_anchor": anchor}))

    def line(self, x1: float, y1: float, x2: float, y2: float, class_: str) -> None:
        """A straight line."""
        self.add("line", class_, x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, points: list[tuple[float, float]], class_: str) -> None:
        """Straight lines from point to point."""
        self.add("path", class_, d="M" + "L".join(f"{_text(x)} {_text(y)}" for x, y in points))

    def mark(self, shape: int, x: float, y: float, class_: str, tip: str = "") -> None:
        """A data point: circle, square, triangle, diamond, triangle down, cross, pentagon, ring by `shape`."""
        if shape % SERIES == 0:
            self.add("circle", f"{class_} fill edge", cx=x, cy=y, r=4.5, tip=tip)
        elif shape % SERIES == 7:
            self.add("circle", f"{class_} stroke", cx=x, cy=y, r=4, tip=tip)
        else:
            corners = _SHAPES[shape % SERIES]
            d = "M" + "L".join(f"{_text(x + dx)} {_text(y + dy)}" for dx, dy in corners) + "Z"
            self.add("path", f"{class_} fill edge", d=d, tip=tip)

    def finish(self) -> str:
        """The file's text."""
        named = hashlib.sha256("\n".join([self._title, self._described, *self._parts]).encode()).hexdigest()[:12]
        size = f"{_text(WIDTH)} {_text(self._height)}"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="stillroom" viewBox="0 0 {size}" width="{_text(WIDTH)}" '
            f'height="{_text(self._height)}" role="img" aria-labelledby="t{named} d{named}">'
        )
        return "\n".join([
            head,
            f'<title id="t{named}">{escape(self._title)}</title>',
            f'<desc id="d{named}">{escape(self._described)}</desc>',
            f"<style>\n{STYLE}\n</style>",
            '<rect class="paper" width="100%" height="100%"/>',
            f'<text class="title" x="16" y="24">{escape(self._title)}</text>',
            *self._parts,
            "</svg>\n",
        ])  # fmt: skip


def width_of(words: str) -> float:
    """About how wide a line of 12-pixel text is, rather too much than too little."""
    narrow, wide = set("iljtfrI.,:;'|!()[] "), set("mwMW@%")
    return sum(3.9 if c in narrow else 10.6 if c in wide else 8.4 if c.isupper() else 7.0 for c in words)


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


_SHAPES: Final = {
    1: ((-4, -4), (4, -4), (4, 4), (-4, 4)),
    2: ((0, -5.2), (5, 4), (-5, 4)),
    3: ((0, -5.7), (5.7, 0), (0, 5.7), (-5.7, 0)),
    4: ((0, 5.2), (5, -4), (-5, -4)),
    5: ((-5, -1.8), (-1.8, -1.8), (-1.8, -5), (1.8, -5), (1.8, -1.8), (5, -1.8), (5, 1.8), (1.8, 1.8), (1.8, 5), (-1.8, 5),
        (-1.8, 1.8), (-5, 1.8)),
    6: ((0, -5.2), (5, -1.6), (3.1, 4.2), (-3.1, 4.2), (-5, -1.6)),
}  # fmt: skip
