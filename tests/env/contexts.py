"""Small search contexts whose devices have as little memory as a test wants."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from meshwright.cluster import parse_cluster
from meshwright.cluster.model import Cluster
from meshwright.env.build import instance_of
from meshwright.env.instance import Instance
from meshwright.plans.plan import JobSpec
from meshwright.space.contexts import make_context
from meshwright.space.pins import NO_PINS, Pins
from meshwright.space.search import SearchContext
from tests.cost.graphs import tiny_gpt


def cluster_with(shorthand: str, memory_bytes: int | None) -> Cluster:
    cluster = parse_cluster(shorthand)
    if memory_bytes is None:
        return cluster
    hosts = tuple(
        replace(host, device=replace(host.device, memory_bytes=memory_bytes))
        for host in cluster.hosts
    )
    return replace(cluster, hosts=hosts)


@cache
def tiny_context(
    shorthand: str = "cpu:4", memory_bytes: int | None = None, pins: Pins = NO_PINS
) -> SearchContext:
    context = make_context(
        tiny_gpt(),
        reference="tiny-gpt",
        cluster=cluster_with(shorthand, memory_bytes),
        job=JobSpec(global_batch=16),
        cluster_name=shorthand,
    )
    return replace(context, pins=pins)


@cache
def tiny_instance(memory_bytes: int | None = None) -> Instance:
    return instance_of(
        tiny_context(memory_bytes=memory_bytes), reference=lambda _: 0.01, max_plans=150
    )


def rooms_of(instance: Instance) -> list[np.ndarray]:
    return [instance.rooms.open(row).time_s for row in range(len(instance.rows))]
