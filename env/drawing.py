"""The growing plan for people: as text and as a picture.

The picture has the devices above, a box for each rank's place in the mesh as far as it is decided:
stages of a pipeline side by side in colors of their own, data parallel ranks below one another,
tensor parallel ranks next to each other. Below is a column for each decision made: its candidates
from the smallest up, the chosen one green, others that were valid blue, masked ones gray.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from meshwright.env.episode import Choice, Episode
from meshwright.env.instance import DECISIONS, ROW_DECISIONS

__all__ = ["drawn", "told"]

_WIDTH, _HEIGHT = 448, 320
_GREEN, _BLUE, _GRAY, _WHITE = (46, 139, 87), (100, 149, 237), (211, 211, 211), (255, 255, 255)
_STAGES = ((70, 130, 180), (255, 165, 0), (147, 112, 219), (60, 179, 113), (205, 92, 92))
_MAX_BOXES = 16
"""Along one side; larger meshes are drawn in part."""


def told(episode: Episode) -> str:
    """Lines: the instance, what is decided, what comes next or what the plan takes."""
    instance = episode.instance
    lines = [f"{instance.name}: {len(instance.rows)} rows, {instance.num_groups} groups"]
    row = [c for c in episode.history if c.decision < len(ROW_DECISIONS)]
    if row:
        lines.append("  " + "  ".join(f"{DECISIONS[c.decision]} {c.label}" for c in row))
    lines += [
        f"  {DECISIONS[c.decision]}: {c.label}"
        for c in episode.history
        if c.decision >= len(ROW_DECISIONS)
    ]
    if episode.is_done:
        speed = instance.reference_s / episode.time_s
        lines.append(f"  a step takes {episode.time_s:.4g} s, {speed:.2f}x the reference")
    else:
        choices = [
            episode.label(episode.decision, int(slot)) for slot in np.flatnonzero(episode.valid)
        ]
        lines.append(f"  next {DECISIONS[episode.decision]}: {' | '.join(choices)}")
    return "\n".join(lines) + "\n"


def drawn(episode: Episode) -> NDArray[np.uint8]:
    """(height, width, 3) picture of the module docstring."""
    picture = np.full((_HEIGHT, _WIDTH, 3), 255, dtype=np.uint8)
    half = _HEIGHT // 2
    _draw_mesh(picture[:half], episode)
    width = _WIDTH // len(DECISIONS)
    for choice in episode.history:
        _draw_choice(
            picture[half:, choice.decision * width : (choice.decision + 1) * width], choice
        )
    return picture


def _draw_mesh(picture: NDArray[np.uint8], episode: Episode) -> None:
    sizes = {
        DECISIONS[c.decision]: int(c.label)
        for c in episode.history
        if DECISIONS[c.decision] in ("tp", "cp", "ep", "pp", "dp")
    }
    stages = min(sizes.get("pp", 1), _MAX_BOXES)
    ranks = min(math.prod(sizes.get(axis, 1) for axis in ("dp", "cp", "ep")), _MAX_BOXES)
    tensor = min(sizes.get("tp", 1), _MAX_BOXES)
    height, width = picture.shape[:2]
    stage_edges = np.linspace(0, width, stages + 1).astype(int)
    rank_edges = np.linspace(0, height, ranks + 1).astype(int)
    for stage in range(stages):
        color = _STAGES[stage % len(_STAGES)] if sizes else _GRAY
        left, right = stage_edges[stage] + 2, stage_edges[stage + 1] - 2
        edges = np.linspace(left, right, tensor + 1).astype(int)
        for rank in range(ranks):
            for way in range(tensor):
                box = picture[
                    rank_edges[rank] + 1 : rank_edges[rank + 1] - 1,
                    edges[way] : max(edges[way] + 1, edges[way + 1] - 1),
                ]
                box[:] = color


def _draw_choice(picture: NDArray[np.uint8], choice: Choice) -> None:
    count = len(choice.valid)
    edges = np.linspace(picture.shape[0] - 2, 2, count + 1).astype(int)
    for slot, valid in enumerate(choice.valid):
        color = _GREEN if slot == choice.slot else _BLUE if valid else _GRAY
        picture[edges[slot + 1] : max(edges[slot] - 1, edges[slot + 1] + 1), 2:-2] = color
