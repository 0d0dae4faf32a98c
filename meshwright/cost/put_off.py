"""Which part of the backward only makes gradients of parameters, so that it can be put off.

ZB-H1 (arXiv 2401.10241) runs the backward of a stage in two: B makes what the stages before wait
for, W the gradients of parameters. A backward operator belongs to B where another segment's
backward depends on it, and to W otherwise. An operator that makes both at once (a convolution's or
a norm's backward) is B. W runs later, so what it reads of B, of the forward and of what was
computed again stays until then.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.columns import BACKWARD, FORWARD, Columns, IntArray

__all__ = ["PutOff", "put_off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PutOff:
    """What W runs and what waits for it."""

    is_weight: NDArray[np.bool_]
    """(nodes,) W runs it."""
    waiting: tuple[IntArray, IntArray]
    """Distinct (storage, segment) pairs: the W of a segment reads a storage made in the forward or
    in B."""


def put_off(columns: Columns) -> PutOff:
    """What W runs and what waits for it, on one sharded graph."""
    nodes, values = columns.nodes, columns.values
    maker, reader = values.producer[values.edge_value], values.edge_reader
    late = (nodes.phase == BACKWARD) & (nodes.segment >= 0)
    both = (maker >= 0) & late[np.maximum(maker, 0)] & late[reader]
    makers, readers = maker[both], reader[both]
    leaves = nodes.segment[makers] != nodes.segment[readers]
    is_needed = np.zeros(len(nodes.phase), np.bool_)
    is_needed[makers[leaves]] = True
    # A reader comes after its makers, so one pass from the end finds all that a needed one needs.
    needed = is_needed.tolist()
    makers, readers = makers[~leaves], readers[~leaves]
    backwards = np.argsort(-readers, kind="stable")
    for made, read in zip(makers[backwards].tolist(), readers[backwards].tolist(), strict=True):
        if needed[read]:
            needed[made] = True
    is_weight = late & ~np.array(needed, dtype=np.bool_)
    made_before = (maker >= 0) & (nodes.phase[np.maximum(maker, 0)] >= FORWARD)
    made_before &= ~is_weight[np.maximum(maker, 0)] & ~nodes.is_from_parameter[maker]
    reads = made_before & is_weight[reader] & ~nodes.is_view[reader]
    span = columns.num_segments
    codes = np.unique(values.edge_value[reads] * span + nodes.segment[reader[reads]])
    return PutOff(is_weight=is_weight, waiting=(codes // span, codes % span))
