"""What the words of a row say of the software: options of the model, the plan and the prices.

Nothing here is fitted. Each option is what the named software does by its documentation or source;
where a row does not tell, the default stands in ``assumptions``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from meshwright.bench.runs import MeasuredRun
from meshwright.bench.words import is_core_attention, recompute_of
from meshwright.cost.calibration import Calibration, Origin
from meshwright.cost.precision import CAST_EACH_USE, CURRENT_CAST, DELAYED_CAST, FP8, TORCH_DTYPE
from meshwright.plans.plan import Precision, Recompute

__all__ = ["Selective", "Software", "calibration_for", "software_of"]

_NO_BUCKETS = 2**60
_DEEPSPEED_BUCKET, _MEGATRON_BUCKET, _MEGATRON_BUCKET_OF_RANK = 500_000_000, 40_000_000, 1_000_000
"""Elements."""
_JOINED_TRAFFIC, _COMPILED_TRAFFIC = 0.8, 0.6
"""Share of element-wise traffic left by hand-written kernels, and by a compiler. Biases are part of
products in our graphs; of what is left, dropout with addition and SiLU with product move 3 passes
instead of 5, and only a compiler joins the rest. Assumptions."""
_EAGER_LAUNCH_SCALE = 8.0
"""40 microseconds of the host for each operator of an eager training framework, with its modules,
autograd and checkpointing. Learned from the rows of vTrain's single-node table that no device can
explain: at hidden 1024 with micro-batches of 1 a layer takes 3.0 to 3.5 ms whatever tp is."""
_COMPILED_LAUNCH_SCALE = 2.0
"""A compiled graph calls its kernels without modules and autograd. Assumption."""
_RESERVED_SHARE = 0.1
"""Reserved but not allocated, over what comes and goes: learned from torchtitan's seven rows."""


_OLD_ATTENTION_ON_HOPPER = 0.55
"""FlashAttention-2 reaches 0.35 of an H100's peak, kernels made for Hopper 0.6 to 0.75 (arXiv
2407.08608): what ``scaled_dot_product_attention`` of PyTorch 2 calls there."""
_FIRST_ATTENTION = 0.6
"""Rate of FlashAttention's first generation over the second's on A100 (arXiv 2307.08691)."""
_PUBLISHED_BESIDE = 0.8
"""Of the forward that the gather of updated parameters may hide behind, where a framework starts it
layer by layer: all but the first layers. Assumption."""
_WAITING_GATHER_S_PER_BYTE = 32e-12
"""DeepSpeed's ZeRO-3 until the summer of 2021 gathered parameter by parameter, waited for the
device before each and copied the result (its pull request 1188 says and mends it). What that took
is learned from SC'21's six rows: the median of what they leave over compute and links. It was 13 on
384 ranks and 56 on 1,536, so more ranks wait longer than this says."""
_OVERLAPPED_TENSOR = 0.35
"""Of tensor-parallel communication that hides behind the product it feeds, cut into chunks. Learned
from torchtitan's three pairs of runs with and without; Transformer Engine's is assumed as good."""


