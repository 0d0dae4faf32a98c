"""Built-in models: each the training step of one device, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from meshwright.capture.zoo import (
    bert,
    clip,
    dlrm,
    gpt,
    gpt_moe,
    llama,
    mlp,
    moe,
    resnet,
    t5,
    unet,
    vit,
)
from meshwright.capture.zoo.family import Family, InputSampler

__all__ = ["FAMILIES", "FAMILY_OF_MODEL", "Family", "InputSampler"]

FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY
    for module in (gpt, llama, moe, gpt_moe, bert, t5, vit, clip, resnet, unet, dlrm, mlp)
)

FAMILY_OF_MODEL: Mapping[str, Family] = MappingProxyType(
    {name: family for family in FAMILIES for name in family.models}
)
"""Name of every built-in model to its family; no name is used twice (a test checks it)."""
