"""A plan is a JSON file: write it, edit it, and let ``validate`` say whether it still works."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from meshwright import JobSpec, write_plan
from meshwright.api import plan_reference
from meshwright.cli.main import main

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "plan.json"
    planned = plan_reference("tiny-mlp", cluster="cpu:4", job=JobSpec(global_batch=16))
    write_plan(planned.result.plan, path)

    # Tensor parallelism over two devices, data parallelism over two.
    edited = json.loads(path.read_text())
    edited["mesh"] |= {"pp": 1, "dp_replicate": 2, "dp_shard": 1, "tp": 2}
    edited["num_microbatches"] = 1
    last = edited["model"]["num_segments"] - 1
    edited["stages"] = [
        {"first_segment": 0, "last_segment": last, "first_device": 0, "num_devices": 4}
    ]
    for segment in edited["segments"]:
        segment |= {"zero_stage": 0, "shard": {"dp_replicate": ["batch"], "tp": ["inner"]}}
    path.write_text(json.dumps(edited))
    assert main(["validate", str(path)]) == 0

    # Three ways to split a batch of 16: refused in one line, with the path of the key.
    edited["mesh"]["dp_replicate"] = 3
    edited["stages"][0]["num_devices"] = 6
    path.write_text(json.dumps(edited))
    assert main(["validate", str(path)]) == 1
