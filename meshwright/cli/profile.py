"""``meshwright profile WHAT``: measure this machine into a record store."""

from __future__ import annotations

import typer

from meshwright.cli.profile_campaign import campaign
from meshwright.cli.profile_collectives import collectives
from meshwright.cli.profile_machine import machine
from meshwright.cli.profile_model import model
from meshwright.cli.profile_ops import ops

__all__ = ["profile_app"]

profile_app = typer.Typer(
    help="Measure this machine into a record store.",
    epilog="Example: meshwright profile ops --store records --budget 8m --json",
    no_args_is_help=True,
    rich_markup_mode=None,
)

for _verb, _example in (
    (ops, "ops --store records --model gpt2-xl --tp 1,2,4 --budget 8m"),
    (collectives, "collectives --cluster cpu:4 --store records --budget 4m"),
    (model, "model gpt2 --batch 4 --seq-len 256"),
    (machine, "machine --cluster cpu:4 -o machine.toml"),
    (campaign, "campaign --budget 9min --max-bytes 64m -o records"),
):
    profile_app.command(epilog=f"Example: meshwright profile {_example}")(_verb)
