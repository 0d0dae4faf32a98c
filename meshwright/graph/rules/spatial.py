"""Convolutions, pooling and resizing.

Images, channels and (as a contraction) input channels are free. A spatial dim may be cut where the
stride divides its rows and a rank's neighbors hold all else it reads (``Halo``).
"""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.graph.opgraph import Arg, Op, TensorSpec
from meshwright.graph.rules.base import (
    Halo,
    LocalArgKind,
    LocalArgument,
    OpRule,
    RuleFunction,
    einsum_rule,
)

__all__ = ["SPATIAL_RULES"]

_FIRST = (frozenset({0}),)
_INNER, _OUTER, _KERNEL = "xyz", "pqr", "UVW"


class _Window:
    """Letters of the spatial dims of an operator's inputs and outputs, and their halos."""

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        *,
        kernel: Arg,
        stride: Arg,
        padding: Arg,
        dilation: Arg = 1,
        is_plain: bool = True,
    ) -> None:
        """Find the halos; none where the operator is not ``is_plain``."""
        count = len(inputs)
        self.inner = _INNER[:count]
        self.halos: dict[str, tuple[Halo, str]] = {}
        outer = list(_OUTER[:count])
        kernels, steps = _each(kernel, count), _each(stride, count) or _each(kernel, count)
        pads, spreads = _each(padding, count), _each(dilation, count)
        for dim in range(count if is_plain else 0):
            if inputs[dim] != steps[dim] * outputs[dim]:
                continue
            if steps[dim] == 1:
                outer[dim] = self.inner[dim]
            reach = spreads[dim] * (kernels[dim] - 1)
            halo = Halo(steps[dim], pads[dim], reach - pads[dim] - steps[dim] + 1)
            self.halos[outer[dim]] = (halo, self.inner[dim])
        self.outer = "".join(outer)

    @property
    def fixed(self) -> str:
        """All letters: without a halo none may be cut."""
        return self.inner + self.outer


def _each(arg: Arg, count: int) -> tuple[int, ...]:
    """One number for each dim; empty where ``arg`` is an empty list."""
    items = arg if isinstance(arg, tuple) else (arg,)
    numbers = tuple(item for item in items if isinstance(item, int))
    return numbers * count if len(numbers) == 1 else numbers


def _argument(op: Op, position: int, default: Arg) -> Arg:
    return op.args[position] if len(op.args) > position else default


def _if(results: Sequence[TensorSpec | None], position: int, names: str) -> str:
    """Dims of a result that may be absent."""
    return names if results[position] is not None else ""


