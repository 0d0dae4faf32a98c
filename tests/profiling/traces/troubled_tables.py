"""Tables of step times whose trouble is known, for the diagnosis to find.

Two machines: one where every step ends with a collective of all ranks, one where a rank waits only
for its neighbors (a chain), as stages of a pipeline do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.profiling.traces.diagnosis import Diagnosis
from meshwright.profiling.traces.step_table import StepTable

__all__ = [
    "KINDS",
    "Trouble",
    "answer_of",
    "chain",
    "is_right",
    "noisy_compute",
    "synchronous",
    "troubled_set",
]

Cells = NDArray[np.float64]

KINDS = ("none", "persistent", "growing", "periodic", "one_off", "wave", "pair")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What was put in."""

    kind: str
    ranks: tuple[int, ...] = ()
    iteration: int = -1
    delay_s: float = 0.0
    period: int = 0


def table_of(compute_RI: Cells, wait_RI: Cells) -> StepTable:
    """The table of two arrays of (ranks, iterations) seconds."""
    ranks, iterations = compute_RI.shape
    return StepTable(
        ranks=tuple(range(ranks)),
        iterations=tuple(range(iterations)),
        step_s=compute_RI + wait_RI,
        compute_s=compute_RI,
        wait_s=wait_RI,
    )


def synchronous(compute_RI: Cells, *, exchange_s: float) -> StepTable:
    """Every step lasts as long as its slowest rank computes, and the exchange."""
    return table_of(compute_RI, compute_RI.max(axis=0)[None, :] - compute_RI + exchange_s)


def chain(compute_RI: Cells, *, exchange_s: float, reach: int = 1) -> StepTable:
    """A step of a rank begins when it and ``reach`` neighbors on each side have ended theirs."""
    ranks, iterations = compute_RI.shape
    ends_R = np.zeros(ranks)
    wait_RI = np.zeros_like(compute_RI)
    for at in range(iterations):
        begins_R = ends_R.copy()
        for hop in range(1, reach + 1):
            begins_R[hop:] = np.maximum(begins_R[hop:], ends_R[:-hop])
            begins_R[:-hop] = np.maximum(begins_R[:-hop], ends_R[hop:])
        wait_RI[:, at] = begins_R - ends_R + exchange_s
        ends_R = begins_R + exchange_s + compute_RI[:, at]
    return table_of(compute_RI, wait_RI)


def noisy_compute(
    rng: np.random.Generator,
    *,
    ranks: int,
    iterations: int,
    step_s: float,
    noise: str,
    scale: float = 1.0,
) -> Cells:
    """Healthy compute times: what all ranks do together, a bias of each, noise of each cell."""
    shape = (ranks, iterations)
    together_I = 1 + 0.1 * np.abs(np.sin(np.arange(iterations) / 7)) + 0.05 * rng.random(iterations)
    together_I[0] *= 3  # the first step compiles
    bias_R = 1 + 0.004 * rng.standard_normal(ranks)
    cells_RI = {
        "normal": lambda: 1 + 0.01 * scale * rng.standard_normal(shape),
        "lognormal": lambda: rng.lognormal(0.0, 0.02 * scale, shape),
        "exponential": lambda: 1 + rng.exponential(0.01 * scale, shape),
        "heavy": lambda: 1 + 0.01 * scale * np.abs(rng.standard_t(3, shape)),
    }[noise]()
    return step_s * together_I[None, :] * bias_R[:, None] * cells_RI


def troubled_set(
    rng: np.random.Generator,
    kind: str,
    *,
    noises: tuple[str, ...] = ("normal", "lognormal", "exponential"),
    scale: float = 1.0,
) -> tuple[StepTable, Trouble]:
    """A table with one trouble of ``kind`` and what it is, all drawn from ``rng``.

    The noise of a cell is 1 to 2 % of it, times ``scale``.
    """
    ranks = int(rng.choice([4, 6, 8, 16, 24, 32, 64, 128, 256]))
    iterations = int(rng.integers(60, 301))
    step_s = float(10 ** rng.uniform(-2.3, 0.7))
    noise = str(rng.choice(noises))
    compute_RI = noisy_compute(
        rng, ranks=ranks, iterations=iterations, step_s=step_s, noise=noise, scale=scale
    )
    rank = int(rng.integers(ranks))
    troubled: tuple[int, ...] = (rank,)
    in_chain = kind == "wave" or (kind not in ("periodic", "one_off") and rng.random() < 0.25)
    start, delay_s, period = int(rng.integers(10, iterations // 2)), 0.0, 0
    if kind == "none":
        troubled, start = (), -1
    elif kind == "persistent":
        start = int(rng.choice([0, start]))
        delay_s = step_s * float(rng.uniform(0.06, 1.0))
        compute_RI[rank, start:] += delay_s
    elif kind == "pair":
        troubled = tuple(sorted(rng.choice(ranks, size=2, replace=False).tolist()))
        delay_s = step_s * float(rng.uniform(0.06, 1.0))
        compute_RI[list(troubled), start:] += delay_s
    elif kind == "growing":
        delay_s = step_s * float(rng.uniform(0.2, 1.0))
        compute_RI[rank, start:] += np.linspace(0, delay_s, iterations - start)
    elif kind == "periodic":
        delay_s = step_s * float(rng.uniform(0.25, 2.0))
        period = int(rng.integers(4, min(31, iterations // 4)))
        compute_RI[rank, start::period] += delay_s
    else:
        delay_s = step_s * float(rng.uniform(0.3, 4.0) if kind == "one_off" else rng.uniform(1, 5))
        start = int(rng.integers(10, iterations - 10))
        compute_RI[rank, start] += delay_s
    table = (chain if in_chain else synchronous)(compute_RI, exchange_s=0.1 * step_s)
    return table, Trouble(
        kind=kind, ranks=troubled, iteration=start, delay_s=delay_s, period=period
    )


def is_right(found: Diagnosis, trouble: Trouble) -> bool:
    """Whether exactly what was put in was found: ranks, pattern, when, how much, waves."""
    return trouble.kind == answer_of(found, trouble)


def answer_of(found: Diagnosis, trouble: Trouble) -> str:
    """The kind of trouble the diagnosis found; ``KIND, wrong ...`` where a detail is not right."""
    patterns = {item.pattern.value for item in found.slow_ranks}
    if not found.slow_ranks:
        kind = "none"
    elif len(patterns) > 1:
        kind = "several"
    else:
        kind = patterns.pop()
        if kind == "one_off" and found.idle_waves:
            kind = "wave"
        elif kind == "persistent" and len(found.slow_ranks) == 2:
            kind = "pair"
    if kind != trouble.kind or kind == "none":
        return kind
    if trouble.ranks != tuple(sorted(item.rank for item in found.slow_ranks)):
        return f"{kind}, wrong ranks"
    allowed = {"growing": 0.2 * found.num_iterations, "persistent": 3, "pair": 3}.get(kind, 0)
    if any(abs(item.since_iteration - trouble.iteration) > allowed for item in found.slow_ranks):
        return f"{kind}, wrong iteration"
    if any(abs(item.excess_s / trouble.delay_s - 1) > 0.25 for item in found.slow_ranks):
        return f"{kind}, wrong delay"
    if trouble.period and trouble.period != found.slow_ranks[0].period_iterations:
        return f"{kind}, wrong period"
    waves = [(wave.source_rank, wave.iteration) for wave in found.idle_waves]
    expected = [(trouble.ranks[0], trouble.iteration)] if kind == "wave" else []
    return kind if expected == waves else f"{kind}, wrong waves"
