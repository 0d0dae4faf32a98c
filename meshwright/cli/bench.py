"""``meshwright bench WHAT``: error and regret on tables of measurements; gaps of a planner."""

from __future__ import annotations

import typer

from meshwright.cli.bench_ops import ops
from meshwright.cli.bench_plans import plans
from meshwright.cli.bench_runs import runs

__all__ = ["bench_app"]

bench_app = typer.Typer(
    help="How far predictions are from what was measured, and plans from the best there are.",
    epilog="Example: meshwright bench runs runs.parquet --json",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _verb, _example in (
    (runs, "runs runs.parquet --compare analytic -o judged"),
    (ops, "ops ops.parquet --plot ops.svg"),
    (plans, "plans test-family --planner pretrained --instances 20"),
):
    bench_app.command(epilog=f"Example: meshwright bench {_example}")(_verb)
