"""Plots as SVG of one file: they load nothing, hold no script and read well without color.

Colors are Paul Tol's bright palette, told apart by color-blind readers too; each has a mark of its
own beside it.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.units import format_seconds

__all__ = ["Bar", "regret_bars", "scatter"]

FloatArray = NDArray[np.float64]

_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
_OTHERS = "others"
_MAX_POINTS = 5000
_MAX_TITLES = 1500
"""Points that say their name when pointed at; more would make the file heavy."""
_PLOT = 520
_LEFT, _TOP, _BOTTOM, _LEGEND = 78, 46, 56, 250
_BAND = 0.2
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.t{font-size:16px;font-weight:600}"
    ".s{fill:#555}.g{stroke:#e4e4e4}.a{stroke:#888;fill:none}"
)


def scatter(
    measured: ArrayLike,
    predicted: ArrayLike,
    kinds: Sequence[str],
    *,
    names: Sequence[str] = (),
    title: str,
    subtitle: str = "",
) -> str:
    """Predicted against measured seconds, both axes logarithmic, as SVG.

    The diagonal is agreement; the dashed lines are 20 % above and below it.

    Args:
        measured: (N,) seconds, above zero.
        predicted: (N,) seconds, above zero.
        kinds: of each point; the most frequent get a color each, the rest one together.
        names: of each point, or none.
        title: of the plot.
        subtitle: under it.
    """
    x_N, y_N = np.asarray(measured, dtype=float), np.asarray(predicted, dtype=float)
    good = np.flatnonzero((x_N > 0) & (y_N > 0) & np.isfinite(x_N) & np.isfinite(y_N))
    if len(good) > _MAX_POINTS:
        rng = np.random.default_rng(0)
        good = np.sort(rng.choice(good, _MAX_POINTS, replace=False))
        subtitle = f"{subtitle}; {_MAX_POINTS:,} of {len(x_N):,} points drawn".lstrip("; ")
    low, high = _decades(np.concatenate((x_N[good], y_N[good])))
    scale = _Scale(low=low, high=high)
    parts = [_axes(scale), _diagonals(scale)]
    counts = Counter(str(kind) for kind in kinds)
    ranked = [kind for kind, _ in counts.most_common()]
    shown = ranked if len(ranked) <= len(_COLORS) else ranked[: len(_COLORS) - 1]
    place = {kind: index for index, kind in enumerate(shown)}
    with_titles = len(good) <= _MAX_TITLES
    for i in good.tolist():
        index = place.get(str(kinds[i]), len(_COLORS) - 1)
        label = _point_title(names[i] if len(names) else "", x_N[i], y_N[i]) if with_titles else ""
        parts.append(_mark(index, scale.x(x_N[i]), scale.y(y_N[i]), label))
    legend = [(kind, counts[kind]) for kind in shown]
    if len(shown) < len(ranked):
        legend.append((_OTHERS, sum(counts[kind] for kind in ranked[len(shown) :])))
    parts.append(_legend(legend))
    return _page(parts, title, subtitle, height=_TOP + _PLOT + _BOTTOM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Regret of one way to choose, as fractions."""

    name: str
    top1_mean: float
    top1_p95: float
    top3_mean: float


