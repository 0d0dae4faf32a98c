"""A two-stage program written by hand, with everything the runtime must carry.

Stage 0 is ``y = relu(x w1) w2 + b`` with ``w1`` and ``w2`` split over tp, stage 1 is
``loss = sum((y w3 + b - t)^2) / N``. ``w1`` uses ZeRO 3 (5 rows, so padded over 2 ranks), ``w2``
ZeRO 1, ``w3`` ZeRO 2; ``b`` is tied across the stages. The output of stage 1 is ``z = y w3 + b``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from meshwright.graph.opgraph import Ref, TensorSpec, contiguous_stride
from meshwright.plans.plan import OptimizerSpec
from meshwright.runtime.mesh import Layout
from meshwright.spmd.program import (
    Collective,
    CollectiveKind,
    Compute,
    DataSlot,
    Function,
    Instruction,
    LocalArg,
    ParameterSlot,
    ShardSpec,
    StageProgram,
    TiedExchange,
    Transfer,
    ZeroShard,
)

D, H, BATCH = 5, 6, 12
REPLICATED = ShardSpec(factors=((), ()))
BY_DP = ShardSpec(factors=(((BATCH, ("dp_shard",)),), ()))
OPTIMIZER = OptimizerSpec(learning_rate=0.05, weight_decay=0.1)


@dataclass
class Writer:
    """Collects values and instructions."""

    dtype: str
    values: list[TensorSpec] = field(default_factory=list)
    body: list[Instruction] = field(default_factory=list)

    def value(self, *shape: int) -> int:
        self.values.append(
            TensorSpec(shape=shape, dtype=self.dtype, stride=contiguous_stride(shape))
        )
        return len(self.values) - 1

    def op(self, target: str, args: tuple[LocalArg, ...], *shape: int) -> int:
        output = self.value(*shape)
        self.body.append(Compute(target=target, args=args, outputs=(output,)))
        return output

    def collective(
        self, kind: CollectiveKind, axis: str, operand: int, num_elements: int, *shape: int
    ) -> int:
        output = self.value(*shape)
        size = 8 if self.dtype == "float64" else 4
        self.body.append(
            Collective(
                kind=kind,
                axes=(axis,),
                reduction="" if kind is CollectiveKind.ALL_GATHER else "sum",
                input=operand,
                output=output,
                num_bytes=num_elements * size,
            )
        )
        return output

    def gather(self, chunk: int, ranks: int, shape: tuple[int, int], rows: int) -> int:
        """All-gather a ZeRO chunk of ``shape`` into ``rows`` rows."""
        n = shape[0] * shape[1]
        flat = self.op("meshwright.pack", ((Ref(chunk),), (n,)), n)
        wide = self.collective(CollectiveKind.ALL_GATHER, "dp_shard", flat, n * ranks, n * ranks)
        return self.op(
            "meshwright.unpack_gathered",
            (Ref(wide), ranks, ((shape, 0, rows),)),
            rows,
            shape[1],
        )

    def scatter(self, grad: int, ranks: int, shape: tuple[int, int], rows: int) -> int:
        """Reduce-scatter a gradient of ``rows`` rows into chunks of ``shape``."""
        n = shape[0] * shape[1]
        wide = self.op(
            "meshwright.pack_scatter", ((Ref(grad),), ranks, ((shape, 0, rows),)), n * ranks
        )
        flat = self.collective(CollectiveKind.REDUCE_SCATTER, "dp_shard", wide, n * ranks, n)
        return self.op("meshwright.unpack", (Ref(flat), (shape,)), *shape)

    def function(self, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Function:
        body, self.body = tuple(self.body), []
        return Function(name=name, inputs=inputs, outputs=outputs, body=body)


def _slot(
    name: str,
    shape: tuple[int, ...],
    shard: ShardSpec,
    zero_stage: int,
    zero: ZeroShard | None,
    numbers: tuple[int, int, int, int],
    dtype: str,
) -> ParameterSlot:
    local, stored, optimized, gradient = numbers
    return ParameterSlot(
        name=name,
        full=TensorSpec(shape=shape, dtype=dtype, stride=contiguous_stride(shape)),
        shard=shard,
        zero_stage=zero_stage,
        zero=zero,
        local=local,
        stored=stored,
        optimized=optimized,
        gradient=gradient,
        replicated_axes=(),
    )


def _data(name: str, value: int, batch_value: int, dtype: str) -> DataSlot:
    return DataSlot(
        name=name,
        role="data",
        full=TensorSpec(shape=(BATCH, D), dtype=dtype, stride=(D, 1)),
        shard=BY_DP,
        value=value,
        batch_value=batch_value,
        batch_dim=0,
    )


def _transfers(b: int, y0: int, y1: int, g0: int, g1: int) -> tuple[Transfer, Transfer]:
    def make(source: int, sv: int, tv: int, phase: str, tag: int) -> Transfer:
        return Transfer(
            source_stage=source,
            target_stage=1 - source,
            source_value=sv,
            target_value=tv,
            source_phase=phase,
            target_phase=phase,
            num_bytes=b * D * 8,
            tag=tag,
        )

    return make(0, y0, y1, "forward", 0), make(1, g1, g0, "backward", 1)


def stage_0(dp: int, tp: int, num_microbatches: int, dtype: str) -> tuple[StageProgram, int, int]:
    """The first stage, and its values ``y`` and ``grad y``."""
    w = Writer(dtype)
    b, h = BATCH // dp // num_microbatches, H // tp
    c1, c2 = -(-D // dp), -(-h // dp)
    x_batch, x = w.value(BATCH // dp, D), w.value(b, D)
    w1c, w2, w2c, bias = w.value(c1, h), w.value(h, D), w.value(c2, D), w.value(D)
    w1 = w.gather(w1c, dp, (c1, h), D)
    r = w.op("aten.relu.default", (Ref(w.op("aten.mm.default", (Ref(x), Ref(w1)), b, h)),), b, h)
    partial = w.op("aten.mm.default", (Ref(r), Ref(w2)), b, D)
    whole = w.collective(CollectiveKind.ALL_REDUCE, "tp", partial, b * D, b, D)
    y = w.op("aten.add.Tensor", (Ref(whole), Ref(bias)), b, D)
    forward = w.function("forward", (x, w1c, w2, bias), (r, y))

    inputs = (w.value(b, D), r, x, w2)
    sums = _backward_0(w, b, h, *inputs)
    back = w.function("backward", inputs, sums)
    running = (w.value(D, h), w.value(h, D), w.value(D)) if num_microbatches > 1 else ()
    totals = _backward_0(w, b, h, *inputs)
    if running:
        shapes = ((D, h), (h, D), (D,))
        totals = tuple(
            w.op("aten.add.Tensor", (Ref(a), Ref(g)), *s)
            for a, g, s in zip(running, totals, shapes, strict=True)
        )
    gw1 = w.scatter(totals[0], dp, (c1, h), D)
    gw2 = w.scatter(totals[1], dp, (c2, D), h)
    final = w.function("backward_final", (*inputs, *running), (gw1, gw2, totals[2]))
    tied_total = w.value(D)
    gb = w.collective(CollectiveKind.ALL_REDUCE, "dp_shard", tied_total, D, D)
    finalize = w.function("finalize_tied", (tied_total,), (gb,))
    new_w2 = w.gather(w2c, dp, (c2, D), h)
    publish = w.function("publish", (w2c,), (new_w2,))
    column = ShardSpec(factors=((), ((H, ("tp",)),)))
    row = ShardSpec(factors=(((H, ("tp",)),), ()))
    program = dict(
        stage=0,
        parameters=(
            _slot("w1", (D, H), column, 3, ZeroShard(dim=0, chunk=c1), (w1, w1c, w1c, gw1), dtype),
            _slot("w2", (H, D), row, 1, ZeroShard(dim=0, chunk=c2), (w2, w2, w2c, gw2), dtype),
            _slot("b", (D,), ShardSpec(factors=((),)), 0, None, (bias, bias, bias, gb), dtype),
        ),
        inputs=(_data("x", x, x_batch, dtype),),
        forward=forward,
        backward=back,
        backward_final=final,
        finalize_tied=finalize,
        publish=publish,
        published=(("w2", new_w2),),
        accumulators=sums,
        running_sums=running,
        saved=(r,),
        tied=(TiedExchange(name="b", accumulator=totals[2], total=tied_total, stages=(0, 1)),),
        loss=None,
        outputs=(),
    )
    return _Partial(program, w), y, inputs[0]


def _backward_0(
    w: Writer, b: int, h: int, gy: int, r: int, x: int, w2: int
) -> tuple[int, int, int]:
    """Gradients of ``w1``, ``w2`` and ``b``."""
    gb = w.op("aten.sum.dim_IntList", (Ref(gy), (0,)), D)
    w2t = w.op("aten.t.default", (Ref(w2),), D, h)
    gr = w.op("aten.mm.default", (Ref(gy), Ref(w2t)), b, h)
    gh = w.op("aten.threshold_backward.default", (Ref(gr), Ref(r), 0), b, h)
    rt = w.op("aten.t.default", (Ref(r),), h, b)
    xt = w.op("aten.t.default", (Ref(x),), D, b)
    gw2 = w.op("aten.mm.default", (Ref(rt), Ref(gy)), h, D)
    gw1 = w.op("aten.mm.default", (Ref(xt), Ref(gh)), D, h)
    return gw1, gw2, gb


@dataclass
class _Partial:
    """A stage but for its transfers; ``fields`` leaves out what is alike in both."""

    fields: dict
    writer: Writer

    def build(self, incoming: tuple[Transfer, ...], outgoing: tuple[Transfer, ...]) -> StageProgram:
        return StageProgram(
            **self.fields,
            prologue=Function(name="prologue", inputs=(), outputs=(), body=()),
            prologue_values=(),
            buffer_updates=(),
            values=tuple(self.writer.values),
            incoming=incoming,
            outgoing=outgoing,
        )


def stage_1(dp: int, num_microbatches: int, dtype: str) -> tuple[StageProgram, int, int]:
    """The second stage, and its values ``y`` and ``grad y``."""
    w = Writer(dtype)
    b = BATCH // dp // num_microbatches
    c3 = -(-D // dp)
    t_batch, t = w.value(BATCH // dp, D), w.value(b, D)
    w3, w3c, bias, y = w.value(D, D), w.value(c3, D), w.value(D), w.value(b, D)
    z = w.op("aten.mm.default", (Ref(y), Ref(w3)), b, D)
    z = w.op("aten.add.Tensor", (Ref(z), Ref(bias)), b, D)
    d = w.op("aten.sub.Tensor", (Ref(z), Ref(t)), b, D)
    square = w.op("aten.mul.Tensor", (Ref(d), Ref(d)), b, D)
    part = w.op("aten.sum.default", (Ref(square),))
    part = w.op("aten.div.Tensor", (Ref(part), float(BATCH * D)))
    loss = w.collective(CollectiveKind.ALL_REDUCE, "dp_shard", part, 1)
    forward = w.function("forward", (y, w3, bias, t), (d, z, loss))

    sums = _backward_1(w, b, d, y, w3)
    back = w.function("backward", (d, y, w3), sums)
    running = (w.value(D, D), w.value(D)) if num_microbatches > 1 else ()
    gw3, gb, gy = _backward_1(w, b, d, y, w3)
    if running:
        gw3 = w.op("aten.add.Tensor", (Ref(running[0]), Ref(gw3)), D, D)
        gb = w.op("aten.add.Tensor", (Ref(running[1]), Ref(gb)), D)
    gw3 = w.scatter(gw3, dp, (c3, D), D)
    final = w.function("backward_final", (d, y, w3, *running), (gw3, gb, gy))
    # The gradient sent must be one value whichever backward made it.
    final = _rename_output(final, gy, sums[2])
    tied_total = w.value(D)
    gb_all = w.collective(CollectiveKind.ALL_REDUCE, "dp_shard", tied_total, D, D)
    finalize = w.function("finalize_tied", (tied_total,), (gb_all,))
    new_w3 = w.gather(w3c, dp, (c3, D), D)
    publish = w.function("publish", (w3c,), (new_w3,))
    program = dict(
        stage=1,
        parameters=(
            _slot(
                "w3", (D, D), REPLICATED, 2, ZeroShard(dim=0, chunk=c3), (w3, w3, w3c, gw3), dtype
            ),
            _slot("b", (D,), ShardSpec(factors=((),)), 0, None, (bias, bias, bias, gb_all), dtype),
        ),
        inputs=(_data("t", t, t_batch, dtype),),
        forward=forward,
        backward=back,
        backward_final=final,
        finalize_tied=finalize,
        publish=publish,
        published=(("w3", new_w3),),
        accumulators=sums[:2],
        running_sums=running,
        saved=(d,),
        tied=(TiedExchange(name="b", accumulator=gb, total=tied_total, stages=(0, 1)),),
        loss=loss,
        outputs=(("z", z, BY_DP, 0),),
    )
    return _Partial(program, w), y, sums[2]


def _backward_1(w: Writer, b: int, d: int, y: int, w3: int) -> tuple[int, int, int]:
    """Gradients of ``w3``, ``b`` and ``y``."""
    gz = w.op("aten.mul.Tensor", (Ref(d), 2 / (BATCH * D)), b, D)
    yt = w.op("aten.t.default", (Ref(y),), D, b)
    w3t = w.op("aten.t.default", (Ref(w3),), D, D)
    gw3 = w.op("aten.mm.default", (Ref(yt), Ref(gz)), D, D)
    gb = w.op("aten.sum.dim_IntList", (Ref(gz), (0,)), D)
    gy = w.op("aten.mm.default", (Ref(gz), Ref(w3t)), b, D)
    return gw3, gb, gy


def _rename_output(function: Function, old: int, new: int) -> Function:
    """The function with the value ``old`` called ``new``."""
    body = tuple(
        Compute(target=item.target, args=item.args, outputs=(new,))
        if isinstance(item, Compute) and item.outputs == (old,)
        else item
        for item in function.body
    )
    outputs = tuple(new if value == old else value for value in function.outputs)
    return Function(name=function.name, inputs=function.inputs, outputs=outputs, body=body)


def two_stages(
    dp: int, tp: int, num_microbatches: int, dtype: str = "float64"
) -> tuple[StageProgram, StageProgram]:
    """Both stages, joined by their transfers."""
    first, y0, g0 = stage_0(dp, tp, num_microbatches, dtype)
    second, y1, g1 = stage_1(dp, num_microbatches, dtype)
    up, down = _transfers(BATCH // dp // num_microbatches, y0, y1, g0, g1)
    return (
        first.build(incoming=(down,), outgoing=(up,)),
        second.build(incoming=(up,), outgoing=(down,)),
    )


def layout(dp: int, tp: int) -> Layout:
    """Two stages of dp x tp ranks."""
    return Layout(stage_shape=(1, dp, 1, 1, tp), first_devices=(0, dp * tp))


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Seeded full parameters."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"w1": (D, H), "w2": (H, D), "w3": (D, D), "b": (D,)}
    return {
        name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def data(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A seeded global batch."""
    rng = torch.Generator().manual_seed(1)
    return {
        name: torch.randn((BATCH, D), generator=rng, dtype=torch.float64).to(dtype)
        for name in ("x", "t")
    }


def reference(
    num_steps: int, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, gradients of the first step and parameters after ``num_steps`` of plain PyTorch."""
    full = {name: tensor.clone().requires_grad_() for name, tensor in parameters(dtype).items()}
    optimizer = torch.optim.AdamW(full.values(), lr=0.05, weight_decay=0.1)
    batch = data(dtype)
    losses, gradients = [], {}
    for step in range(num_steps):
        y = torch.relu(batch["x"] @ full["w1"]) @ full["w2"] + full["b"]
        z = y @ full["w3"] + full["b"]
        loss = ((z - batch["t"]) ** 2).sum() / (BATCH * D)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {name: tensor.grad.clone() for name, tensor in full.items()}
        optimizer.step()
        losses.append(loss.detach())
    return losses, gradients, {name: tensor.detach() for name, tensor in full.items()}
