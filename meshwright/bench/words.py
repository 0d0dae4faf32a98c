"""Words of a row for recompute and pipeline schedules, as frameworks name them, as what we have."""

from __future__ import annotations

import re

from meshwright.bench.runs import MeasuredRun
from meshwright.plans.plan import Recompute, ScheduleName

__all__ = ["is_core_attention", "recompute_of", "schedule_of", "virtual_of"]

_OFF = frozenset(("none", "no", "not", "off", "false", "disabled", "without", "0"))
_CORE = frozenset(("core", "attn", "attention", "sdpa"))
_SELECTIVE = _CORE | {"selective", "selected", "op"}
_FULL = frozenset((
    "full", "block", "blocks", "uniform", "all", "layer", "layers", "activation", "checkpoint",
    "checkpointing", "on", "yes", "true", "enabled", "1",
))  # fmt: skip
_BESIDE = _FULL | _SELECTIVE | {"recompute", "recomputation", "granularity", "method", "modules"}
_SCHEDULES = (
    (r"noninterleav|nointerleav", ScheduleName.ONE_F_ONE_B),
    (r"zb|zerobubble|dualpipe", ScheduleName.ZB_H1),
    (r"interleav|vpp|vp\d|virtual|looped", ScheduleName.INTERLEAVED),
    (r"gpipe|filldrain|fthenb|afab", ScheduleName.GPIPE),
    (r"1f1b|pipedream|dapple", ScheduleName.ONE_F_ONE_B),
)
"""What a schedule's name has in it, without blanks and dashes; the first that fits counts."""
_SAME_AS_ZB_H1 = frozenset(("zb", "zbh1", "zb1p", "zerobubble"))


def recompute_of(run: MeasuredRun) -> tuple[Recompute, tuple[str, ...]]:
    """What is computed again, and what was assumed.

    Megatron's and NeMo's words are known (``core_attn``, ``block``, ``uniform``) and switches, too.
    A number of layers counts for nothing: all are taken.
    """
    text = (run.recompute or "").lower()
    if text in tuple(Recompute):
        return Recompute(text), ()
    words = set(re.findall(r"[a-z]+|\d+", text))
    if not words:
        return Recompute.NONE, ("recompute not told: none",)
    if words & _OFF:
        return Recompute.NONE, ()
    unknown = sorted(word for word in words - _BESIDE if not word.isdigit())
    # "full attention" tells of all, "selective, 1" of some.
    is_full = bool(words & _FULL) and not words & (_SELECTIVE - _CORE)
    if is_full and ("full" in words or not words & _CORE):
        partly = any(word.isdigit() and word != "1" for word in words)
        return Recompute.FULL, _taken(run, "full, of all layers" if partly else "full", unknown)
    if words & _SELECTIVE:
        return Recompute.SELECTIVE, _taken(run, "selective", unknown)
    return Recompute.NONE, (f"recompute {run.recompute!r} is unknown: taken as none",)


def _taken(run: MeasuredRun, word: str, unknown: list[str]) -> tuple[str, ...]:
    left = f", without {', '.join(unknown)}" if unknown else ""
    return (f"recompute {run.recompute!r} taken as {word}{left}",)


def is_core_attention(run: MeasuredRun) -> bool:
    """Whether the word for recompute names attention, whatever the framework's own choice is."""
    return bool(_CORE & set(re.findall(r"[a-z]+", (run.recompute or "").lower())))


def schedule_of(run: MeasuredRun) -> tuple[ScheduleName | None, tuple[str, ...]]:
    """The schedule the word of ``run`` names, and what was assumed; ``None``: it names none."""
    key = re.sub(r"[^a-z0-9]|schedule", "", (run.schedule or "").lower())
    if key in ("", "none"):
        return None, () if key else ("schedule not told: 1F1B",)
    for pattern, found in _SCHEDULES:
        if re.search(pattern, key):
            is_near = found is ScheduleName.ZB_H1 and key not in _SAME_AS_ZB_H1
            said = (f"schedule {run.schedule!r} taken as {found}",) if is_near else ()
            return found, said
    order = "interleaved 1F1B" if (run.virtual_stages or 1) > 1 else "1F1B"
    return None, (f"schedule {run.schedule!r} is unknown: taken as {order}",)


def virtual_of(run: MeasuredRun) -> int | None:
    """Stages of a device as the word for the schedule tells them: 4 of ``interleaved, vpp 4``."""
    found = re.search(r"(?:vpp|vp|virtual)\D{0,12}(\d{1,2})\b", (run.schedule or "").lower())
    return int(found.group(1)) or None if found else None
