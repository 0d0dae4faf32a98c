"""One self-contained page of a diagnosis: phase plot, components, excess of every rank; SVG."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import numpy as np

from meshwright.profiling.traces.diagnosis import Diagnosis
from meshwright.profiling.traces.excess import excess_of_ranks
from meshwright.profiling.traces.step_table import Cells, StepTable
from meshwright.units import format_seconds

__all__ = ["diagnosis_page", "sentences"]

_WIDTH, _HEIGHT = 520, 420
_LEFT, _BOTTOM, _TOP, _RIGHT = 70, 50, 14, 14
_MAX_POINTS = 4000
_MAX_MAP_ROWS, _MAX_MAP_COLUMNS = 128, 200
_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee")
"""Paul Tol's bright palette: told apart by color-blind readers too."""
_SLOW_COLOR = "#aa3377"
_MANY = 8


def sentences(found: Diagnosis) -> list[str]:
    """What the diagnosis says, one sentence each, worst first."""
    plural = "s" if found.num_iterations > 1 else ""
    lines = [
        f"{found.num_ranks} ranks, {found.num_iterations} iteration{plural}, "
        f"{format_seconds(found.step_time_s)} a step; ranks judged by {found.judged_by}; "
        f"single delays below {format_seconds(found.noise_s)} are not told from noise"
    ]
    for item in found.slow_ranks[:_MANY]:
        when = {
            "one_off": f"once, in iteration {item.since_iteration}",
            "persistent": f"in iterations {item.since_iteration} to {item.until_iteration}",
            "growing": f"more and more, from iteration {item.since_iteration} "
            f"to {item.until_iteration}",
            "periodic": f"every {item.period_iterations} iterations since {item.since_iteration}",
            "irregular": f"in {item.num_iterations} iterations from {item.since_iteration} "
            f"to {item.until_iteration}",
        }[item.pattern]
        lines.append(
            f"rank {item.rank} is slow {when}: {format_seconds(item.excess_s)} longer than usual, "
            f"{format_seconds(item.total_excess_s)} in all, {item.step_fraction:.1%} of the run"
        )
    if len(found.slow_ranks) > _MANY:
        lines.append(f"and {len(found.slow_ranks) - _MANY} more slow ranks")
    lines += [
        f"idle wave from rank {wave.source_rank} in iteration {wave.iteration}: "
        f"{format_seconds(wave.delay_s)} late, travels {wave.speed_ranks_per_iteration:.2g} ranks "
        f"an iteration, reaches {wave.num_ranks_reached} ranks, "
        f"{format_seconds(wave.last_wait_s)} of it at the last"
        for wave in found.idle_waves[:_MANY]
    ]
    lines += [
        f"all ranks are {format_seconds(item.delay_s)} late in iteration {item.iteration}, in "
        f"{item.where}: no rank is to blame"
        for item in found.common_delays[:_MANY]
    ]
    if found.desynchronized:
        lines.append(f"the ranks drift apart: {format_seconds(found.lag_s)} at the end")
    if found.healthy:
        lines.append("no rank stands out")
    if not found.is_conclusive:
        lines.append(
            "no verdict: one iteration cannot tell a slow rank from one whose host began late or "
            "whose work was larger; record 20 or more, or see in `meshwright traces show` for whom "
            "the others waited in the collectives"
        )
    elif len(found.clusters) > 1:
        groups = "; ".join(_ranks(cluster) for cluster in found.clusters)
        lines.append(f"ranks that behave alike: {groups}")
    return lines + [f"note: {note}" for note in found.notes]


