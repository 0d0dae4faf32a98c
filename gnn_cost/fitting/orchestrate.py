"""One fit from beginning to end: parts in order, tracked, within a budget, kept as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from meshwright.errors import BadRequest
from meshwright.gnn_cost.fitting.cards import model_card, part_card
from meshwright.gnn_cost.fitting.folder import FitFolder
from meshwright.gnn_cost.fitting.parts import (
    FitData,
    FitSettings,
    Part,
    PartContext,
    PartResult,
)
from meshwright.gnn_cost.pretrained_pricing import weights_sha256
from meshwright.strict_json import JsonValue, dump_json, write_text_atomically
from meshwright.tracking import DataSource, Tracker, made
from meshwright.units import format_seconds

__all__ = ["CARD_NAME", "FitResult", "fit"]

CARD_NAME = "card.json"
_SAY_EVERY_S = 5.0
_LEAST_FRACTION = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What a fit gave."""

    folder: Path
    """Holds the weights of each part, and ``card.json``."""
    parts: Mapping[str, PartResult]
    skipped: Mapping[str, str]
    """By part, why it was not trained."""
    spent_s: float
    """Of this call."""

    @property
    def is_cut(self) -> bool:
        """The budget ended the training of a part."""
        return any(part.is_cut for part in self.parts.values())


