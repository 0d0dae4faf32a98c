"""Classes, labels and segments of small models, found without any name."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from meshwright.capture import capture
from meshwright.capture.references import resolve_model
from meshwright.spmd.prepared import PreparedGraph, prepare


@lru_cache(maxsize=4)
def _prepared(reference: str, batch: int = 8) -> PreparedGraph:
    source = resolve_model(reference)
    args, kwargs = source.example_inputs(batch)
    return prepare(capture(source.build(), args, kwargs, name=reference).graph)


def _labels(prepared: PreparedGraph) -> list[dict[str, int]]:
    """For each segment class the size of each label."""
    return [
        {
            label: prepared.analysis.class_size[leaf]
            for label, leaf in prepared.labels.by_segment[segment.index].items()
        }
        for segment in prepared.segmentation.representatives()
    ]


def test_labels_of_a_small_gpt() -> None:
    """Two embeddings, attention, feed-forward and head; 4 layers are 8 halves."""
    prepared = _prepared("tiny-gpt")
    tokens, positions, attention, feed_forward, head = _labels(prepared)

    assert (1, 1, 4, 4, 1) == prepared.segmentation.multiplicity()
    assert {"vocab": 256, "batch": 8, "sequence": 32, "hidden": 64} == tokens
    assert 32 == positions["vocab"]
    assert 4 == attention["heads"]
    assert {"batch": 8, "sequence": 32, "hidden": 64, "inner": 256} == feed_forward
    assert 256 == head["vocab"]


def test_batch_and_sequence_are_those_of_the_data() -> None:
    prepared = _prepared("tiny-gpt")
    (first, *_) = [
        dims
        for item in prepared.graph.inputs
        if item.role == "data"
        for dims in [prepared.analysis.value_dims[item.value]]
    ]

    assert ((prepared.labels.batch,), (prepared.labels.sequence,)) == first


def test_grouped_queries_share_the_class_of_their_key_heads() -> None:
    """4 query heads on 2 key heads: what can be cut together is 2."""
    sizes = [labels["heads"] for labels in _labels(_prepared("tiny-llama")) if "heads" in labels]

    assert [2] == sizes


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-clip", "tiny-t5", "tiny-moe"])
def test_models_that_are_no_chain_are_cut(name: str) -> None:
    prepared = _prepared(name)
    segments = prepared.segmentation.segments

    assert len(segments) > 5
    assert all(segment.forward_ops for segment in segments)
    assert sum("batch" in labels for labels in _labels(prepared)) >= 4


def test_experts_have_a_class() -> None:
    assert 4 in {labels.get("experts") for labels in _labels(_prepared("tiny-moe"))}


def test_96_layers_fold() -> None:
    prepared = _prepared("gpt3-175b?hidden=192&vocab_size=512&seq_len=16&num_heads=4", 4)

    assert len(prepared.segmentation.segments) > 96
    assert prepared.segmentation.num_classes <= 12


class _Plain(nn.Module):
    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = torch.relu(self.get_submodule(name)(x))
        return x.square().mean()


def test_names_change_nothing() -> None:
    x = torch.zeros(4, 16)
    one, other = (
        prepare(capture(_Plain(tuple(prefix + str(i) for i in range(12))), (x,), {}).graph)
        for prefix in ("layer", "stufe")
    )

    assert one.sha256 == other.sha256
    assert _labels(one) == _labels(other)
    assert one.segmentation.segment_of_op == other.segmentation.segment_of_op
    assert [s.segment_class for s in one.segmentation.segments] == [
        s.segment_class for s in other.segmentation.segments
    ]