class Selective(StrEnum):
    """What is computed again under selective recompute."""

    POINTWISE = "pointwise"
    """All but products and attention: our own runtime."""
    CORE_ATTENTION = "core_attention"
    """Scores, softmax and mixing alone (arXiv 2205.05198): Megatron, NeMo."""
    EVERY_SECOND_PRODUCT = "every_second_product"
    """All but attention and every second product: torchtitan's per-op checkpointing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What a framework does, as far as it shows in time or memory."""

    precision: Precision
    """Of parameters and activations."""
    matmul_dtype: str
    """A torch dtype name or ``nvfp4``: what linear layers multiply in; attention keeps
    ``precision``."""
    fused_attention: bool
    """One kernel that keeps no scores."""
    fuses_pointwise: bool
    """Chains of element-wise operators run as one kernel: a compiler, or hand-written ones."""
    fused_loss: bool
    """The loss needs no fp32 copies of the logits: llm-foundry's default kernel, Megatron's, which
    works in place, or compiled code."""
    dropout: float
    sequence_parallel: bool
    """Tensor parallelism also cuts what lies between its products along the sequence."""
    pads_vocab_to: int
    """Vocabulary is padded to a multiple of this times tp; 1: not padded."""
    bucket_bytes: int
    """Of gradients reduced while the backward goes on, where not by layers."""
    is_compiled: bool
    """Operators are launched by compiled code, not by modules in Python."""
    overlaps_gradients: bool
    """Reduces gradients beside the backward; else after it."""
    attention_forward_efficiency: float
    """Of the kernel that trains, over the fastest one there is."""
    cast_bytes: float
    """Traffic for each element of an operand cast to ``matmul_dtype``."""
    waits_for_gathers: bool
    """ZeRO-3 prefetches nothing: DeepSpeed's first years."""
    overlapped_tensor: float
    """Share of tensor-parallel communication that hides behind compute."""
    selective: Selective
    """What selective recompute means here."""
    gradient_bytes: int
    """Of an element of a gradient as it is accumulated and reduced."""
    keeps_full_precision: bool
    """Parameters and their gradients are stored in fp32 and cast where they are gathered: FSDP."""
    accumulates_in_place: bool
    """Gradients live in buffers of their own from the start: Megatron."""
    balances_context: bool
    """Context-parallel ranks hold tokens of both ends (Megatron-Core, Transformer Engine); without,
    consecutive ones: torchtitan's runs over 4 and 8 ranks took as long as that takes."""
    shards_over_context: bool
    """ZeRO cuts over context-parallel ranks too: FSDP2 and Megatron."""
    reports_reserved: bool
    """The peak it prints is what the allocator reserved, not what was allocated: torchtitan."""
    reports_last_rank: bool
    """Its peak is the last rank's, of the last stage: what Megatron writes for TensorBoard, and
    its test cases compare."""
    zero_stage: int
    recompute: Recompute
    assumptions: tuple[str, ...]


def software_of(run: MeasuredRun) -> Software:
    """The options of ``run``."""
    text = " ".join(filter(None, (run.framework, run.notes))).lower()
    name = (run.framework or "").lower()
    said: list[str] = []
    precision, matmul_dtype = _precision(run, said)
    is_titan = "torchtitan" in name or "fsdp2" in name
    is_fsdp = "fsdp" in name or is_titan
    is_old = _is_old(name)
    is_megatron = "megatron" in name or "nemo" in name
    gradient_bytes = _gradient_bytes(is_megatron, is_old, is_titan, precision)
    overlaps = _overlaps(run, text, is_megatron=is_megatron, is_fsdp=is_fsdp)
    return Software(
        precision=precision,
        matmul_dtype=matmul_dtype,
        fused_attention=_fused_attention(run, is_old, said),
        fuses_pointwise=_fuses(text, is_titan),
        # torchtitan left its loss out of what it compiles.
        fused_loss=is_megatron or "mpt" in name or (_is_compiled(text) and not is_titan),
        dropout=_dropout(run, is_megatron or "deepspeed" in name, said),
        sequence_parallel=_sequence_parallel(run, is_titan, said),
        pads_vocab_to=128 if is_megatron or "deepspeed" in name else 1,
        bucket_bytes=_bucket_bytes(run, name, gradient_bytes, overlaps, is_megatron=is_megatron),
        is_compiled=_is_compiled(text),
        attention_forward_efficiency=_attention_efficiency(run, is_megatron=is_megatron),
        cast_bytes=_cast_bytes(text, is_megatron=is_megatron),
        waits_for_gathers=is_old,
        overlapped_tensor=_overlapped_tensor(text),
        selective=_selective(is_megatron or is_old or is_core_attention(run), is_titan),
        overlaps_gradients=overlaps,
        gradient_bytes=gradient_bytes,
        keeps_full_precision=is_fsdp,
        accumulates_in_place=is_megatron,
        balances_context=is_megatron or bool(re.search("zig-?zag|load.balanced", text)),
        shards_over_context=is_titan or is_megatron,
        reports_reserved="torchtitan" in name,
        reports_last_rank=is_megatron and bool(re.search("ci run|golden file|tensorboard", text)),
        zero_stage=_zero_stage(run, is_fsdp, text, said),
        recompute=_recompute(run, said),
        assumptions=tuple(said),
    )


