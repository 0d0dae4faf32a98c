"""Bytes of parameters, gradients and optimizer state, and what reducing and gathering them moves.

For a parameter of ``n`` local elements of ``e`` bytes, cut by ZeRO into chunks of ``c`` elements
(padding included; ``c = n`` without ZeRO), as ``runtime.state`` holds it::

                         ZeRO 0          ZeRO 1, 2          ZeRO 3
    parameters           n e             n e                c e
    gradient             n e             n e | c e          c e
    moments (AdamW)      2 n m           2 c m              2 c m
    copy the optimizer   -  | 4 n        c e | 4 c          -  | 4 c
    updates (fp32, fp64 | bf16, fp16)

``m`` is 4 bytes in bf16 and fp16, else ``e``. A calibration may say that parameters are stored, or
gradients kept or reduced, in items of another size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost.calibration import DEFAULTS, Calibration
from meshwright.cost.columns import FloatArray, IntArray, ParameterColumns
from meshwright.cost.offload import with_offload
from meshwright.errors import PlanRefused
from meshwright.plans.plan import OptimizerName, OptimizerSpec
from meshwright.spmd.parameters import ZERO_AXIS, choose_zero_shard, zero_refusal

__all__ = ["ParameterState", "ParameterTable", "StageParameters"]

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterState:
    """Per parameter, under one choice of ZeRO stages and ``dp_shard``; bytes of one rank."""

    zero_stage: IntArray
    local_bytes: FloatArray
    chunk_bytes: FloatArray
    """Of what the optimizer updates, in the model's element type, padding included."""
    padded_bytes: FloatArray
    """``chunk_bytes`` of all ranks: payload of a gather or reduce-scatter."""
    stored_bytes: FloatArray
    optimizer_bytes: FloatArray
    gradient_bytes: FloatArray
    """Where gradients are kept over micro-batches."""
    step_bytes: FloatArray
    """Temporaries of the optimizer's step."""
    step_traffic_bytes: FloatArray
    """Read and written by the optimizer's step."""
    clipping_bytes: FloatArray
    """Read and written by gradient clipping."""
    reduction_scale: FloatArray
    """Bytes of a gradient as it is reduced over those in the parameter's type."""
    host_link_bytes: FloatArray
    """Gradients and parameters that go to the host and back in each step (``cost.offload``)."""
    host_step_bytes: FloatArray
    """Read and written by the host's step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParameters:
    """Which parameters live on which stage."""

    parameter: IntArray
    stage: IntArray
    """Distinct pairs."""
    segment: IntArray
    """First segment of the stage that reads the parameter."""
    is_tied: IntArray
    """1 where the parameter lives on several stages."""


class ParameterTable:
    """Answers about all parameters of one sharded graph."""

    def __init__(self, columns: ParameterColumns, *, is_rounded: bool) -> None:
        """``is_rounded``: the allocator rounds every tensor up to 512 bytes (CUDA)."""
        self.columns = columns
        self._is_rounded = is_rounded
        self._elements = np.array([math.prod(shape) for shape in columns.shapes], dtype=np.float64)
        self._chunks: dict[int, FloatArray] = {}
        self._groups: dict[
            tuple[tuple[str, ...], bool], tuple[tuple[tuple[str, ...], ...], IntArray]
        ] = {}

    def _chunk_elements(self, dp_shard: int) -> FloatArray:
        if dp_shard not in self._chunks:
            found = []
            for shape in self.columns.shapes:
                elements = math.prod(shape)
                if shape and elements and dp_shard > 1:
                    zero = choose_zero_shard(shape, dp_shard)
                    elements = elements // shape[zero.dim] * zero.chunk
                found.append(elements)
            self._chunks[dp_shard] = np.array(found, dtype=np.float64)
        return self._chunks[dp_shard]

    def state(
        self,
        zero_stages: Sequence[int],
        *,
        dp_shard: int,
        optimizer: OptimizerSpec,
        offloaded: Sequence[bool] = (),
        calibration: Calibration = DEFAULTS,
    ) -> ParameterState:
        """Bytes per parameter.

        ``zero_stages`` and ``offloaded`` (empty: none) hold one entry for each segment;
        ``calibration`` tells of gradients and of the optimizer's traffic.

        Raises:
            PlanRefused: ZeRO would cut what operators already cut along its axis.
        """
        columns = self.columns
        zero = np.array([*zero_stages, 0], dtype=np.int64)[columns.first_segment]
        has_dims = np.array([bool(shape) for shape in columns.shapes], dtype=np.bool_)
        zero = np.where(has_dims & (dp_shard > 1), zero, 0)
        for row in np.flatnonzero(columns.is_cut & (zero > 0)).tolist():
            segment = int(columns.first_segment[row])
            name, stage = columns.names[row], int(zero[row])
            raise PlanRefused(zero_refusal(name, zero_stage=stage, segment=segment))
        item = columns.item_bytes
        low = columns.is_low_precision
        chunk = np.where(zero > 0, self._chunk_elements(dp_shard), self._elements)
        state_item = np.where(low, _FLOAT32_BYTES, item)
        stored_item = calibration.parameter_item_bytes or item
        is_copied = low & (calibration.parameter_item_bytes < _FLOAT32_BYTES)
        copies = np.where(is_copied, _FLOAT32_BYTES, np.where((zero == 1) | (zero == 2), item, 0))
        moments = _num_moments(optimizer)
        rounded = self._rounded
        cast = np.where(low & columns.has_gradient, rounded(chunk * _FLOAT32_BYTES), 0)
        temporary = optimizer.name == OptimizerName.ADAMW
        kept_item = calibration.gradient_item_bytes or item
        accesses = _accesses(optimizer) * state_item + np.where(low, 12, 0)
        found = ParameterState(
            zero_stage=zero,
            local_bytes=self._elements * item,
            chunk_bytes=chunk * item,
            padded_bytes=np.where(zero > 0, float(dp_shard), 1.0) * chunk * item,
            stored_bytes=rounded(np.where(zero == 3, chunk, self._elements) * stored_item),
            optimizer_bytes=rounded(chunk * copies) + moments * rounded(chunk * state_item),
            gradient_bytes=np.where(
                columns.has_gradient,
                rounded(np.where(zero >= 2, chunk, self._elements) * kept_item),
                0.0,
            ),
            step_bytes=cast + (rounded(chunk * state_item) if temporary else 0.0),
            step_traffic_bytes=chunk * accesses * calibration.optimizer_traffic,
            clipping_bytes=chunk * kept_item * columns.has_gradient * calibration.clipping_passes,
            reduction_scale=(calibration.reduction_item_bytes or item) / np.maximum(item, 1),
            host_link_bytes=np.zeros(len(chunk)),
            host_step_bytes=np.zeros(len(chunk)),
        )
        if not any(offloaded):
            return found
        return with_offload(found, np.array([*offloaded, False])[columns.first_segment])

    def _rounded(self, num_bytes: FloatArray) -> FloatArray:
        return np.ceil(num_bytes / 512) * 512 if self._is_rounded else num_bytes

    def on_stages(self, stage_of_segment: IntArray) -> StageParameters:
        """Where parameters live: on every stage with a segment that reads them."""
        parameter, segment = self.columns.use
        stage = stage_of_segment[segment]
        # ``use`` is sorted by parameter and segment, so the first of each pair has the least one.
        span = int(stage_of_segment.max()) + 1
        codes, first = np.unique(parameter * span + stage, return_index=True)
        found = codes // span
        count = np.bincount(found, minlength=len(self.columns.names))
        return StageParameters(
            parameter=found,
            stage=codes % span,
            segment=segment[first],
            is_tied=(count[found] > 1).astype(np.int64),
        )

    def gradient_groups(
        self, data_axes: tuple[str, ...], *, is_scaled: bool
    ) -> tuple[tuple[tuple[str, ...], ...], IntArray]:
        """Distinct sets of axes gradients are reduced over, and the set of each parameter.

        In scaled columns ``dp_shard`` stands for all of ``data_axes``.
        """
        key = (data_axes, is_scaled)
        if key in self._groups:
            return self._groups[key]
        groups: dict[tuple[str, ...], int] = {}
        index = []
        for axes in self.columns.gradient_axes:
            named: tuple[str, ...] = axes
            if is_scaled and ZERO_AXIS in axes:
                named = (*data_axes, *(axis for axis in axes if axis != ZERO_AXIS))
            elif is_scaled:
                named = tuple(axis for axis in axes if axis not in data_axes)
            index.append(groups.setdefault(named, len(groups)))
        self._groups[key] = (tuple(groups), np.array(index, dtype=np.int64))
        return self._groups[key]


def _num_moments(optimizer: OptimizerSpec) -> int:
    if optimizer.name == OptimizerName.ADAMW:
        return 2
    return 1 if optimizer.momentum else 0


def _accesses(optimizer: OptimizerSpec) -> int:
    """Elements read and written for each element updated, counted in torch's foreach code.

    AdamW: decay 2, lerp 3, mul 2, addcmul 4, sqrt 2, div 2, add 2, addcdiv 4.
    SGD: decay 3, momentum 5, update 3.
    """
    if optimizer.name == OptimizerName.ADAMW:
        return 21
    return 11 if optimizer.momentum else 6
