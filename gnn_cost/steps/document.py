"""A ``LearnedSteps`` as a part of ``steps.json``: the measured steps, and how far they reach.

No weights: these follow from the steps, and take milliseconds to find. Where there are more than
``MOST_STEPS``, those are kept that tell most: each the one least explained by those before it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.cost.pricing import Correction, StepShape
from meshwright.gnn_cost.steps.correction import (
    STEP_FEATURES,
    LearnedSteps,
    StepCorrection,
    matern,
    scaled,
)
from meshwright.strict_json import FieldError

__all__ = ["MOST_STEPS", "LazySteps", "StepsDocument", "document_of", "most_telling"]

FloatArray = NDArray[np.float64]

MOST_STEPS = 400
_DIGITS = 7

_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_Log = Annotated[float, msgspec.Meta(ge=-20, le=20)]


class StepsDocument(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of S measured steps."""

    features: dict[str, _Positive]
    """Names to units, as ``STEP_FEATURES`` had them."""
    steps: Annotated[list[list[Annotated[float, msgspec.Meta(ge=-1e4, le=1e4)]]], msgspec.Meta(
        min_length=3, max_length=2 * MOST_STEPS
    )]  # fmt: skip
    """(S, F)"""
    log_ratio: list[_Log]
    """(S,) log(measured / predicted)."""
    length: list[_Positive]
    """(F,) in units."""
    amplitude: _Positive
    noise: _Positive
    half_width_scale: _Positive

    def __post_init__(self) -> None:
        if self.features != dict(STEP_FEATURES):
            raise FieldError(
                "features", "are of another version of Meshwright; fit again with `meshwright fit`"
            )
        count = len(self.features)
        if any(len(row) != count for row in self.steps) or len(self.length) != count:
            raise FieldError("steps", f"must have {count} features each, and as many lengths")
        if len(self.log_ratio) != len(self.steps):
            raise FieldError("log_ratio", f"must have {len(self.steps)} entries")

    def learned(self) -> LearnedSteps:
        """What corrects steps."""
        model = StepCorrection.of(
            np.array(self.steps, np.float64),
            np.array(self.log_ratio, np.float64),
            length=np.array(self.length, np.float64),
            amplitude=self.amplitude,
            noise=self.noise,
        )
        return LearnedSteps(model=model, half_width_scale=self.half_width_scale)


class LazySteps:
    """A ``StepCorrector`` that is made of its document when it is first asked."""

    def __init__(self, document: StepsDocument) -> None:
        self._document = document
        self._learned: LearnedSteps | None = None

    def step(self, shape: StepShape) -> Correction:
        """See ``StepCorrector``."""
        if self._learned is None:
            self._learned = self._document.learned()
        return self._learned.step(shape)


def document_of(
    model: StepCorrection,
    features_SF: FloatArray,
    log_ratio_S: FloatArray,
    *,
    half_width_scale: float,
) -> StepsDocument:
    """What to keep of a correction and the steps it was fitted on."""
    kept = most_telling(model, features_SF)

    def digits(values: FloatArray) -> FloatArray:
        return np.round(values, _DIGITS)

    return StepsDocument(
        features=dict(STEP_FEATURES),
        steps=digits(features_SF[kept]).tolist(),
        log_ratio=digits(log_ratio_S[kept]).tolist(),
        length=model.length.tolist(),
        amplitude=model.amplitude,
        noise=model.noise,
        half_width_scale=half_width_scale,
    )


def most_telling(
    model: StepCorrection, features_SF: FloatArray, count: int = MOST_STEPS
) -> NDArray[np.int64]:
    """Places of at most ``count`` steps, each the least explained by those chosen before it.

    A Cholesky decomposition with pivots, ended early.
    """
    total = len(features_SF)
    if total <= count:
        return np.arange(total)
    points = scaled(features_SF, model.length)
    left_S = np.ones(total)
    roots_CS = np.zeros((count, total))
    chosen: list[int] = []
    for rank in range(count):
        place = int(np.argmax(left_S))
        own = matern(points[place][None], points)[0] - roots_CS[:rank, place] @ roots_CS[:rank]
        roots_CS[rank] = own / np.sqrt(max(left_S[place], 1e-12))
        left_S = np.maximum(left_S - roots_CS[rank] ** 2, 0.0)
        left_S[[*chosen, place]] = -1.0
        chosen.append(place)
    return np.sort(np.array(chosen, np.int64))