def diagnosis_page(table: StepTable, found: Diagnosis) -> str:
    """The page as HTML; it loads nothing and holds no script."""
    judged_s = table.step_s if table.compute_s is None else table.compute_s
    excess_s, _ = excess_of_ranks(judged_s)
    said = "".join(f"<li>{html.escape(line)}</li>" for line in sentences(found))
    wait_name = "step" if table.wait_s is None else "waiting"
    figures = (
        ("Phase plot", _phase_plot(table, found),
         f"Each point is one rank in one iteration: its {wait_name} then, and in the iteration "
         "after. Ranks in step form one spot; a slow rank lies apart, an idle wave leaves the "
         "diagonal."),
        ("Ranks along the principal components", _components(found, table.ranks),
         "Each point is one rank; colors are clusters, rings are slow ranks."),
        ("Excess of every rank over time", _excess_map(excess_s, table),
         f"Seconds of {found.judged_by} over the lower median of the ranks in each iteration; "
         "the darkest is the largest. Of several cells in one the largest is shown."),
    )  # fmt: skip
    body = "".join(
        f"<figure><h2>{title}</h2>{svg}<figcaption>{html.escape(text)}</figcaption></figure>"
        for title, svg, text in figures
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Diagnosis of ranks</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;"
        "padding:0 1em;color:#222}figure{display:inline-block;vertical-align:top;margin:0 1em 1em "
        f"0;max-width:{_WIDTH}px}}h2{{font-size:1.05em;margin:.3em 0}}figcaption{{color:#555;"
        "font-size:.87em}svg{max-width:100%;height:auto;background:#fff}</style>"
        f"<h1>Diagnosis of {found.num_ranks} ranks</h1><ul>{said}</ul>{body}</html>\n"
    )


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MANY]))
    return f"{shown} and {len(ranks) - _MANY} more" if len(ranks) > _MANY else shown


def _phase_plot(table: StepTable, found: Diagnosis) -> str:
    waits_s = table.step_s if table.wait_s is None else table.wait_s
    if table.num_iterations < 2:
        return _frame([], x=(0.0, 1.0), y=(0.0, 1.0), labels=("this iteration", "the next"))
    now_s, next_s = waits_s[:, :-1], waits_s[:, 1:]
    limits = (0.0, float(np.quantile(waits_s, 0.999)) * 1.1 or 1.0)
    stride = max(1, -(-now_s.size // _MAX_POINTS))
    cluster = {rank: at for at, ranks in enumerate(found.clusters) for rank in ranks}
    slow = {item.rank for item in found.slow_ranks}
    dots = []
    # Slow ranks last, so that they lie on top; every one of their points, of others a sample.
    for row in sorted(range(table.num_ranks), key=lambda row: table.ranks[row] in slow):
        rank = table.ranks[row]
        is_slow = rank in slow
        step = max(1, stride // 4) if is_slow else stride
        color = _SLOW_COLOR if is_slow else _COLORS[cluster.get(rank, 0) % len(_COLORS)]
        for at in range(row % step, now_s.shape[1], step):
            x = _across(min(float(now_s[row, at]), limits[1]), limits)
            y = _up(min(float(next_s[row, at]), limits[1]), limits)
            dots.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if is_slow else 2}" fill="{color}" '
                f'fill-opacity="{0.8 if is_slow else 0.35}"/>'
            )
    word = "step" if table.wait_s is None else "waiting"
    return _frame(
        dots, x=limits, y=limits, labels=(f"{word} in iteration t", f"{word} in iteration t + 1")
    )


def _components(found: Diagnosis, ranks: Sequence[int]) -> str:
    if not found.component_fractions:
        return _frame([], x=(0.0, 1.0), y=(0.0, 1.0), labels=("no differences", ""))
    scores = np.array(found.component_scores)
    first, second = scores[:, 0], scores[:, 1] if scores.shape[1] > 1 else 0 * scores[:, 0]
    x_limits, y_limits = _limits(first), _limits(second)
    cluster = {rank: at for at, members in enumerate(found.clusters) for rank in members}
    slow = {item.rank for item in found.slow_ranks}
    dots = []
    for row, rank in enumerate(ranks):
        x, y = _across(float(first[row]), x_limits), _up(float(second[row]), y_limits)
        color = _COLORS[cluster.get(rank, 0) % len(_COLORS)]
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}"/>')
        if rank in slow:
            ring = f'r="9" fill="none" stroke="{_SLOW_COLOR}" stroke-width="2"'
            dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" {ring}/>')
        if rank in slow or len(ranks) <= 16:
            right = x < _WIDTH - 60
            dots.append(
                f'<text x="{x + (11 if right else -11):.1f}" y="{y - 7:.1f}" font-size="11" '
                f'text-anchor="{"start" if right else "end"}">{rank}</text>'
            )
    shares = (*found.component_fractions, 0.0)
    labels = (f"first component ({shares[0]:.0%} of variance)", f"second ({shares[1]:.0%})")
    return _frame(dots, x=x_limits, y=y_limits, labels=labels)


