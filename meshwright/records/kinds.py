"""The kinds of Record, and the keys of ``extra`` that identify one of each.

The keys of operators and collectives follow what published tables of measurements use, and their
values the vocabularies below, so that ours and theirs can be read together and one query finds
both. A key that is not known is left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["COLLECTIVES", "DIRECTIONS", "DTYPES", "KINDS", "RESULT_KEYS", "Kind", "KindKeys"]

DIRECTIONS = ("fwd", "bwd", "update")
"""Parts of a training step: forward, backward (of every input), the optimizer's update."""

DTYPES = (
    "fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp8_e5m2",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
    "complex128", "complex64",
    "fp8_block", "nvfp4", "bf16_fp8kv", "int4_wo", "w4a16_mxfp4", "w4a8_mxfp4_mxfp8", "unknown",
)  # fmt: skip
"""Types of elements: ``tf32`` is fp32 whose products are rounded, ``fp8`` e4m3 with one scale for
each tensor; the last row are formats of quantized inference, by the names of published tables."""

COLLECTIVES = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv",
    "reduce", "gather", "scatter", "hypercube",
)  # fmt: skip


class Kind(StrEnum):
    """What sort of thing was measured."""

    OPERATOR = "operator"
    COLLECTIVE = "collective"
    OVERLAP = "overlap"
    MACHINE = "machine"
    SEGMENT_TIME = "segment_time"
    STEP_TIME = "step_time"
    MEMORY = "memory"
    RUN = "run"
    JOB = "job"


@dataclass(frozen=True, slots=True, kw_only=True)
class KindKeys:
    """One kind: the unit of its value and the keys its ``extra`` may hold."""

    units: tuple[str, ...]
    says: str
    """What ``name`` and the value are."""
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    """Beginnings of further keys: ``mesh_`` before each axis of a mesh; empty allows every key."""
    names: tuple[str, ...] = ()
    """What ``name`` may be; empty where anything."""
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By key of ``extra``: what it may hold, where that is one of few words."""

    def allows(self, key: str) -> bool:
        """Whether ``extra`` may hold ``key``."""
        return key in self.required or key in self.optional or key.startswith(self.prefixes)


KINDS: dict[Kind, KindKeys] = {
    Kind.OPERATOR: KindKeys(
        units=("s",),
        says="seconds of one operator on one device; name: linear, bmm, sdpa, layer_norm, ...",
        required=("direction", "dtype"),
        optional=(
            "b", "m", "n", "k",
            "seq_q", "seq_k", "heads", "kv_heads", "head_dim", "causal",
            "experts", "top_k",
            "channels_in", "channels_out", "kernel", "stride", "height", "width", "groups",
            "numel", "num_tensors", "shape", "variant",
            "tp", "model", "role",
            "compiled", "num_threads", "cache_flushed", "clock", "num_calls",
            "flops", "bytes", "peak_memory_bytes", "workspace_bytes", "saved_bytes",
        ),
        values={"direction": DIRECTIONS, "dtype": DTYPES},
    ),
    Kind.COLLECTIVE: KindKeys(
        units=("s",),
        says="seconds of one collective, median over repeats of the slowest rank; "
        "name: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send_recv",
        required=("bytes", "group_size"),
        optional=(
            "backend", "dtype", "fabric", "ranks_per_host", "hosts", "stride", "num_threads",
            "in_place", "num_calls", "rank", "world_size", "num_groups", "group", "iteration",
        ),
        names=COLLECTIVES,
        values={"dtype": DTYPES},
    ),
    Kind.OVERLAP: KindKeys(
        units=("ratio",),
        says="time beside the other over time alone; name: compute or communication",
        required=("collective", "bytes", "group_size", "operator"),
        optional=("backend", "dtype", "num_threads", "m", "n", "k", "alone_s", "together_s"),
        values={"collective": COLLECTIVES, "dtype": DTYPES},
    ),
    Kind.MACHINE: KindKeys(
        units=("flop/s", "bytes/s", "s", "bytes"),
        says="one figure of a machine; name: matmul_peak, memory_bandwidth, cache_bandwidth, "
        "launch_latency, host_copy_bandwidth, ...",
        required=(),
        optional=("dtype", "operator", "bytes", "num_threads", "num_ranks", "m", "n", "k"),
        values={"dtype": DTYPES},
    ),
    Kind.SEGMENT_TIME: KindKeys(
        units=("s",),
        says="seconds of one segment of a captured model; name: the model",
        required=("graph_sha256", "segment", "direction", "precision"),
        optional=("segment_class", "batch", "seq_len", "num_threads", "clock", "multiplicity"),
    ),
    Kind.STEP_TIME: KindKeys(
        units=("s",),
        says="seconds of one training step; name: the model",
        required=("precision",),
        optional=(
            "graph_sha256", "plan_sha256", "cluster", "num_microbatches", "batch", "seq_len",
            "num_threads", "clock", "samples_per_s", "tokens_per_s", "predicted_step_time_s",
            "rank", "iteration", "compiled", "optimizer", "num_params", "peak_memory_bytes",
            "compute_s", "communication_s", "overlap_s", "idle_s",
        ),
        prefixes=("mesh_",),
    ),
    Kind.MEMORY: KindKeys(
        units=("bytes",),
        says="bytes held on one device; name: the model or operator",
        required=("cause",),
        optional=(
            "rank", "graph_sha256", "plan_sha256", "cluster", "precision", "num_microbatches",
            "batch", "seq_len", "segment", "direction",
        ),
        prefixes=("mesh_",),
    ),
    Kind.RUN: KindKeys(
        units=("s", "ranks"),
        says="seconds of one optimizer step of a published run, or (unit ranks) a run that failed "
        "for memory; name: the model; keys: the columns of a table of measured runs",
        required=("run_id",),
        prefixes=("",),
    ),
    Kind.JOB: KindKeys(
        units=("s", "gpus"),
        says="how long one job of a cluster trace ran, or (unit gpus) how many GPUs it had where "
        "its time is not known; name: its model where that is known",
        required=("job_id",),
        optional=(
            "cluster", "submit_s", "gpus", "gpu_type", "model_is_synthetic", "total_steps",
            "duration_is_derived",
        ),
    ),
}  # fmt: skip

RESULT_KEYS = frozenset(
    {
        "flops", "peak_memory_bytes", "workspace_bytes", "saved_bytes", "num_calls",
        "alone_s", "together_s", "samples_per_s", "tokens_per_s", "predicted_step_time_s",
        "compute_s", "communication_s", "overlap_s", "idle_s", "iteration",
    }
)  # fmt: skip
"""Keys of ``extra`` that say more about the result and do not identify what was measured."""
