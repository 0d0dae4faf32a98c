"""Where a row's pipeline is cut: the first segment of each stage."""

from __future__ import annotations

import re
from itertools import pairwise

from meshwright.bench.runs import MeasuredRun
from meshwright.errors import BadRequest
from meshwright.graph.segments import Segmentation

__all__ = ["starts_of"]

_CUTS = re.compile(r"stage cuts \[([0-9, ]+)\] over (\d+)")
_UNIT = re.compile(r"((?:\w+\.)*)(?:layers|blocks)\.(\d+)|(stages\.\d+)\.(\d+)")


def starts_of(
    run: MeasuredRun, segmentation: Segmentation, pp: int, virtual: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """First segment of each of ``pp * virtual`` stages, and what was assumed.

    Layers in equal runs, or as the row's notes cut them. Where that does not come out even,
    embedding and head count as layers if that does (Megatron's options for uneven
    pipelines), or if there are too few layers; else runs
    of layers differ by one. Stages that would be empty, of virtual ones, take half a layer.

    Raises:
        BadRequest: there are more stages than layers.
    """
    count = pp * virtual
    if count == 1:
        return (0,), ()
    layers = _first_segments(segmentation)
    cuts = _told_cuts(run, len(layers), count)
    if cuts is not None:
        return (0, *(layers[cut] for cut in cuts[1:])), ()
    if len(layers) >= count and (len(layers) % count == 0 or (len(layers) + 2) % count):
        return (0, *(layers[cut] for cut in _even(len(layers), count))), ()
    units, said = _with_ends(layers, segmentation), f"{count} stages for {len(layers)} layers: "
    said += "embedding and head count as layers"
    missing = count - len(units)
    if missing > 0:
        if missing >= pp or virtual == 1:
            raise BadRequest(f"{count} stages but {len(layers)} layers to cut between")
        units = _with_halves(units, missing, segmentation)
        said += f"; stages that would be empty take half a layer: {missing}"
        if len(units) < count:
            raise BadRequest(f"{count} stages but {len(layers)} layers to cut between")
    return (0, *(units[cut] for cut in _even(len(units), count))), (said,)


def _even(count: int, num_stages: int) -> list[int]:
    """First unit of each stage but the first."""
    return [stage * count // num_stages for stage in range(1, num_stages)]


def _with_ends(layers: list[int], segmentation: Segmentation) -> list[int]:
    """First segments of the layers, of what stands before them and of what stands behind."""
    behind = 1 + max(
        segment.index for segment in segmentation.segments if _UNIT.search(segment.name)
    )
    head = [behind] if behind < len(segmentation.segments) else []
    return [*([0] if layers[0] else []), *layers, *head]


def _with_halves(units: list[int], missing: int, segmentation: Segmentation) -> list[int]:
    """``units`` with a second start in each of the last ``missing`` layers of several segments."""
    ends = [*units[1:], len(segmentation.segments)]
    long = [start for start, end in zip(units, ends, strict=True) if start and end - start > 1]
    return sorted([*units, *(start + 1 for start in long[-missing:])])


def _first_segments(segmentation: Segmentation) -> list[int]:
    """The first segment of every layer."""
    firsts: list[int] = []
    seen: set[tuple[str, ...]] = set()
    for segment in segmentation.segments:
        match = _UNIT.search(segment.name)
        if match is not None:
            unit = tuple(part or "" for part in match.groups())
            if unit not in seen:
                seen.add(unit)
                firsts.append(segment.index)
    return firsts


def _told_cuts(run: MeasuredRun, num_layers: int, num_stages: int) -> tuple[int, ...] | None:
    """First layer of each stage from ``stage cuts [0, 15, 30] over 30`` in the notes.

    Units that are no layers stand before and after them, as many on each side.
    """
    match = _CUTS.search(run.notes or "")
    if match is None:
        return None
    cuts = [int(word) for word in match.group(1).replace(",", " ").split()]
    others = int(match.group(2)) - num_layers
    before = others // 2
    if len(cuts) != num_stages + 1 or others < 0:
        return None
    found = [min(max(cut - before, 0), num_layers - 1) for cut in cuts[:-1]]
    return tuple(found) if all(a < b for a, b in pairwise(found)) else None
