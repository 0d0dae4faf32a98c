"""Every family of the zoo captures, and its operations are those torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meshwright.capture import capture
from meshwright.capture.references import resolve_model
from meshwright.capture.zoo import FAMILY_OF_MODEL
from meshwright.graph.opgraph import OutputRole

TINY = tuple(name for name in FAMILY_OF_MODEL if name.startswith("tiny-"))


@pytest.mark.parametrize("name", TINY)
def test_family_captures_with_the_operations_torch_counts(name: str) -> None:
    source = resolve_model(name)
    model = source.build()
    args, kwargs = source.example_inputs(4)
    with FlopCounterMode(display=False) as counter:
        result = model(*args, **kwargs)
        loss = result["loss"] if isinstance(result, dict) else result
        loss.backward()

    graph = capture(source.build(), args, kwargs, name=name).graph

    assert pytest.approx(counter.get_total_flops(), rel=0.01) == graph.num_flop
    assert 1 == len(graph.outputs_of(OutputRole.LOSS))
    assert sum(weight.numel() for weight in model.parameters()) == graph.num_parameters
    assert len(graph.parameters) == len(graph.outputs_of(OutputRole.GRADIENT))


def test_capture_of_a_large_model_takes_no_memory_for_its_weights() -> None:
    source = resolve_model("llama3-405b?num_layers=1")
    args, kwargs = source.example_inputs(1, seq_len=128)

    graph = capture(source.build("bfloat16"), args, kwargs, dtype=torch.bfloat16).graph

    # Embedding and head of 128256 x 16384 each, and one layer of 3.19e9.
    assert pytest.approx(7.4e9, rel=0.01) == graph.num_parameters