def _bucket_bytes(
    run: MeasuredRun, name: str, gradient_bytes: int, overlaps: bool, *, is_megatron: bool
) -> int:
    """Of gradients reduced at a time, by each framework's default.

    DeepSpeed: 5e8 elements (``reduce_bucket_size``); Megatron-Core where it overlaps: 4e7, or 1e6
    for each rank of data parallelism (``ddp_bucket_size``); torch's DDP: 25 MiB.
    """
    if "deepspeed" in name and (run.zero_stage or "zero" in name):
        return _DEEPSPEED_BUCKET * gradient_bytes
    if not overlaps:
        return _NO_BUCKETS
    if is_megatron:
        return max(_MEGATRON_BUCKET, _MEGATRON_BUCKET_OF_RANK * (run.dp or 1)) * gradient_bytes
    return 25 * 2**20


def calibration_for(software: Software, base: Calibration) -> Calibration:
    """``base`` with the figures that the software decides; the rest of them stay."""
    figures: dict[str, float | str] = {"reduction_item_bytes": software.gradient_bytes}
    figures["gradient_item_bytes"] = 4 if software.keeps_full_precision else software.gradient_bytes
    figures["parameter_item_bytes"] = 4 if software.keeps_full_precision else 0
    figures["accumulates_in_place"] = int(software.accumulates_in_place)
    if software.reports_reserved:
        figures["allocator_share"] = max(base.allocator_share, _RESERVED_SHARE)
    figures["shards_over_context"] = int(software.shards_over_context)
    if software.matmul_dtype != TORCH_DTYPE[software.precision]:
        figures["matmul_dtype"] = software.matmul_dtype
        figures["cast_bytes"] = software.cast_bytes
    if software.attention_forward_efficiency != 1.0:
        figures["attention_forward_efficiency"] = software.attention_forward_efficiency
    if software.waits_for_gathers:
        figures["gather_overlap"] = 0.0
        figures["gather_s_per_byte"] = _WAITING_GATHER_S_PER_BYTE
    if software.overlapped_tensor:
        figures["tensor_overlap"] = software.overlapped_tensor
    if software.fuses_pointwise:
        joined = _COMPILED_TRAFFIC if software.is_compiled else _JOINED_TRAFFIC
        figures["pointwise_traffic"] = joined
    if software.overlaps_gradients:
        figures["publish_overlap"] = _PUBLISHED_BESIDE
    else:
        figures["overlap_fraction"] = 0.0
    found = base.with_figures(Origin.ASSUMPTION, **figures)
    if base.origin_of("launch_scale") is not Origin.ASSUMPTION:
        return found
    scale = _COMPILED_LAUNCH_SCALE if software.is_compiled else _EAGER_LAUNCH_SCALE
    return found.with_figures(Origin.ASSUMPTION, launch_scale=scale)


def _is_compiled(text: str) -> bool:
    return "torch.compile" in text and "no torch.compile" not in text


def _attention_efficiency(run: MeasuredRun, *, is_megatron: bool) -> float:
    """Transformer Engine calls cuDNN's kernels on Hopper; elsewhere PyTorch's serve all.

    But for MPT, whose biases of positions asked for a kernel of the first generation in Triton.
    """
    share = _FIRST_ATTENTION if "mpt" in (run.framework or run.arch or "").lower() else 1.0
    is_hopper = re.match(r"(mixed:)?(g?h\d00|h20)", run.gpu.lower()) is not None
    return share * (_OLD_ATTENTION_ON_HOPPER if is_hopper and not is_megatron else 1.0)


def _cast_bytes(text: str, *, is_megatron: bool) -> float:
    """Transformer Engine's first recipe has delayed scales; torchao's, and blocks, have not."""
    if "delayed" in text:
        return DELAYED_CAST
    if re.search(r"rowwise|nvfp4|fp4", text):
        return CAST_EACH_USE
    is_current = re.search(r"current|block|tensorwise", text) is not None
    return CURRENT_CAST if is_current or not is_megatron else DELAYED_CAST


def _overlapped_tensor(text: str) -> float:
    told = re.search(r"async[- ]?tp|tp[_ -]comm[_ -]overlap|userbuffer", text)
    return 0.0 if told is None else _OVERLAPPED_TENSOR


def _selective(is_core: bool, is_titan: bool) -> Selective:
    if is_core:
        return Selective.CORE_ATTENTION
    return Selective.EVERY_SECOND_PRODUCT if is_titan else Selective.POINTWISE


def _is_old(name: str) -> bool:
    """Megatron and DeepSpeed before fused attention: as papers of 2021 and 2022 ran them."""
    return bool(re.search(r"megatron[- ]deepspeed|deepspeed/megatron|ptd-p|deepspeed zero", name))


