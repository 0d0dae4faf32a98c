"""Specifications to instances with stored rooms: in parallel, and each only once.

A made instance lies as a file in the cache, by its specification, the cost model and the version;
one that is worth nothing (nothing fits, or there is nothing to choose) leaves a note there instead.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from meshwright import __version__
from meshwright.cluster.model import Cluster
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.env.build import instance_of
from meshwright.env.files import read_instance, write_instance
from meshwright.env.generator import InstanceSpec, context_of
from meshwright.env.instance import Instance
from meshwright.env.models import Programs
from meshwright.errors import BadRequest, NoFeasiblePlan, PlannerError
from meshwright.space.search import SearchContext

__all__ = ["Maker", "Reference"]

Reference = Callable[[SearchContext], float]
"""Step time of the best rule of thumb; a function of a module, so that processes can share it."""

_LEAST_PLANS = 16
"""With fewer plans that fit there is nothing to learn."""
_LEAST_SPREAD = 1.05
"""Of their slowest over their fastest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Maker:
    """Makes instances of specifications."""

    cache: Path
    """A folder for captured graphs and instances; may be shared by processes."""
    reference: Reference
    pricing: Pricing = field(default=ANALYTIC)
    cluster: Cluster | None = None
    """Stands for the cluster of every specification."""

    def make(self, spec: InstanceSpec) -> Instance | None:
        """The instance, with all its rooms; ``None`` where it is worth nothing."""
        if self.is_made(spec):
            return self.ready(spec)
        path = self.path(spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            context = context_of(
                spec, _programs(self.cache), pricing=self.pricing, cluster=self.cluster
            )
            instance = instance_of(
                context,
                reference=self.reference,
                name=spec.name,
                store=True,
                max_rows=spec.max_rows,
                max_plans=spec.max_plans,
            )
            reason = why_trivial(instance)
        except PlannerError as error:
            reason = str(error) if isinstance(error, NoFeasiblePlan) else f"cannot be made: {error}"
        if reason:
            path.with_suffix(".txt").write_text(f"{spec.name}\n{reason}\n", encoding="utf-8")
            return None
        write_instance(instance, path)
        return instance

    def many(
        self,
        specs: Sequence[InstanceSpec],
        *,
        num_processes: int = 1,
        progress: Callable[[str], None] | None = None,
    ) -> Iterator[tuple[InstanceSpec, Instance]]:
        """The instances of ``specs`` that are worth something, in their order.

        All of them are made before the first is returned; those of one model one after the other,
        by one process.

        Args:
            specs: what to make.
            num_processes: how many work at it.
            progress: told in one line how far it is.
        """
        missing = [spec for spec in specs if not self.is_made(spec)]
        batches = _by_model(missing)
        done = 0
        for count in self._made(batches, num_processes):
            done += count
            if progress is not None:
                progress(f"{done} of {len(missing)} instances made")
        for spec in specs:
            instance = self.make(spec)
            if instance is not None:
                yield spec, instance

    def _made(self, batches: Sequence[Sequence[InstanceSpec]], num_processes: int) -> Iterator[int]:
        """How many each batch had, as they are done."""
        if num_processes == 1 or len(batches) < 2:
            for batch in batches:
                yield self.make_all(batch)
            return
        spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(num_processes, mp_context=spawn) as pool:
            yield from pool.map(self.make_all, batches)

    def make_all(self, specs: Sequence[InstanceSpec]) -> int:
        """Make what is missing of ``specs``; how many they are."""
        for spec in specs:
            if not self.is_made(spec):
                self.make(spec)
        return len(specs)

    def path(self, spec: InstanceSpec) -> Path:
        """The file of its instance."""
        words = f"{spec.sha256} {self.pricing.label} {__version__}"
        words += "" if self.cluster is None else f" {self.cluster}"
        digest = hashlib.sha256(words.encode()).hexdigest()[:32]
        return self.cache / "instances" / f"{digest}.safetensors"

    def is_made(self, spec: InstanceSpec) -> bool:
        """Whether its file, or the note that it is worth nothing, is there and whole."""
        path = self.path(spec)
        if path.with_suffix(".txt").exists():
            return True
        try:
            return path.exists() and read_instance(path) is not None
        except BadRequest:
            return False  # Cut short, or of an earlier format: to be made anew.

    def ready(self, spec: InstanceSpec) -> Instance | None:
        """The instance where it has been made and is worth something."""
        path = self.path(spec)
        return read_instance(path) if path.exists() and self.is_made(spec) else None


def why_trivial(instance: Instance) -> str:
    """Why an instance teaches nothing; empty where it does."""
    rooms = [instance.rooms.open(row).time_s for row in range(len(instance.rows))]
    time_s = np.concatenate([room[np.isfinite(room)] for room in rooms])
    if len(time_s) < _LEAST_PLANS:
        return f"only {len(time_s)} plans fit"
    spread = float(time_s.max() / time_s.min())
    if spread < _LEAST_SPREAD:
        return f"the slowest plan takes {spread:.2f} times as long as the fastest"
    return ""


@lru_cache(maxsize=2)
def _programs(cache: Path) -> Programs:
    """One for a process: what is known of a model serves its next instance."""
    return Programs(cache)


def _by_model(specs: Sequence[InstanceSpec]) -> list[list[InstanceSpec]]:
    found: dict[object, list[InstanceSpec]] = {}
    for spec in specs:
        found.setdefault(spec.model, []).append(spec)
    return list(found.values())
