"""Charts as plain SVG text, drawn with the page's colours, which work without scripts and on paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, log10
from typing import NamedTuple

from trainer.wording import number

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 42
DASHES = ("", "7 4", "2 4", "10 3 2 3")  # beside the colour, for who cannot tell them
COLOURS = 8
ROW = 34  # height of an interval


class Style(NamedTuple):
    """How a setting looks in every chart."""

    colour: str
    dash: str


class Line(NamedTuple):
    """A curve; thin ones stand behind (one seed of several)."""

    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    is_thin: bool = False
    has_dots: bool = False


class Bar(NamedTuple):
    """A value with its interval, on a row of its own."""

    label: str
    style: Style
    value: float
    low: float | None
    high: float | None


class Dot(NamedTuple):
    """A point of a scatter plot."""

    label: str
    style: Style
    x: float
    y: float
    is_front: bool


def style(index: int) -> Style:
    """Of the setting at a place: neighbours differ in colour and in dash."""
    return Style(f"var(--st-c{index % COLOURS + 1})", DASHES[index % len(DASHES)])


def lines(title: str, x_title: str, curves: Sequence[Line], *, bottom: float | None = None) -> str:
    """Curves over steps; "" when there is nothing to draw."""
    curves = [curve for curve in curves if len(curve.x)]
    if not curves:
        return ""
    xs, ys = _span([x for curve in curves for x in curve.x]), _span([y for curve in curves for y in curve.y], bottom)
    parts = [_axes(xs, ys, x_title)]
    for curve in sorted(curves, key=lambda curve: not curve.is_thin):
        points = [(_place(x, xs, LEFT, WIDTH - RIGHT), _place(y, ys, HEIGHT - BOTTOM, TOP))
                  for x, y in zip(curve.x, curve.y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        weight = 'stroke-width="1.1" opacity=".45"' if curve.is_thin else 'stroke-width="2.2"'
        drawn = f'<polyline points="{path}" fill="none" stroke="{curve.style.colour}" {weight}{_dash(curve.style)}/>'
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.style.colour}"/>' for x, y in points
                       ) if curve.has_dots or len(points) == 1 else ""
        parts.append(f"<g><title>{escape(curve.label)}</title>{drawn}{dots}</g>")
    newest = ", ".join(f"{curve.label} {number(curve.y[-1])}" for curve in curves if not curve.is_thin)
    return _svg(f"{title}. Newest: {newest}", parts)


def intervals(title: str, bars: Sequence[Bar]) -> str:
    """A row a value with its whiskers: overlapping ones show no difference."""
    if not bars:
        return ""
    ends = [end for bar in bars for end in (bar.low, bar.value, bar.high) if end is not None]
    height, left = TOP + ROW * len(bars) + BOTTOM - 14, 190
    xs = _span(ends, 0.0 if min(ends) >= 0 else None)
    parts = [_grid_down(xs, left, TOP, height - BOTTOM + 14)]
    for row, bar in enumerate(bars):
        y, x = TOP + ROW * (row + 0.5), _place(bar.value, xs, left, WIDTH - RIGHT)
        parts.append(f'<text x="{left - 12}" y="{y + 4:.1f}" text-anchor="end" class="ink">'
                     f"{escape(_cut(bar.label, 28))}<title>{escape(bar.label)}</title></text>")
        if bar.low is not None and bar.high is not None:
            low, high = (_place(end, xs, left, WIDTH - RIGHT) for end in (bar.low, bar.high))
            parts.append(f'<path d="M{low:.1f},{y:.1f}H{high:.1f}M{low:.1f},{y - 6:.1f}v12M{high:.1f},{y - 6:.1f}v12" '
                         f'stroke="{bar.style.colour}" stroke-width="2" fill="none"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{bar.style.colour}"/>')
    said = ", ".join(f"{bar.label} {number(bar.value, 3)}" for bar in bars)
    return _svg(f"{title}: {said}", parts, height)


def scatter(title: str, x_title: str, y_title: str, dots: Sequence[Dot]) -> str:
    """Points with their names, and a line through those that no other one beats in both."""
    if not dots:
        return ""
    xs, ys = _span([dot.x for dot in dots], margin=0.18), _span([dot.y for dot in dots], margin=0.18)
    place = {dot: (_place(dot.x, xs, LEFT, WIDTH - RIGHT), _place(dot.y, ys, HEIGHT - BOTTOM, TOP)) for dot in dots}
    front = sorted(place[dot] for dot in dots if dot.is_front)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
    parts = [_axes(xs, ys, x_title, y_title), f'<polyline points="{line}" fill="none" stroke="var(--st-mute)" '
             'stroke-width="1.5" stroke-dasharray="4 4"/>']
    for dot, (x, y) in place.items():
        filled = f'fill="{dot.style.colour}"' if dot.is_front else 'fill="var(--st-card)"'
        anchor, shift = ("end", -10) if x > WIDTH * 0.62 else ("start", 10)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" {filled} stroke="{dot.style.colour}" stroke-width="2">'
                     f"<title>{escape(dot.label)}</title></circle>"
                     f'<text x="{x + shift:.1f}" y="{y - 9:.1f}" text-anchor="{anchor}" class="ink">'
                     f"{escape(_cut(dot.label, 30))}</text>")
    best = ", ".join(dot.label for dot in dots if dot.is_front)
    return _svg(f"{title}. On the front: {best}", parts)


def key(of: Style) -> str:
    """A short piece of a curve, for legends and tables."""
    return (f'<svg class="key" viewBox="0 0 34 10" aria-hidden="true"><path d="M1,5H33" stroke="{of.colour}" '
            f'stroke-width="3"{_dash(of)}/></svg>')


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two ends: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    unit = 10.0 ** floor(log10(rough))
    gap = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first = floor(low / gap) + (0 if abs(low / gap - floor(low / gap)) < 1e-9 else 1)
    return [round(gap * count, 12) for count in range(first, floor(high / gap + 1e-9) + 1)]


def _span(values: Sequence[float], bottom: float | None = None, margin: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    spread = high - low or abs(high) * 0.1 or 1.0
    return (low - spread * margin if low - spread * margin >= 0 or low < 0 else 0.0) if bottom is None else bottom, \
        high + spread * margin


def _place(value: float, span: tuple[float, float], start: float, end: float) -> float:
    return start + (value - span[0]) / (span[1] - span[0]) * (end - start)


def _axes(xs: tuple[float, float], ys: tuple[float, float], x_title: str, y_title: str = "") -> str:
    parts = [_grid_down(xs, LEFT, TOP, HEIGHT - BOTTOM)]
    for tick in ticks(*ys):
        y = _place(tick, ys, HEIGHT - BOTTOM, TOP)
        parts.append(f'<path d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}" class="grid"/>'
                     f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
                 f"{escape(x_title)}</text>")
    if y_title:
        parts.append(f'<text transform="translate(13,{(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
                     f"{escape(y_title)}</text>")
    return "".join(parts)


def _grid_down(xs: tuple[float, float], left: float, top: float, bottom: float) -> str:
    parts = []
    for tick in ticks(*xs):
        x = _place(tick, xs, left, WIDTH - RIGHT)
        parts.append(f'<path d="M{x:.1f},{top}V{bottom}" class="grid"/>'
                     f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{number(tick)}</text>')
    return "".join(parts)


def _dash(of: Style) -> str:
    return f' stroke-dasharray="{of.dash}"' if of.dash else ""


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _svg(label: str, parts: Sequence[str], height: float = HEIGHT) -> str:
    return (f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
            f"{''.join(parts)}</svg>")
