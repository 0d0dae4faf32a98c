"""What a fit is made of: data, settings, and the parts that are trained one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Cluster
from meshwright.records import Record
from meshwright.strict_json import JsonValue
from meshwright.tracking import DataSource, Tracker

__all__ = [
    "FitData",
    "FitSettings",
    "Part",
    "PartContext",
    "PartResult",
    "SplitError",
    "WorstCases",
]


class FitSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides the result beside the data; of equal settings the weights are bit-equal."""

    seed: int = 0
    num_members: int = 3
    """Networks in the ensemble."""
    max_epochs: int | None = None
    """Of each network; the part's own where it is None."""
    rows_per_cell: int = 1500
    """Most measurements of one source, device, operator, direction and dtype to learn from."""
    num_threads: int = 1
    """Of the processor; sums of another number of threads may round otherwise."""
    left_out: tuple[str, ...] = ()
    """Devices to judge by, each with networks that did not see it; ``("all",)``: every one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitData:
    """Everything that is learned from."""

    operators: tuple[Path, ...] = ()
    """Tables of measured operators, by the columns of docs/tables.md."""
    collectives: tuple[Path, ...] = ()
    """Tables of measured collectives."""
    runs: tuple[Path, ...] = ()
    """Tables of measured training runs."""
    records: tuple[Record, ...] = ()
    cluster: Cluster | None = None
    """Where the Records were measured; operators of the catalog's devices need it not."""
    sources: tuple[DataSource, ...] = ()
    """Every file and store, in the order given."""
    licenses: Mapping[str, str] = field(default_factory=dict)
    """By ``source`` of the rows, where the tables tell."""


class SplitError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The error on data a split held out."""

    split: str
    """How data were held out: ``"gpu=a40"``, ``"largest shapes"``..."""
    group: str
    """Of what: an operator, a collective, ``"all"``."""
    num_samples: int
    mape: float
    """Mean of |predicted / measured - 1|."""
    bias: float
    """Mean of predicted / measured - 1."""
    coverage: float | None = None
    """Share of what was measured that lies in its 90 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstCases:
    """The rows with the largest errors, worst first."""

    columns: tuple[str, ...] = ()
    rows: tuple[tuple[JsonValue, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PartResult:
    """What training of one part gave."""

    tensors: Mapping[str, NDArray[Any]]
    """What a prediction needs."""
    settings: Mapping[str, JsonValue]
    """What else it needs: versions, names of features, bounds; on top of the card."""
    documents: Mapping[str, JsonValue] = field(default_factory=dict)
    """JSON files to write beside the weights, by name."""
    splits: tuple[SplitError, ...] = ()
    worst: WorstCases = WorstCases()
    figures: Mapping[str, JsonValue] = field(default_factory=dict)
    """Numbers of samples, epochs..."""
    is_cut: bool = False
    """The budget ended it before its training did; ``--resume`` goes on from its checkpoint."""

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(int(np.asarray(tensor).size) for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PartContext:
    """What a part is given to train with."""

    settings: FitSettings
    folder: Path
    """For its checkpoints: of its own, kept until the part is done."""
    tracker: Tracker
    reproduce: str
    """The command line, for cards."""
    left_s: Callable[[], float]
    """Seconds until it must come to its end; infinite without a budget."""
    progress: Callable[[float, str], None]
    """To be told the fraction that is done, and a few words."""
    done: Mapping[str, PartResult]
    """By name, the parts before it."""


class Part(Protocol):
    """One model with its training."""

    @property
    def name(self) -> str:
        """A word."""
        ...

    @property
    def budget_weight(self) -> float:
        """Its share of a budget, relative to that of the other parts."""
        ...

    @property
    def uses_others(self) -> bool:
        """It is trained on what the parts before it predict, so it is trained after them again."""
        ...

    def reason_to_skip(self, data: FitData) -> str:
        """Why there is nothing to learn from; empty where there is."""
        ...

    def fit(self, data: FitData, context: PartContext) -> PartResult:
        """Train, going on from a checkpoint in the context's folder where there is one."""
        ...
