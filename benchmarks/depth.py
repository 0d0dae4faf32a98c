"""Claim: what planning needs of a graph hardly grows with its depth, and equals the long way.

    python -m benchmarks.depth [--repeats 5] [-o FILE]

For one model at several depths: seconds of CPU for the analysis, for one cost table from the short
graph that stands for the model, and for the same table from the whole graph. The columns of both
tables are compared in every bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.heading import heading
from meshwright.capture.captured import capture
from meshwright.capture.references import resolve_model
from meshwright.cluster import parse_cluster
from meshwright.cost.model import StepCostModel
from meshwright.cost.write_columns import columns_of
from meshwright.graph.analyzed import AnalyzedGraph, analyze_graph
from meshwright.graph.dimensions import label_dimensions
from meshwright.graph.factors import analyze_factors
from meshwright.graph.opgraph import OpGraph
from meshwright.graph.segments import find_segments
from meshwright.graph.serialize import graph_sha256
from meshwright.graph.simplify import with_explicit_factories
from meshwright.plans.plan import JobSpec, Precision
from meshwright.spmd.sharded import shard_graph

MODEL, BATCH, CLUSTER = "gpt3-175b", 1536, "1024xh100"
SIZES = {"dp_shard": 4, "tp": 8, "micro": 4}

_Result = TypeVar("_Result")


def captured(num_layers: int) -> OpGraph:
    """The model with so many layers."""
    source = resolve_model(f"{MODEL}?num_layers={num_layers}")
    args, kwargs = source.example_inputs(BATCH, dtype="bfloat16")
    return with_explicit_factories(capture(source.build("bfloat16"), args, kwargs).graph)


def median_cpu_s(repeats: int, call: Callable[[], _Result]) -> tuple[float, _Result]:
    """Median CPU seconds of ``call``, and what it returned last."""
    seconds = []
    for _ in range(repeats):
        gc.collect()
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


def analyzed_whole(graph: OpGraph) -> AnalyzedGraph:
    """The analysis that visits every operator for everything."""
    analysis = analyze_factors(graph)
    segmentation = find_segments(graph, analysis.rules)
    labels = label_dimensions(analysis, segmentation)
    return dataclasses.replace(
        analyze_graph(graph), analysis=analysis, segmentation=segmentation, labels=labels
    )


def model_of(found: AnalyzedGraph) -> StepCostModel:
    """A cost model that has built no table yet."""
    return StepCostModel(
        found.analysis,
        found.segmentation,
        found.labels,
        cluster=parse_cluster(CLUSTER),
        job=JobSpec(global_batch=BATCH, precision=Precision.BF16),
        periods=found.periods,
    )


def shards_of(model: StepCostModel) -> list[dict[str, list[str]]]:
    """Tensor parallelism with sequence parallelism, for each segment class."""
    shards = []
    for segment in model.segmentation.representatives():
        names = model.labels.by_segment[segment.index]
        wanted = ("heads", "vocab", "inner", "inner2", "sequence")
        shards.append({"dp_shard": ["batch"], "tp": [name for name in wanted if name in names]})
    return shards


def equal(left: object, right: object) -> bool:
    """Whether all arrays in two sets of columns are equal in every bit."""
    if dataclasses.is_dataclass(left):
        names = [field.name for field in dataclasses.fields(left)]
        return all(equal(getattr(left, name), getattr(right, name)) for name in names)
    if isinstance(left, tuple) and left and isinstance(left[0], np.ndarray):
        assert isinstance(right, tuple)
        return all(map(equal, left, right))
    if isinstance(left, np.ndarray):
        return np.array_equal(left, np.asarray(right))
    return left == right


def measured(num_layers: int, repeats: int) -> dict[str, Any]:
    """One row."""
    graph = captured(num_layers)
    analysis_s, found = median_cpu_s(repeats, lambda: analyze_graph(graph))
    digest_s, _ = median_cpu_s(repeats, lambda: graph_sha256(graph))
    whole_analysis_s, whole = median_cpu_s(1, lambda: analyzed_whole(graph))
    shards = shards_of(model_of(found))
    table_s, table = median_cpu_s(repeats, lambda: model_of(found).table(shards, SIZES))
    long_way = dataclasses.replace(whole, periods=dataclasses.replace(whole.periods, runs=()))
    whole_s, whole_table = median_cpu_s(1, lambda: model_of(long_way).table(shards, SIZES))
    by_segment = [shards[s.segment_class] for s in whole.segmentation.segments]
    # One table more, in the sizes themselves rather than those that serve every batch split.
    sharded = shard_graph(
        whole.analysis, whole.segmentation, whole.labels, shards=by_segment, axis_sizes=SIZES
    )
    exact = model_of(found)._build(by_segment, SIZES, (), scaled=False)
    return {
        "num_layers": num_layers,
        "num_ops": len(graph.ops),
        "num_segments": table.num_segments,
        "analysis_cpu_s": analysis_s,
        "digest_cpu_s": digest_s,
        "table_cpu_s": table_s,
        "whole_analysis_cpu_s": whole_analysis_s,
        "whole_table_cpu_s": whole_s,
        "equal_in_every_bit": equal(table.columns, whole_table.columns)
        and equal(exact.columns, columns_of(sharded, scaled=False)),
    }


def main() -> None:
    """Measure every depth and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32, 64, 96, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", default="benchmarks/results/depth.json")
    options = parser.parse_args()
    rows = []
    for num_layers in options.depths:
        row = measured(num_layers, options.repeats)
        rows.append(row)
        print(
            f"{num_layers:4} layers  {row['num_ops']:6} operators  analysis "
            f"{row['analysis_cpu_s']:.3f} s (whole {row['whole_analysis_cpu_s']:.2f})  table "
            f"{row['table_cpu_s']:.3f} s (whole {row['whole_table_cpu_s']:.2f})  equal "
            f"{row['equal_in_every_bit']}"
        )
    document = {
        **heading("analysis and cost tables in a time nearly free of depth, equal to the long way"),
        "model": MODEL,
        "n": options.repeats,
        "rows": rows,
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