def _precision(run: MeasuredRun, said: list[str]) -> tuple[Precision, str]:
    word = (run.precision or "").lower().replace("-", "")
    if not word:
        word = "fp16" if re.match(r"v100|t4|p100|p40|rtx", run.gpu.lower()) else "bf16"
        said.append(f"precision not told: {word}")
    if word.startswith(("nvfp4", "fp4", "mxfp4")):
        return Precision.BF16, "nvfp4"
    if word.startswith(("fp8", "mxfp8", "float8")):
        return Precision.BF16, FP8
    known = {
        "fp32": (Precision.FP32, "float32"),
        "float32": (Precision.FP32, "float32"),
        "tf32": (Precision.FP32, "tf32"),
        "fp16": (Precision.FP16, "float16"),
        "float16": (Precision.FP16, "float16"),
        "half": (Precision.FP16, "float16"),
        "fp64": (Precision.FP64, "float64"),
    }
    if word not in known and word not in ("bf16", "bfloat16"):
        said.append(f"precision {word} is unknown: bf16")
    return known.get(word, (Precision.BF16, "bfloat16"))


def _gradient_bytes(is_megatron: bool, is_old: bool, is_titan: bool, precision: Precision) -> int:
    """Of an element of a gradient.

    Megatron accumulates and reduces bf16 gradients in fp32, fp16 ones in fp16 unless asked;
    torchtitan reduces in fp32, Composer's FSDP in the precision of parameters.
    """
    if precision in (Precision.FP32, Precision.FP64):
        return 4
    if precision is Precision.BF16 and (is_titan or (is_megatron and not is_old)):
        return 4
    return 2


def _overlaps(run: MeasuredRun, text: str, *, is_megatron: bool, is_fsdp: bool) -> bool:
    """FSDP, DDP and NeMo overlap; Megatron alone reduces after the last backward unless told."""
    if "no gradient bucketing" in text:
        return False
    if is_fsdp or not is_megatron:
        return True
    told = f"{text} {run.model_name or ''}".lower()
    return "overlap" in told or "nemo" in text or "megatron bridge" in text


def _fused_attention(run: MeasuredRun, is_old: bool, said: list[str]) -> bool:
    if run.flash_attention is not None:
        return run.flash_attention
    if "torchtitan" in (run.framework or "").lower():
        return True
    if _is_plain_core(run.model_name or ""):
        said.append("flash attention not told: no, the case is without Transformer Engine")
        return False
    said.append(f"flash attention not told: {'no' if is_old else 'yes'}, by the framework's time")
    return not is_old


def _is_plain_core(name: str) -> bool:
    """Megatron-Core's own layers, by a test case's name: ``te`` stands for Transformer Engine."""
    words = re.split(r"[/_]", name.lower())
    return "mcore" in words and ("te" not in words or "uninstall" in words)


def _fuses(text: str, is_titan: bool) -> bool:
    """torch.compile, Transformer Engine and Megatron's own kernels; eager code does not."""
    if "no torch.compile" in text:
        return False
    if "torch.compile" in text or "compile" in text or is_titan:
        return True
    return any(word in text for word in ("megatron", "nemo", "transformer engine"))


def _dropout(run: MeasuredRun, is_megatron: bool, said: list[str]) -> float:
    """Megatron's default is 0.1, which recipes of models with gates or grouped heads set to 0."""
    is_recent = run.gated_mlp or (run.kv_heads or run.heads) != run.heads
    if is_megatron and not is_recent and run.arch in ("gpt", "moe", "bert", "t5"):
        said.append("dropout not told: 0.1, Megatron's default")
        return 0.1
    return 0.0


def _sequence_parallel(run: MeasuredRun, is_titan: bool, said: list[str]) -> bool:
    if run.sequence_parallel is not None:
        return run.sequence_parallel
    if (run.tp or 1) > 1:
        said.append(f"sequence parallel not told: {'yes' if is_titan else 'no'}")
    return is_titan


def _zero_stage(run: MeasuredRun, is_fsdp: bool, text: str, said: list[str]) -> int:
    if run.zero_stage is not None:
        return run.zero_stage
    found = re.search(r"zero[- ]?([123])", text)
    stage = int(found.group(1)) if found else 3 if is_fsdp else 0
    said.append(f"ZeRO stage not told: {stage}")
    return stage


def _recompute(run: MeasuredRun, said: list[str]) -> Recompute:
    found, assumed = recompute_of(run)
    said += assumed
    return found
