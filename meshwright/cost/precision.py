"""What a job's precision means: the type of what is stored, and what linear layers multiply in.

fp8 is trained as Transformer Engine and torchao do: parameters, activations, gradients and what is
communicated are bf16, with fp32 copies and optimizer state as in bf16 training; products of linear
layers and of experts, forward and backward, read operands that were rounded to fp8 before each use
(``CURRENT_CAST`` bytes for each element of both, with scales of present values) and run at the
device's fp8 peak. Attention, norms, the router, the product that makes logits and embeddings stay
bf16 (``KindWork.is_cast``).
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.cluster.catalog import known_devices
from meshwright.cluster.model import Cluster
from meshwright.cost.calibration import Origin
from meshwright.cost.pricing import Pricing
from meshwright.errors import BadRequest
from meshwright.plans.plan import Precision

__all__ = [
    "CAST_EACH_USE",
    "CURRENT_CAST",
    "DELAYED_CAST",
    "FP8",
    "TORCH_DTYPE",
    "check_units",
    "pricing_for",
]

TORCH_DTYPE = {
    Precision.FP64: "float64",
    Precision.FP32: "float32",
    Precision.BF16: "bfloat16",
    Precision.FP16: "float16",
    Precision.FP8: "bfloat16",
}
"""Of parameters and activations."""

FP8 = "float8_e4m3fn"

DELAYED_CAST, CURRENT_CAST, CAST_EACH_USE = 2.0, 3.0, 5.0
"""Bytes moved to cast an operand for one of its two products: read it, write it and its transpose
in one byte each; scales of the present values need one more pass to find the largest. With a scale
for every row nothing is shared between the two."""


def check_units(cluster: Cluster, precision: Precision) -> None:
    """Check that every device of ``cluster`` has units for ``precision``.

    Raises:
        BadRequest: one has no fp8; names devices of the catalog that have.
    """
    if precision is not Precision.FP8:
        return
    for device in cluster.devices:
        if FP8 not in device.flop_per_s:
            having = [e.device.name for e in known_devices() if FP8 in e.device.flop_per_s]
            raise BadRequest(
                f"precision fp8: {device.name} has no units for it; use bf16, or one of "
                f"{', '.join(having)}"
            )


def pricing_for(pricing: Pricing, precision: Precision) -> Pricing:
    """``pricing`` with what ``precision`` says of products; itself where it says nothing."""
    if precision is not Precision.FP8:
        return pricing
    figures = pricing.calibration.with_figures(
        Origin.ASSUMPTION, matmul_dtype=FP8, cast_bytes=CURRENT_CAST
    )
    return replace(pricing, calibration=figures)
