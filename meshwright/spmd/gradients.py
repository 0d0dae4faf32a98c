"""From the gradients a backward function makes to what the optimizer reads.

Every micro-batch adds to the accumulators: local gradients, or with ZeRO 2 and 3 the scattered
buckets. The last micro-batch adds the running sums and reduces, bucket by bucket, each as soon as
the gradients in it are there, so that the reduction runs beside the rest of the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshwright.spmd.body import Body
from meshwright.spmd.layout import MICRO, order_axes
from meshwright.spmd.parameters import (
    ZERO_AXIS,
    LocalParameter,
    own_chunk,
    reduce_bucket,
    scatter_bucket,
    split_scattered,
)
from meshwright.spmd.specs import LocalSpecs

__all__ = ["GradientSink", "finish_total"]


@dataclass(slots=True)
class _Bucket:
    """Gradients of one kind that wait for company."""

    parameters: list[LocalParameter] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    num_bytes: int = 0


class GradientSink:
    """Takes gradients in the order the backward pass makes them.

    In a function for a middle micro-batch (``final`` false) it only scatters ZeRO-2 and 3 buckets;
    ``accumulators`` are the function's results. In the final one it reduces to ``gradients``.
    """

    def __init__(
        self,
        body: Body,
        specs: LocalSpecs,
        *,
        final: bool,
        bucket_bytes: int,
        running_sums: list[int] | None,
        tied: frozenset[str],
    ) -> None:
        self.accumulators: list[int] = []
        self.gradients: dict[str, int] = {}
        self.totals: dict[str, int] = {}
        """Local gradients of parameters on several stages, before the exchange."""
        self.sums_read: list[int] = []
        self._body = body
        self._specs = specs
        self._final = final
        self._bucket_bytes = bucket_bytes
        self._running_sums = running_sums
        self._tied = tied
        self._buckets: dict[tuple[bool, tuple[str, ...]], _Bucket] = {}

    def take(self, parameter: LocalParameter, gradient: int, partial: tuple[str, ...]) -> None:
        """One parameter's gradient, partial over ``partial`` (mesh axes and ``micro``)."""
        axes = tuple(axis for axis in partial if axis != MICRO)
        scattered = parameter.zero_stage >= 2 and parameter.name not in self._tied
        if scattered and ZERO_AXIS in axes:
            self._add(parameter, gradient, axes, scatter=True)
            return
        if scattered:
            gradient = own_chunk(self._body, parameter, gradient)
        gradient = self._accumulated(gradient)
        if not self._final:
            return
        if parameter.name in self._tied:
            self.totals[parameter.name] = gradient
        elif parameter.zero_stage == 1 and ZERO_AXIS in axes:
            self._add(parameter, gradient, axes, scatter=True)
        elif parameter.zero_stage == 1:
            self._add(parameter, own_chunk(self._body, parameter, gradient), axes, scatter=False)
        else:
            self._add(parameter, gradient, axes, scatter=False)

    def flush(self) -> None:
        """Send what is left."""
        for key in list(self._buckets):
            self._send(key)

    def _accumulated(self, value: int) -> int:
        """Make ``value`` an accumulator, or add the running sum to it."""
        if not self._final:
            self.accumulators.append(value)
            return value
        if self._running_sums is None:
            return value
        spec = self._body.spec(value)
        if len(self.sums_read) == len(self._running_sums):
            self._running_sums.append(self._body.values.new(spec))
        running = self._running_sums[len(self.sums_read)]
        self.sums_read.append(running)
        return self._body.add(value, running)

    def _add(
        self, parameter: LocalParameter, gradient: int, axes: tuple[str, ...], *, scatter: bool
    ) -> None:
        if not axes and not scatter:
            self.gradients[parameter.name] = gradient
            return
        every_micro_batch = scatter and parameter.zero_stage >= 2
        key = (scatter, axes if not every_micro_batch else (*axes, MICRO))
        bucket = self._buckets.setdefault(key, _Bucket())
        spec = self._body.spec(gradient)
        if bucket.parameters and bucket.num_bytes + spec.num_bytes > self._bucket_bytes:
            self._send(key)
            bucket = self._buckets.setdefault(key, _Bucket())
        bucket.parameters.append(parameter)
        bucket.gradients.append(gradient)
        bucket.num_bytes += spec.num_bytes

    def _send(self, key: tuple[bool, tuple[str, ...]]) -> None:
        scatter, named = key
        bucket = self._buckets.pop(key)
        axes = tuple(axis for axis in named if axis != MICRO)
        if not scatter:
            reduced = reduce_bucket(
                self._body, bucket.gradients, axes=axes, ways=self._specs.ways(axes)
            )
        else:
            flat = scatter_bucket(
                self._body,
                bucket.parameters,
                bucket.gradients,
                ways=self._specs.ways((ZERO_AXIS,)),
            )
            if MICRO in named:
                flat = self._accumulated(flat)
                if not self._final:
                    return
            others = order_axes(axis for axis in axes if axis != ZERO_AXIS)
            (flat,) = reduce_bucket(self._body, [flat], axes=others, ways=self._specs.ways(others))
            reduced = split_scattered(self._body, bucket.parameters, flat)
        for parameter, gradient in zip(bucket.parameters, reduced, strict=True):
            self.gradients[parameter.name] = gradient


def finish_total(
    body: Body,
    specs: LocalSpecs,
    parameter: LocalParameter,
    total: int,
    partial: tuple[str, ...],
) -> int:
    """Reduce one summed gradient by itself, to the shape the optimizer updates."""
    axes = tuple(axis for axis in partial if axis != MICRO)
    if parameter.zero is None:
        return reduce_bucket(body, [total], axes=axes, ways=specs.ways(axes))[0]
    others = tuple(axis for axis in axes if axis != ZERO_AXIS)
    if ZERO_AXIS in axes:
        flat = scatter_bucket(body, [parameter], [total], ways=specs.ways((ZERO_AXIS,)))
        (flat,) = reduce_bucket(body, [flat], axes=others, ways=specs.ways(others))
        return split_scattered(body, [parameter], flat)[0]
    chunk = own_chunk(body, parameter, total)
    return reduce_bucket(body, [chunk], axes=others, ways=specs.ways(others))[0]