def _excess_map(excess_s: Cells, table: StepTable) -> str:
    cells = _binned(np.clip(excess_s, 0.0, None))
    rows, columns = cells.shape
    largest_s = float(cells.max()) or 1.0
    width = (_WIDTH - _LEFT - _RIGHT) / columns
    height = (_HEIGHT - _TOP - _BOTTOM) / rows
    boxes = [
        f'<rect x="{_LEFT + column * width:.2f}" y="{_TOP + row * height:.2f}" '
        f'width="{width + 0.2:.2f}" height="{height + 0.2:.2f}" fill="{_SLOW_COLOR}" '
        f'fill-opacity="{cells[row, column] / largest_s:.2f}"/>'
        for row in range(rows)
        for column in range(columns)
        if cells[row, column] > 0.05 * largest_s
    ]
    ranks, iterations = table.ranks, table.iterations
    texts = [
        _text(_LEFT - 6, _TOP + 10, str(ranks[0]), "end"),
        _text(_LEFT - 6, _HEIGHT - _BOTTOM, str(ranks[-1]), "end"),
        _text(_LEFT, _HEIGHT - _BOTTOM + 16, str(iterations[0]), "start"),
        _text(_WIDTH - _RIGHT, _HEIGHT - _BOTTOM + 16, str(iterations[-1]), "end"),
        _text(_WIDTH / 2, _HEIGHT - 12, f"iteration; darkest {format_seconds(largest_s)}"),
        _text(18, _HEIGHT / 2, "rank", turned=True),
    ]
    return _svg([_border(), *boxes, *texts])


def _binned(cells: Cells) -> Cells:
    """At most so many rows and columns, each cell the largest of those it stands for."""
    for axis, most in ((0, _MAX_MAP_ROWS), (1, _MAX_MAP_COLUMNS)):
        factor = -(-cells.shape[axis] // most)
        starts = np.arange(0, cells.shape[axis], factor)
        cells = np.maximum.reduceat(cells, starts, axis=axis)
    return cells


def _limits(values: Cells) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.08 * (high - low) or 1e-9
    return low - margin, high + margin


def _across(value: float, limits: tuple[float, float]) -> float:
    return _LEFT + (value - limits[0]) / (limits[1] - limits[0]) * (_WIDTH - _LEFT - _RIGHT)


def _up(value: float, limits: tuple[float, float]) -> float:
    share = (value - limits[0]) / (limits[1] - limits[0])
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _frame(
    marks: Sequence[str],
    *,
    x: tuple[float, float],
    y: tuple[float, float],
    labels: tuple[str, str],
) -> str:
    """Axes in seconds around ``marks``, with four ticks each."""
    parts = [_border()]
    for share in (0.0, 1 / 3, 2 / 3, 1.0):
        at_x, at_y = x[0] + share * (x[1] - x[0]), y[0] + share * (y[1] - y[0])
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts += [
            _text(_across(at_x, x), _HEIGHT - _BOTTOM + 16, format_seconds(at_x), anchor),
            _text(_LEFT - 6, _up(at_y, y) + 4, format_seconds(at_y), "end"),
        ]
    parts += [
        _text(_WIDTH / 2, _HEIGHT - 12, labels[0]),
        _text(14, _HEIGHT / 2, labels[1], turned=True),
    ]
    return _svg([*parts, *marks])


def _border() -> str:
    return (
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}" '
        f'height="{_HEIGHT - _TOP - _BOTTOM}" fill="none" stroke="#999"/>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", *, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" fill="#333" '
        f'text-anchor="{anchor}"{turn}>{html.escape(text)}</text>'
    )


def _svg(parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="system-ui,sans-serif">'
        f"{''.join(parts)}</svg>"
    )
