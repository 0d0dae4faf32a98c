"""What the verbs share that measure with several processes: which, how many, and keeping it all."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from meshwright.cli.output import Output
from meshwright.cluster import Cluster, parse_cluster
from meshwright.cluster.catalog import name_of_driver
from meshwright.cluster.detect import detect_gpus
from meshwright.errors import BadRequest
from meshwright.profiling.figures import Figure, Note, to_record
from meshwright.profiling.keeper import Keeper
from meshwright.profiling.ranks import run_on_local_ranks
from meshwright.profiling.sweeps import RankJob
from meshwright.records import RecordStore

__all__ = [
    "ClusterOption",
    "RanksOption",
    "StoreOption",
    "device_name",
    "figure_document",
    "local_ranks",
    "measure_ranks",
    "open_store",
    "parse_bytes",
    "parse_counts",
]

StoreOption = Annotated[str, typer.Option(metavar="DIR", help="Folder of the records.")]
ClusterOption = Annotated[
    str | None, typer.Option(metavar="C", help="Measure as many devices of this machine: cpu:4.")
]
RanksOption = Annotated[int | None, typer.Option(help="Processes, where --cluster is not given.")]

_DEFAULT_CPU_RANKS = 4
_MOST_RANKS = 256
_SAY_EVERY_S = 2.0
_BYTES = re.compile(r"(\d+)\s*(|k|m|g)(?:i?b)?")
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def parse_bytes(text: str, *, option: str) -> int:
    """Bytes of ``"64k"``, ``"16 MiB"``, ``"1g"``; units are binary.

    Raises:
        BadRequest: no size, or zero.
    """
    found = _BYTES.fullmatch(text.strip().lower())
    num_bytes = int(found[1][:18]) * _UNITS[found[2]] if found else 0
    if num_bytes <= 0:
        raise BadRequest(f"{option}: {text!r} is no size above zero; write it like 64k or 16MiB")
    return num_bytes


def parse_counts(text: str | None, *, option: str) -> tuple[int, ...] | None:
    """Counts of ``"2,4"``; None where nothing was given.

    Raises:
        BadRequest: one is no whole number above zero.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", word) for word in words):
        raise BadRequest(f"{option}: {text!r} is no list of numbers above zero; write 1,2,4")
    return tuple(int(word) for word in words)


def local_ranks(cluster: str | None, ranks: int | None, backend: str | None) -> tuple[int, str]:
    """How many processes, and whether on ``cpu`` or ``cuda``; under torchrun, those it started.

    Raises:
        BadRequest: the options contradict each other or this machine.
    """
    if ranks is not None and not 1 <= ranks <= _MOST_RANKS:
        raise BadRequest(f"--ranks: {ranks} processes on one machine; give 1 to {_MOST_RANKS}")
    num_gpus = len(detect_gpus())
    wanted: int | None = ranks
    device = {"gloo": "cpu", "nccl": "cuda", None: "cuda" if num_gpus else "cpu"}.get(backend)
    if device is None:
        raise BadRequest(f"--backend: no backend {backend!r}; use gloo or nccl")
    if cluster is not None:
        if ranks is not None:
            raise BadRequest("--cluster and --ranks: give one of them")
        found = _one_host(parse_cluster(cluster))
        wanted = found.num_devices
        if backend is None:
            device = "cpu" if found.devices[0].name == "cpu" else "cuda"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        wanted = wanted or int(os.environ["WORLD_SIZE"])
    elif device == "cuda" and (num_gpus == 0 or (wanted or 0) > num_gpus):
        raise BadRequest(
            f"{wanted or 'some'} GPUs are asked for but this machine has {num_gpus}; measure on "
            "the machine that has them, or here with --cluster cpu:4"
        )
    return wanted or (num_gpus if device == "cuda" else _DEFAULT_CPU_RANKS), device


def _one_host(cluster: Cluster) -> Cluster:
    if len(cluster.hosts) > 1:
        raise BadRequest(
            f"--cluster: {cluster.name} has {len(cluster.hosts)} hosts; start the verb with "
            "torchrun on each of them instead, without --cluster"
        )
    return cluster


def device_name(device: str) -> str:
    """The catalog's name of what ``cpu`` or ``cuda`` is here; the driver's where it has none."""
    if device == "cpu":
        return "cpu"
    gpus = detect_gpus()
    return name_of_driver(gpus[0].driver_name) if gpus else device


def open_store(store: str) -> RecordStore:
    """The store in the folder ``store``, into which Records can be written.

    Raises:
        BadRequest: they cannot; said before anything is measured.
    """
    found = RecordStore(Path(store))
    found.check_writable()
    return found


def measure_ranks(out: Output, job: RankJob, *, store: str, verb: str) -> list[Figure] | None:
    """Run ``job`` and keep what it measures in ``store`` as it comes.

    Returns:
        The figures; None on ranks of torchrun's other than 0, which have nothing to say.

    Raises:
        BadRequest: a process failed; what came before is kept.
    """
    figures: list[Figure] = []
    name = device_name(job.device)
    say = _sayer(out)
    writes = os.environ.get("RANK", "0") == "0"
    with Keeper(open_store(store) if writes else RecordStore(Path(store))) as keeper:

        def emit(message: Figure | Note) -> None:
            if isinstance(message, Note):
                say(message)
                return
            figures.append(message)
            keeper.keep(to_record(message, device=name, verb=verb))

        try:
            if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
                from meshwright.profiling.rank_worker import measure_in_this_process

                return figures if measure_in_this_process(job, emit) else None
            out.progress(f"starting {job.num_ranks} processes on {name}")
            run_on_local_ranks(job, emit)
        finally:
            if figures:
                out.progress(f"{len(figures)} figures go to {store}")
    return figures


def _sayer(out: Output) -> Callable[[Note], None]:
    """Says notes; of those about progress one every few seconds."""
    next_s = 0.0

    def say(note: Note) -> None:
        nonlocal next_s
        if note.is_progress and time.monotonic() < next_s:
            return
        next_s = time.monotonic() + _SAY_EVERY_S
        out.progress(note.text)

    return say


def figure_document(figure: Figure) -> dict[str, object]:
    """The figure as ``--json`` prints it."""
    ordered = sorted(figure.values)
    return {
        "kind": str(figure.kind),
        "name": figure.name,
        "median": statistics.median(ordered),
        "least": ordered[0],
        "most": ordered[-1],
        "unit": figure.unit,
        "num_repeats": len(ordered),
        "extra": {key: value for key, value in figure.extra.items() if value is not None},
    }