def _convolution(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """Groups fix the channels; a transposed one has no halo rule."""
    assert results[0] is not None
    grouped, transposed = op.args[8] != 1, op.args[6] is True
    image, out, weights = operands[0].shape, results[0].shape, operands[1].shape
    window = _Window(
        image[2:],
        out[2:],
        kernel=weights[2:],
        stride=op.args[3],
        padding=op.args[4],
        dilation=op.args[5],
        is_plain=not transposed,
    )
    kernel = _KERNEL[: len(image) - 2]
    weight = ("oj" if grouped else "io" if transposed else "oi") + kernel
    left = f"ni{window.inner},{weight}" + (",o" if len(operands) == 3 else "")
    return einsum_rule(
        f"{left}->no{window.outer}",
        operands,
        results,
        fixed=window.fixed + kernel + ("ioj" if grouped else ""),
        partial={letter: frozenset() for letter in window.fixed},
        halos=window.halos,
        additive=frozenset({2}) if len(operands) == 3 else frozenset(),
    )


def _convolution_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    grouped, transposed = op.args[9] != 1, op.args[7] is True
    out, image, weights = (spec.shape for spec in operands)
    window = _Window(
        image[2:],
        out[2:],
        kernel=weights[2:],
        stride=op.args[4],
        padding=op.args[5],
        dilation=op.args[6],
        is_plain=not transposed,
    )
    kernel = _KERNEL[: len(image) - 2]
    weight = ("oj" if grouped else "io" if transposed else "oi") + kernel
    wanted = f"{_if(results, 0, f'ni{window.inner}')},{_if(results, 1, weight)}"
    present = {position for position, spec in enumerate(results) if spec is not None}
    sums = frozenset({1, 2} & present)
    return einsum_rule(
        f"no{window.outer},ni{window.inner},{weight}->{wanted},{_if(results, 2, 'o')}",
        operands,
        results,
        fixed=window.fixed + kernel + ("ioj" if grouped else ""),
        partial={
            **dict.fromkeys(window.fixed, sums),
            "n": sums,
            "o": frozenset({0} & present),
            "i": frozenset(),
        },
        halos=window.halos,
        linear=_FIRST,
        local_arguments=(LocalArgument(3, LocalArgKind.SIZE, tensor=-1, dim=1),)
        if op.args[3] is not None
        else (),
    )


def _max_pool(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """Indices count within an image's whole plane."""
    assert results[0] is not None
    window = _pool_window(op, operands[0], results[0], first=1, has_dilation=True)
    lead = _lead(operands[0])
    return einsum_rule(
        f"{lead}{window.inner}->{lead}{window.outer},{lead}{window.outer}",
        operands,
        results,
        fixed=window.fixed,
        partial={letter: frozenset() for letter in window.fixed},
        halos=window.halos,
    )


def _average_pool(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    assert results[0] is not None
    window = _pool_window(op, operands[0], results[0], first=1, has_dilation=False)
    lead = _lead(operands[0])
    return einsum_rule(
        f"{lead}{window.inner}->{lead}{window.outer}",
        operands,
        results,
        fixed=window.fixed,
        partial={letter: frozenset() for letter in window.fixed},
        halos=window.halos,
        linear=_FIRST,
    )


def _pool_backward(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    by_index = len(operands) == 3
    window = _pool_window(op, operands[1], operands[0], first=2, has_dilation=by_index)
    lead = _lead(operands[1])
    indices = f",{lead}{window.outer}" if by_index else ""
    return einsum_rule(
        f"{lead}{window.outer},{lead}{window.inner}{indices}->{lead}{window.inner}",
        operands,
        results,
        fixed=window.fixed,
        partial={letter: frozenset() for letter in window.fixed},
        halos=window.halos,
        linear=_FIRST,
    )


def _lead(spec: TensorSpec) -> str:
    return "nc"[4 - len(spec.shape) :]


def _pool_window(
    op: Op, image: TensorSpec, out: TensorSpec, *, first: int, has_dilation: bool
) -> _Window:
    """From the arguments of 2-d pooling, whose kernel is argument ``first``."""
    rounds_up = _argument(op, first + (4 if has_dilation else 3), False)
    # An average that leaves padding out of its count differs at the borders.
    counts_padding = has_dilation or _argument(op, first + 4, True) is True
    padding = _argument(op, first + 2, 0)
    return _Window(
        image.shape[-2:],
        out.shape[-2:],
        kernel=op.args[first],
        stride=_argument(op, first + 1, ()),
        padding=padding,
        dilation=_argument(op, first + 3, 1) if has_dilation else 1,
        is_plain=rounds_up is False and (counts_padding or not any(_each(padding, 2))),
    )


def _per_image(
    op: Op, operands: Sequence[TensorSpec], results: Sequence[TensorSpec | None]
) -> OpRule:
    """Adaptive pooling and resizing: image and channel are free, the spatial dims are not."""
    names: list[str] = []
    letters = iter("pqrstuvwxyz" + "ABCDEFGHIJKLMNOPQRSTUVW")
    fixed: list[str] = []
    for spec in (*operands, *results):
        if spec is None:
            names.append("")
            continue
        lead = "nc"[4 - len(spec.shape) :] if len(spec.shape) <= 4 else "nc"
        own = [next(letters) for _ in range(len(spec.shape) - len(lead))]
        fixed += own
        names.append(lead + "".join(own))
    left, right = names[: len(operands)], names[len(operands) :]
    backward = "backward" in op.target
    sized = backward and op.target.startswith("aten.upsample")
    return einsum_rule(
        f"{','.join(left)}->{','.join(right)}",
        operands,
        results,
        fixed="".join(fixed),
        linear=_FIRST if backward or "avg_pool" in op.target else (),
        local_arguments=(LocalArgument(2, LocalArgKind.SHAPE),) if sized else (),
    )


SPATIAL_RULES: dict[str, RuleFunction] = {
    "aten.convolution.default": _convolution,
    "aten.convolution_backward.default": _convolution_backward,
    "aten.max_pool2d_with_indices.default": _max_pool,
    "aten.max_pool2d_with_indices_backward.default": _pool_backward,
    "aten.avg_pool2d.default": _average_pool,
    "aten.avg_pool2d_backward.default": _pool_backward,
    "aten._adaptive_avg_pool2d.default": _per_image,
    "aten._adaptive_avg_pool2d_backward.default": _per_image,
    "aten.upsample_nearest2d.vec": _per_image,
    "aten.upsample_nearest2d.default": _per_image,
    "aten.upsample_nearest2d_backward.default": _per_image,
    "aten.upsample_bilinear2d.default": _per_image,
    "aten.upsample_bilinear2d_backward.default": _per_image,
}
