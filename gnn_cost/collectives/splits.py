"""How well collectives are predicted that were held out: sizes, group sizes, systems.

A system is left out with everything of its GPU, by whatever source. Measurements are ``thinned``
beforehand, so that near-duplicates of one size cannot stand on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.collectives import alternatives
from meshwright.gnn_cost.collectives.model import LinkClass, kind_of
from meshwright.gnn_cost.collectives.samples import CollectiveSamples
from meshwright.gnn_cost.held_out import Split

__all__ = ["SYSTEMS", "analytic_time_s", "family_labels", "splits"]

FloatArray = NDArray[np.float64]

SYSTEMS: Mapping[str, tuple[str, ...]] = {
    "a100": ("a100_sxm_80gb", "unknown_a100_like"),
    "h100": ("h100_sxm_80gb",),
    "b200": ("b200",),
    "gb200": ("gb200",),
    "blackwell": ("b200", "gb200"),
    "v100": ("v100_sxm2_32gb",),
    "l40s": ("l40s",),
}
"""GPUs, as tables name them, that are left out together; the two Blackwell parts also both."""


def family_labels(samples: CollectiveSamples) -> NDArray[np.str_]:
    """(N,) ``nvlink``, ``pcie`` or ``network``: of the highest level each group spans."""
    groups = samples.features()
    top = np.argmax(np.cumsum(groups.size > 1, axis=0), axis=0)
    families = np.take_along_axis(groups.family, top[None], axis=0)[0]
    names = np.array([family.name.lower() for family in LinkClass])
    return names[families]


def analytic_time_s(samples: CollectiveSamples) -> FloatArray:
    """(N,) by the formulas of ``meshwright.cost.collectives``, from the same data sheets."""
    time_s = np.zeros(samples.count)
    for place, group in enumerate(samples.groups):
        mine = samples.group == place
        costs = alternatives(kind_of(group.kind), group.levels, group.num_ranks)
        payload = samples.num_bytes[mine]
        time_s[mine] = np.minimum.reduce([fixed + payload * each for fixed, each in costs])
    return time_s


def splits(samples: CollectiveSamples) -> Iterator[Split]:
    """Every way of holding out that is reported.

    Of kind ``size``, ``largest_size``, ``group_size`` or ``system``.
    """
    octave = np.floor(np.log2(samples.num_bytes)).astype(np.int64)
    for rest in range(3):
        test = octave % 3 == rest
        yield Split(kind="size", name=f"octaves {rest} of 3", test=test, train=~test)
    largest = np.zeros(len(samples.groups))
    np.maximum.at(largest, samples.group, samples.num_bytes)
    test = samples.num_bytes > largest[samples.group] / 4
    yield Split(kind="largest_size", name="largest two octaves", test=test, train=~test)
    yield from _group_sizes(samples)
    gpus = samples.labels("gpu")
    for name, members in SYSTEMS.items():
        out = np.isin(gpus, members)
        if out.any() and not out.all():
            yield Split(kind="system", name=name, test=out, train=~out)


def _group_sizes(samples: CollectiveSamples) -> Iterator[Split]:
    """2, 4, 8 ranks; judged where the same links were measured by the same source otherwise."""
    ranks = np.array([group.num_ranks for group in samples.groups])
    links = np.array(
        [
            "|".join([group.source, group.gpu, *(level.link.name for level in group.levels)])
            for group in samples.groups
        ]
    )
    is_send = np.array([group.kind == "send_recv" for group in samples.groups])
    for size in (2, 4, 8):
        known = np.isin(links, links[(ranks != size) & ~is_send])
        test = ((ranks == size) & known & ~is_send)[samples.group]
        out = ((ranks == size) & ~is_send)[samples.group]
        if test.any() and not out.all():
            yield Split(kind="group_size", name=f"{size} ranks", test=test, train=~out)
