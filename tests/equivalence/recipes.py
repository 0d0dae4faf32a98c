"""The plans that every model is tried with, and the ones a model cannot carry."""

from __future__ import annotations

from meshwright.plans.plan import Recompute, ScheduleName
from tests.equivalence.subject import BATCH, EXPERTS, SEQUENCE, TENSOR, Recipe

MODELS = (
    "tiny-gpt",
    "tiny-llama",
    "tiny-moe",
    "tiny-gpt-moe",
    "tiny-t5",
    "tiny-clip",
    "tiny-resnet",
    "tiny-vit",
    "tiny-bert",
    "tiny-unet",
)

_DP = {"dp_shard": BATCH, "dp_replicate": BATCH}

RECIPES: dict[str, Recipe] = {
    # 2 ranks
    "dp2": Recipe({"dp_replicate": 2}, _DP),
    "dp2 micro4": Recipe({"dp_replicate": 2}, _DP, micro=4),
    "zero1": Recipe({"dp_shard": 2}, _DP, zero=1),
    "zero2 micro2": Recipe({"dp_shard": 2}, _DP, zero=2, micro=2),
    "zero3": Recipe({"dp_shard": 2}, _DP, zero=3),
    "zero3 micro2 full": Recipe({"dp_shard": 2}, _DP, zero=3, micro=2, recompute=Recompute.FULL),
    "tp2": Recipe({"tp": 2}, {"tp": TENSOR}),
    "tp2 selective": Recipe({"tp": 2}, {"tp": TENSOR}, recompute=Recompute.SELECTIVE),
    "sp2 full": Recipe({"tp": 2}, {"tp": SEQUENCE}, recompute=Recompute.FULL),
    "cp2": Recipe({"cp": 2}, {"cp": ("sequence",)}),
    "cp2 ulysses full": Recipe({"cp": 2}, {"cp": ("sequence", "heads")}, recompute=Recompute.FULL),
    "ep2": Recipe({"ep": 2}, {"ep": EXPERTS}),
    "ep2 micro2": Recipe({"ep": 2}, {"ep": EXPERTS}, micro=2),
    "pp2": Recipe({"pp": 2}),
    "pp2 micro4": Recipe({"pp": 2}, micro=4),
    "pp2 micro4 gpipe": Recipe({"pp": 2}, micro=4, schedule=ScheduleName.GPIPE),
    # 4 ranks
    "hsdp zero3": Recipe({"dp_replicate": 2, "dp_shard": 2}, _DP, zero=3),
    "hsdp zero1": Recipe({"dp_replicate": 2, "dp_shard": 2}, _DP, zero=1),
    "dp4 zero2": Recipe({"dp_shard": 4}, _DP, zero=2),
    "tp4": Recipe({"tp": 4}, {"tp": TENSOR}),
    "dp2 tp2 zero3 selective": Recipe(
        {"dp_shard": 2, "tp": 2}, {**_DP, "tp": TENSOR}, zero=3, recompute=Recompute.SELECTIVE
    ),
    "dp2 sp2 zero1 micro2": Recipe(
        {"dp_shard": 2, "tp": 2}, {**_DP, "tp": SEQUENCE}, zero=1, micro=2
    ),
    "pp2 tp2": Recipe({"pp": 2, "tp": 2}, {"tp": TENSOR}),
    "pp2 dp2 zero2 micro2": Recipe({"pp": 2, "dp_shard": 2}, _DP, zero=2, micro=2),
    "pp4 micro4 full": Recipe({"pp": 4}, micro=4, recompute=Recompute.FULL),
    "dp2 ep2 zero3 micro2": Recipe(
        {"dp_shard": 2, "ep": 2}, {**_DP, "ep": EXPERTS}, zero=3, micro=2
    ),
    # 8 ranks
    "pp2 dp2 sp2 zero2 micro2 full": Recipe(
        {"pp": 2, "dp_shard": 2, "tp": 2},
        {**_DP, "tp": SEQUENCE},
        zero=2,
        micro=2,
        recompute=Recompute.FULL,
    ),
    "pp2 dp2 tp2 zero1": Recipe({"pp": 2, "dp_shard": 2, "tp": 2}, {**_DP, "tp": TENSOR}, zero=1),
    "dp8 zero3": Recipe({"dp_shard": 8}, _DP, zero=3),
    "dp2 ep2 tp2 zero2": Recipe(
        {"dp_shard": 2, "ep": 2, "tp": 2}, {**_DP, "ep": EXPERTS, "tp": SEQUENCE}, zero=2
    ),
    "pp4 dp2 micro4 gpipe selective": Recipe(
        {"pp": 4, "dp_replicate": 2},
        _DP,
        micro=4,
        schedule=ScheduleName.GPIPE,
        recompute=Recompute.SELECTIVE,
    ),
}

MICRO_BATCHED = frozenset(name for name, recipe in RECIPES.items() if recipe.micro > 1)

_NO_SEQUENCE = frozenset({"cp2", "cp2 ulysses full"})
"""Images have no sequence."""

REFUSED: dict[str, frozenset[str]] = {
    # Every image is compared with every text of the batch.
    "tiny-clip": MICRO_BATCHED,
    # Batch norm takes its statistics over the whole batch.
    "tiny-resnet": MICRO_BATCHED | _NO_SEQUENCE,
    "tiny-vit": _NO_SEQUENCE,
    "tiny-unet": _NO_SEQUENCE,
}
"""Plans a model cannot carry; they are refused with the operator and the reason."""