def regret_bars(bars: Sequence[Bar], *, title: str, subtitle: str = "") -> str:
    """Regret by way to choose: mean of top-1 (full) and top-3 (pale), a line to top-1's p95.

    The axis ends where the means are told apart; a line that goes on says where it ends.
    """
    step, gap = 26, 20
    height = _TOP + len(bars) * (2 * step + gap) + _BOTTOM
    largest = max([bar.top1_mean for bar in bars] + [bar.top3_mean for bar in bars] + [0.01])
    end = largest * 1.5
    width = float(_PLOT)
    parts = []
    for tick in _ticks(end):
        x = _LEFT + 90 + tick / end * width
        parts.append(f'<path class="g" d="M{x:.1f} {_TOP}V{height - _BOTTOM + 4}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{height - _BOTTOM + 22}" text-anchor="middle">'
            f"{round(tick * 100, 6):g} %</text>"
        )
    for row, bar in enumerate(bars):
        y = _TOP + 8 + row * (2 * step + gap)
        color = _COLORS[0] if row == 0 else _COLORS[6]
        x0 = _LEFT + 90
        name = html.escape(bar.name)
        parts.append(f'<text x="{x0 - 8}" y="{y + step + 4}" text-anchor="end">{name}</text>')
        for offset, value, opacity in ((0, bar.top1_mean, 1.0), (step, bar.top3_mean, 0.45)):
            length = value / end * width
            parts.append(
                f'<rect x="{x0}" y="{y + offset}" width="{max(1.0, length):.1f}" '
                f'height="{step - 5}" fill="{color}" fill-opacity="{opacity}"/>'
            )
        tip = min(bar.top1_p95, end) / end * width
        middle = y + (step - 5) / 2
        parts.append(
            f'<path class="a" d="M{x0 + bar.top1_mean / end * width:.1f} {middle}'
            f'H{x0 + tip:.1f}m0-5v10"/>'
        )
        parts.append(
            f'<text class="s" x="{x0 + max(tip, bar.top1_mean / end * width) + 8:.1f}" '
            f'y="{middle + 5}">{bar.top1_mean:.1%}, p95 {bar.top1_p95:.1%}</text>'
        )
        parts.append(
            f'<text class="s" x="{x0 + bar.top3_mean / end * width + 8:.1f}" '
            f'y="{middle + step + 5}">{bar.top3_mean:.1%} with three tries</text>'
        )
    parts.append(f'<path class="a" d="M{_LEFT + 90} {_TOP}V{height - _BOTTOM + 4}"/>')
    parts.append(_middle_text("time over the best measured plan", height - 12, x=_LEFT + 90))
    return _page(parts, title, subtitle, height=height)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Seconds to pixels, by logarithm."""

    low: float
    high: float

    def _fraction(self, value: float) -> float:
        return math.log(value / self.low) / math.log(self.high / self.low)

    def x(self, value: float) -> float:
        return _LEFT + self._fraction(value) * _PLOT

    def y(self, value: float) -> float:
        return _TOP + (1.0 - self._fraction(value)) * _PLOT


def _decades(values: FloatArray) -> tuple[float, float]:
    """Ends of an axis that holds all values: 1, 2 or 5 times a power of ten."""
    if not len(values):
        return 0.1, 10.0
    low, high = float(values.min()), float(values.max())
    below = [s * 10.0 ** math.floor(math.log10(low)) for s in (1, 2, 5)]
    above = [s * 10.0 ** math.floor(math.log10(high)) for s in (1, 2, 5, 10)]
    start = max(end for end in below if end <= low * 1.0000001)
    return start, min(end for end in above if end >= high * 0.9999999 and end > start)


def _marks_of_axis(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = (1, 2, 5) if high / low <= 300 else (1,)
    every = max(1, len(exponents) // 8)
    marks = [s * 10.0**e for e in exponents if e % every == 0 for s in steps]
    return [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]


def _axes(scale: _Scale) -> str:
    parts = []
    for mark in _marks_of_axis(scale.low, scale.high):
        x, y = scale.x(mark), scale.y(mark)
        text = format_seconds(mark)
        parts.append(f'<path class="g" d="M{x:.1f} {_TOP}v{_PLOT}M{_LEFT} {y:.1f}h{_PLOT}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{_TOP + _PLOT + 20}" text-anchor="middle">{text}</text>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<rect class="a" x="{_LEFT}" y="{_TOP}" width="{_PLOT}" height="{_PLOT}"/>')
    parts.append(_middle_text("measured", _TOP + _PLOT + 44))
    middle = _TOP + _PLOT / 2
    parts.append(
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">'
        "predicted</text>"
    )
    return "".join(parts)


def _diagonals(scale: _Scale) -> str:
    """Agreement and the two lines beside it, cut at the frame."""
    parts = []
    for factor, dash in ((1.0, ""), (1 + _BAND, "5 4"), (1 - _BAND, "5 4")):
        start = max(scale.low, scale.low / factor)
        end = min(scale.high, scale.high / factor)
        if start < end:
            parts.append(
                f'<path class="a" stroke-dasharray="{dash}" d="M{scale.x(start):.1f} '
                f'{scale.y(start * factor):.1f}L{scale.x(end):.1f} {scale.y(end * factor):.1f}"/>'
            )
    return "".join(parts)


def _mark(index: int, x: float, y: float, label: str) -> str:
    shapes = (
        "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
        "m-3.2-3.2h6.4v6.4h-6.4z",
        "m0-4.4l4.2 7.6h-8.4z",
        "m0-4.6l4.6 4.6l-4.6 4.6l-4.6-4.6z",
        "m0 4.4l4.2-7.6h-8.4z",
        "m-4-1.3h2.7v-2.7h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7z",
        "m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0z",
    )
    inner = f"<title>{html.escape(label)}</title>" if label else ""
    return (
        f'<path d="M{x:.1f} {y:.1f}{shapes[index]}" fill="{_COLORS[index]}" '
        f'fill-opacity="0.65">{inner}</path>'
    )


def _point_title(name: str, measured_s: float, predicted_s: float) -> str:
    return (
        f"{name}: measured {format_seconds(measured_s)}, predicted {format_seconds(predicted_s)} "
        f"({predicted_s / measured_s - 1:+.1%})"
    )


def _legend(kinds: Sequence[tuple[str, int]]) -> str:
    x, parts = _LEFT + _PLOT + 26, []
    for row, (kind, count) in enumerate(kinds):
        y = _TOP + 14 + 22 * row
        text = html.escape(kind if len(kind) <= 24 else f"{kind[:23]}…")
        index = len(_COLORS) - 1 if kind == _OTHERS and row == len(kinds) - 1 else row
        parts.append(_mark(index, x, y - 4, ""))
        parts.append(f'<text x="{x + 12}" y="{y}">{text} ({count:,})</text>')
    y = _TOP + 14 + 22 * (len(kinds) + 1)
    parts.append(f'<path class="a" stroke-dasharray="5 4" d="M{x - 8} {y - 4}h16"/>')
    parts.append(f'<text x="{x + 12}" y="{y}">{_BAND:.0%} off</text>')
    return "".join(parts)


def _ticks(end: float) -> list[float]:
    """Round steps from 0, six at most."""
    raw = end / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
    return [round(step * i, 12) for i in range(int(end / step) + 1)]


def _middle_text(text: str, y: float, *, x: float = _LEFT) -> str:
    return f'<text x="{x + _PLOT / 2}" y="{y}" text-anchor="middle">{html.escape(text)}</text>'


def _page(parts: Sequence[str], title: str, subtitle: str, *, height: float) -> str:
    width = _LEFT + _PLOT + _LEGEND
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style>"
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text class="t" x="{_LEFT}" y="20">{html.escape(title)}</text>'
        f'<text class="s" x="{_LEFT}" y="38">{html.escape(subtitle)}</text>{"".join(parts)}</svg>\n'
    )
