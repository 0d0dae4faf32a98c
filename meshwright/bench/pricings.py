"""Cost models by the name a command line gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.errors import BadRequest
from meshwright.gnn_cost.pretrained_pricing import load_pricing
from meshwright.strict_json import one_line

__all__ = ["FITTED_ON_THIS", "fitted_on", "names_of", "pricing_of"]

_ANALYTIC, _LEARNED = "analytic", "learned"

FITTED_ON_THIS = "it was fitted on this very table, so that errors elsewhere are larger"


def pricing_of(name: str) -> Pricing:
    """``analytic``, ``learned`` (the package's), or the folder of a fit.

    Raises:
        BadRequest: it is none of these.
    """
    if name == _ANALYTIC:
        return ANALYTIC
    if name == _LEARNED:
        return load_pricing()
    if not Path(name).is_dir():
        raise BadRequest(
            f"no cost model {one_line(name)!r}; give analytic, learned or the folder of a "
            "`meshwright fit`"
        )
    return load_pricing(Path(name))


def fitted_on(table_sha256: str, pricings: Mapping[str, Pricing]) -> frozenset[str]:
    """Names of the cost models whose cards list the file as data."""
    return frozenset(name for name, one in pricings.items() if table_sha256 in one.data_sha256)


def names_of(chosen: str, compared: str | None) -> Sequence[str]:
    """Names of cost models, the chosen one first, each once.

    Args:
        chosen: what is judged.
        compared: more, between commas; ``none`` for no more; None for ``analytic``.
    """
    wanted = "analytic" if compared is None else compared
    more = [] if wanted.strip() == "none" else [item.strip() for item in wanted.split(",")]
    return tuple(dict.fromkeys([chosen, *(item for item in more if item)]))
