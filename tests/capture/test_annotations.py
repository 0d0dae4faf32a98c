"""What users write at modules is found again by path."""

from __future__ import annotations

import torch
from torch import nn

from meshwright.capture.annotations import annotations_of, set_annotation
from meshwright.space.pins import parse_pins


def test_annotations_are_listed_by_path() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"in": nn.Linear(2, 2), "layers": nn.ModuleList([nn.ReLU()] * 2)})
    set_annotation(model["in"], {"tp": "inner"})
    set_annotation(model["layers"][0], {"zero": "3"})  # type: ignore[index]
    set_annotation(model["layers"][0], {"recompute": "full"})  # type: ignore[index]

    # The activation is used under two paths.
    assert (
        "in:tp=inner",
        "layers.0:zero=3",
        "layers.0:recompute=full",
    ) == annotations_of(model)


def test_the_whole_model_and_odd_names_become_patterns() -> None:
    model = nn.ModuleDict({"a*": nn.ReLU(), "ab": nn.Tanh()})
    set_annotation(model, {"offload": "yes"})
    set_annotation(model["a*"], {"zero": "1"})
    every, odd = parse_pins(annotations_of(model)).modules

    assert every.matches("a*")
    assert every.matches("")
    assert odd.matches("a*")
    assert not odd.matches("ab")