def fit(
    parts: Sequence[Part],
    data: FitData,
    settings: FitSettings,
    *,
    folder: Path,
    tracker: Tracker,
    reproduce: str,
    budget_s: float | None = None,
    is_resumed: bool = False,
    say: Callable[[str], None] = lambda _: None,
    now_s: Callable[[], float] = time.monotonic,
) -> FitResult:
    """Train ``parts`` in order and write weights and card into ``folder``.

    Args:
        parts: each may use the results of those before it.
        data: what is learned from.
        settings: of equal settings and data the weights are bit-equal on one machine, unless the
            budget ends a part's training.
        folder: of the fit; see ``FitFolder``.
        tracker: told everything.
        reproduce: the command line, for the card.
        budget_s: for all parts; the best so far is kept when it ends.
        is_resumed: go on with what ``folder`` holds.
        say: told how far it is, in lines.
        now_s: the clock.

    Raises:
        BadRequest: there is nothing to learn from, or the folder cannot be used.
    """
    started_s = now_s()
    skipped = {part.name: reason for part in parts if (reason := part.reason_to_skip(data))}
    chosen = [part for part in parts if part.name not in skipped]
    if not chosen:
        raise BadRequest(
            "nothing to learn from: " + "; ".join(f"{k}: {v}" for k, v in skipped.items())
        )
    run = _Run(
        parts=chosen,
        data=data,
        settings=settings,
        kept=FitFolder(folder),
        tracker=tracker,
        reproduce=reproduce,
        say=say,
    )
    run.kept.begin(settings, data.sources, is_resumed=is_resumed)
    _track_begin(tracker, data, settings, chosen, skipped)
    status = "failed"
    try:
        done = run.train(now_s=now_s, end_s=None if budget_s is None else started_s + budget_s)
        files = {name: run.kept.files(name) for name in done}
        card = model_card(
            done, files=files, skipped=skipped, data=data, settings=settings, reproduce=reproduce
        )
        write_text_atomically(dump_json(card), folder / CARD_NAME)
        names = [CARD_NAME, *(file for listed in files.values() for file in listed)]
        _track_end(tracker, data, done, [folder / name for name in names])
        status = "budget" if any(result.is_cut for result in done.values()) else "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        tracker.finish(status)
    spent_s = now_s() - started_s
    return FitResult(folder=folder, parts=done, skipped=skipped, spent_s=spent_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What stays the same from part to part."""

    parts: Sequence[Part]
    data: FitData
    settings: FitSettings
    kept: FitFolder
    tracker: Tracker
    reproduce: str
    say: Callable[[str], None]

    def train(self, *, now_s: Callable[[], float], end_s: float | None) -> dict[str, PartResult]:
        """All parts in order, those of before taken as they are."""
        done: dict[str, PartResult] = {}
        for index, part in enumerate(self.parts):
            result = self.kept.result(part.name)
            if result is not None and not result.is_cut:
                self.say(f"{part.name}: done before")
            else:
                for later in self.parts[index + 1 :]:
                    if later.uses_others:
                        self.kept.forget(later.name)
                clock = _Clock(now_s, end_s, [item.budget_weight for item in self.parts[index:]])
                result = self._train_one(part, done, clock)
            done[part.name] = result
        return done

    def _train_one(self, part: Part, done: Mapping[str, PartResult], clock: _Clock) -> PartResult:
        context = PartContext(
            settings=self.settings,
            folder=self.kept.checkpoints(part.name),
            tracker=self.tracker,
            reproduce=self.reproduce,
            left_s=clock.left_s,
            progress=_Progress(part.name, clock, self.say),
            done=dict(done),
        )
        result = part.fit(self.data, context)
        card = part_card(result, data=self.data, settings=self.settings, reproduce=self.reproduce)
        self.kept.keep(part.name, result, card)
        end = "stopped by the budget" if result.is_cut else "done"
        self.say(f"{part.name}: {end} after {format_seconds(clock.spent_s())}")
        return result


class _Clock:
    """What is left of the budget for the first of some parts."""

    def __init__(
        self, now_s: Callable[[], float], end_s: float | None, weights: Sequence[float]
    ) -> None:
        self._now_s = now_s
        self._began_s = now_s()
        left_s = float("inf") if end_s is None else max(0.0, end_s - self._began_s)
        self._end_s = self._began_s + left_s * weights[0] / sum(weights)

    def left_s(self) -> float:
        return max(0.0, self._end_s - self._now_s())

    def spent_s(self) -> float:
        return self._now_s() - self._began_s


class _Progress:
    """A line now and then: how far, how long, how long still."""

    def __init__(self, name: str, clock: _Clock, say: Callable[[str], None]) -> None:
        self._name, self._clock, self._say = name, clock, say
        self._said_s = float("-inf")
        self._first: tuple[float, float] | None = None
        """Fraction and time when it first had got on: what was read before is no measure."""

    def __call__(self, fraction: float, text: str) -> None:
        spent_s = self._clock.spent_s()
        if self._first is None and fraction > 0:
            self._first = fraction, spent_s
        if spent_s - self._said_s < _SAY_EVERY_S and fraction < 1:
            return
        self._said_s = spent_s
        line = f"{self._name}: {fraction:.0%}, {text}, {format_seconds(spent_s)}"
        first, first_s = self._first or (fraction, spent_s)
        gained = fraction - first
        if gained > _LEAST_FRACTION and fraction < 1:
            left_s = min((spent_s - first_s) * (1 - fraction) / gained, self._clock.left_s())
            line += f", about {format_seconds(left_s)} left"
        self._say(line)


def _track_begin(
    tracker: Tracker,
    data: FitData,
    settings: FitSettings,
    chosen: Sequence[Part],
    skipped: Mapping[str, str],
) -> None:
    tracker.config(
        {
            "settings": dict(msgspec.structs.asdict(settings)),
            "parts": [part.name for part in chosen],
            "skipped": dict(skipped),
            "data": [*map(_plain, data.sources)],
        }
    )
    for source in data.sources:
        tracker.artifact(
            f"{source.kind}-{source.sha256[:12]}", kind="dataset", files=(), metadata=_plain(source)
        )


def _track_end(
    tracker: Tracker, data: FitData, done: Mapping[str, PartResult], files: Sequence[Path]
) -> None:
    figures: dict[str, float] = {}
    for name, result in done.items():
        rows = [
            (item.split, item.group, item.num_samples, item.mape, item.bias, item.coverage)
            for item in result.splits
        ]
        if rows:
            columns = ("split", "group", "num_samples", "mape", "bias", "coverage")
            tracker.table(f"{name}/splits", columns, rows)
        if result.worst.rows:
            tracker.table(f"{name}/worst", result.worst.columns, result.worst.rows)
        figures |= {
            f"{name}/{item.split}/mape": item.mape for item in result.splits if item.group == "all"
        }
    tracker.summary(figures)
    tracker.artifact(
        "meshwright-cost-model",
        kind="model",
        files=files,
        metadata=figures,
        made_from=[source.sha256 for source in data.sources],
    )
    # The same hash as plans and planners give for what they were priced with.
    made(tracker, "cost-model", weights_sha256(files[0].parent))


def _plain(source: DataSource) -> dict[str, JsonValue]:
    return dict(msgspec.structs.asdict(source))
