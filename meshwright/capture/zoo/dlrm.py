"""DLRM: click prediction from dense numbers and embedding tables.

Sizes: Naumov et al. 2019 (arXiv 1906.00091), section 5 and its reference implementation, on the
Criteo Kaggle data; ``dlrm-mlperf`` is the MLPerf training benchmark on Criteo's terabyte data,
rows per table capped at 40 million. One look-up per table and sample.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.capture.zoo.family import Family, InputSampler, require

__all__ = ["DLRM", "FAMILY", "DLRMConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DLRMConfig:
    """Sizes of a DLRM."""

    table_rows: tuple[int, ...]
    embedding_size: int
    bottom: tuple[int, ...]
    """Widths of the layers over the dense numbers; the last must be ``embedding_size``."""
    top: tuple[int, ...]
    """Widths of the layers over the interactions; one more of width 1 follows."""
    num_dense: int = 13

    def __post_init__(self) -> None:
        require(len(self.table_rows) > 0 and min(self.table_rows) > 0, "table_rows must be given")
        require(
            len(self.bottom) > 0 and self.bottom[-1] == self.embedding_size,
            f"bottom must end with embedding_size={self.embedding_size}, not {self.bottom}",
        )


def _perceptron(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class DLRM(nn.Module):
    """Click predictor; ``forward`` returns the mean binary cross entropy."""

    lower_triangle: Tensor

    def __init__(self, config: DLRMConfig) -> None:
        super().__init__()
        size, num_vectors = config.embedding_size, len(config.table_rows) + 1
        self.tables = nn.ModuleList(nn.Embedding(rows, size) for rows in config.table_rows)
        self.bottom = _perceptron((config.num_dense, *config.bottom))
        pairs = [i * num_vectors + j for i in range(num_vectors) for j in range(i)]
        self.register_buffer("lower_triangle", torch.tensor(pairs), persistent=False)
        self.top = _perceptron((size + len(pairs), *config.top))
        self.head = nn.Linear(config.top[-1] if config.top else size + len(pairs), 1)

    def forward(self, dense: Tensor, sparse: Tensor, clicked: Tensor) -> Tensor:
        """Loss of predicting ``clicked`` (B,) from numbers (B, dense) and indices (B, tables)."""
        dense_BW = self.bottom(dense)
        vectors = [dense_BW]
        vectors += [table(sparse[:, index]) for index, table in enumerate(self.tables)]
        vectors_BNW = torch.stack(vectors, dim=1)
        products_BNN = torch.bmm(vectors_BNW, vectors_BNW.transpose(1, 2))
        pairs_BP = products_BNN.flatten(1).index_select(1, self.lower_triangle)
        logit_B = self.head(self.top(torch.cat((dense_BW, pairs_BP), dim=1))).squeeze(1)
        return F.binary_cross_entropy_with_logits(logit_B, clicked)


def _example_inputs(
    config: DLRMConfig, batch_size: int, seq_len: int, sampler: InputSampler
) -> dict[str, Tensor]:
    del seq_len
    sparse = [sampler.integers((batch_size,), end=rows) for rows in config.table_rows]
    return {
        "dense": sampler.normal((batch_size, config.num_dense)),
        "sparse": torch.stack(sparse, dim=1),
        "clicked": sampler.chosen((batch_size,), fraction=0.25).to(sampler.dtype),
    }


_KAGGLE_ROWS = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
_TERABYTE_ROWS = (
    *(39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10),
    *(2208, 11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36),
)

FAMILY = Family(
    name="dlrm",
    build=DLRM,
    example_inputs=_example_inputs,
    models={
        "tiny-dlrm": DLRMConfig(
            table_rows=(64, 32, 16, 8), embedding_size=16, bottom=(32, 16), top=(32,), num_dense=8
        ),
        "dlrm-criteo-kaggle": DLRMConfig(
            table_rows=_KAGGLE_ROWS, embedding_size=16, bottom=(512, 256, 64, 16), top=(512, 256)
        ),
        "dlrm-mlperf": DLRMConfig(
            table_rows=_TERABYTE_ROWS,
            embedding_size=128,
            bottom=(512, 256, 128),
            top=(1024, 1024, 512, 256),
        ),
    },
)
