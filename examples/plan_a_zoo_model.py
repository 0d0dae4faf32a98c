"""Plan a built-in model on GPUs that are not here: only data sheets are needed."""

from __future__ import annotations

from meshwright import JobSpec, Precision
from meshwright.api import plan_reference
from meshwright.report import mesh_words, prediction_words

planned = plan_reference(
    "gpt2",
    cluster="8xa100-80gb",
    job=JobSpec(global_batch=64, precision=Precision.BF16),
)
best = planned.result.plan
assert best.prediction is not None

print(f"{best.model.reference}: {planned.captured.graph.num_parameters:,} parameters")
print(f"chosen: {mesh_words(best)}: {prediction_words(best.prediction)}")
print(f"because: {planned.result.search.reason}")
for runner_up in planned.result.alternatives[:3]:
    print(f"not {mesh_words(runner_up.plan)}: {runner_up.reason}")
