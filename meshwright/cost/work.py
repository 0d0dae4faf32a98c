"""What operators do, in the numbers a price can be learned from: one row for each operator.

The same rows describe one operator, a segment, a stage or a step. Sizes are those of one rank
after sharding. ``dims`` are four sizes whose meaning depends on the family:

=====================================  ===============  ============  ==========  ==============
family                                 b                m             n           k
=====================================  ===============  ============  ==========  ==============
MATMUL                                 1                result rows   columns     contracted
BATCHED_MATMUL                         matrices         result rows   columns     contracted
GROUPED_MATMUL                         experts          rows of one   columns     contracted
ATTENTION, ATTENTION_BACKWARD          samples x heads  queries       keys        head size
CONVOLUTION, CONVOLUTION_BACKWARD      groups           batch x area  channels    inputs of one
EMBEDDING, EMBEDDING_BACKWARD          1                rows read     row length  rows there are
OPTIMIZER                              1                elements      1           tensors
COLLECTIVE                             ranks            bytes         1           1
all others                             1                rows          row length  tensors
=====================================  ===============  ============  ==========  ==============

A row is the last dim of the largest tensor; *tensors* counts what is read and written and has at
least half its elements (masks of bools do not count). Each expert has an even share of the rows.
Where keys go around a ring of ranks, *keys* are all that come by.

``flop`` is 2 for a multiply-add. Causal attention counts the pairs that are attended to, not the
whole square, and its backward twice the forward. Families that torch counts nothing for have a few
operations for each element (``op_work``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ["DTYPES", "EdgeKind", "Family", "OperatorWork"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

DTYPES = (
    "float64",
    "float32",
    "tf32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "int8",
    "nvfp4",
)
"""What arithmetic is done in; ``OperatorWork.dtype`` counts from here. Integers and bools count as
``float32``: they run on the vector units."""


class Family(IntEnum):
    """Kinds of operator with a way of their own to use a device. Values are stored: only append."""

    MATMUL = 0
    BATCHED_MATMUL = 1
    GROUPED_MATMUL = 2
    ATTENTION = 3
    ATTENTION_BACKWARD = 4
    CONVOLUTION = 5
    CONVOLUTION_BACKWARD = 6
    NORM = 7
    NORM_BACKWARD = 8
    SOFTMAX = 9
    SOFTMAX_BACKWARD = 10
    ELEMENTWISE = 11
    REDUCTION = 12
    EMBEDDING = 13
    EMBEDDING_BACKWARD = 14
    COPY = 15
    INDEX = 16
    """Gathers, scatters, sorts: what moves by computed positions."""
    RANDOM = 17
    """Dropout and its kin."""
    POOL = 18
    OPTIMIZER = 19
    OTHER = 20
    COLLECTIVE = 21
    """Has a place in a graph so that operators beside it know of it; priced elsewhere."""


class EdgeKind(IntEnum):
    """How two operators of a graph meet. Values are stored: only append."""

    DATA = 0
    """The second reads what the first wrote."""
    FUSION = 1
    """The same, and both work element by element or row by row: a compiler can join them."""
    ORDER = 2
    """The second follows the first on the same stream."""
    OVERLAP = 3
    """They run at the same time, one computing, one communicating."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorWork:
    """N operators."""

    family: IntArray
    """(N,) of ``Family``."""
    dtype: IntArray
    """(N,) place in ``DTYPES`` of what the arithmetic is done in."""
    dims: FloatArray
    """(N, 4): b, m, n, k as the module docstring has them; at least 1 each."""
    flop: FloatArray
    """(N,)"""
    num_bytes: FloatArray
    """(N,) least traffic: every operand read once, every result written once."""
    edges: IntArray
    """(2, E) rows of the first and the second; a pair may stand once for each kind."""
    edge_kind: IntArray
    """(E,) of ``EdgeKind``."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.family)


def components(edges_2E: IntArray, num_rows: int) -> IntArray:
    """(N,) number of the connected graph each row belongs to, ascending by first row."""
    root_N = np.arange(num_rows)
    if edges_2E.shape[1]:
        first_E, second_E = edges_2E
        while True:
            least_E = np.minimum(root_N[first_E], root_N[second_E])
            before_N = root_N.copy()
            np.minimum.at(root_N, root_N[first_E], least_E)
            np.minimum.at(root_N, root_N[second_E], least_E)
            root_N = root_N[root_N]
            if np.array_equal(before_N, root_N):
                break
    return np.unique(root_N, return_inverse=True)[1].astype(np.int64)
