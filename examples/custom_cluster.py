"""A cluster of one's own, as a file: two kinds of hosts on a slow network."""

from __future__ import annotations

import tempfile
from pathlib import Path

from meshwright import JobSpec, Precision
from meshwright.api import plan_reference
from meshwright.cluster import parse_cluster
from meshwright.report import mesh_words, prediction_words

CLUSTER = """
name = "four and four"

[[hosts]]
device = "a100-80gb"
num_devices = 4

[[hosts]]
device = "v100-32gb"
num_devices = 4

[[levels]]
link = { name = "ethernet", bytes_per_s = 1.25e9, latency_s = 50e-6 }
"""

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "cluster.toml"
    path.write_text(CLUSTER)
    print(parse_cluster(str(path)).describe())
    job = JobSpec(global_batch=64, seq_len=256, precision=Precision.FP16)
    plan = plan_reference("gpt2", cluster=str(path), job=job).result.plan

assert plan.prediction is not None
print(f"{mesh_words(plan)}: {prediction_words(plan.prediction)}")
