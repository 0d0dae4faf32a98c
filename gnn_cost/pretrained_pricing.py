"""The learned cost model as one ``Pricing``, from the folder of a fit or from the package.

::

    operators.safetensors, .json   prices of operators          (``predictor.py``)
    collectives.json               prices of collectives        (``collectives.py``)
    steps.json                     how they join into a step, the interval of step times, and
                                   what measured steps say of others (``steps/``)
    memory.json                    what measured peaks exceed predicted ones by (``memory.py``)
    card.json                      what all of it was learned from
    calibrations/DEVICE.json       corrections of single devices (``calibrations.py``)

Each but one of the first three may be missing: what is not learned is priced analytically. Needs no
torch.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from meshwright.cluster.model import Cluster
from meshwright.cost.calibration import DEFAULTS, Calibration
from meshwright.cost.pricing import ANALYTIC, ANALYTIC_INTERVAL, Pricing, StepCorrector
from meshwright.errors import BadRequest
from meshwright.gnn_cost.calibrations import calibrated, load_calibrations
from meshwright.gnn_cost.collectives import LearnedCollectives, load_collectives
from meshwright.gnn_cost.document import Document
from meshwright.gnn_cost.memory import MEMORY_NAME, read_memory
from meshwright.gnn_cost.predictor import load_operators
from meshwright.gnn_cost.steps.document import LazySteps, StepsDocument
from meshwright.strict_json import JsonValue, load_json, one_line, read_source
from meshwright.tracking import DataSource

__all__ = [
    "STEPS_NAME",
    "StepFigures",
    "load_pricing",
    "named_pricing",
    "pretrained_folder",
    "read_step_figures",
    "usual_pricing",
    "weights_sha256",
]

STEPS_NAME = "steps.json"
_OPERATORS, _COLLECTIVES, _CARD = "operators.safetensors", "collectives.json", "card.json"


class StepFigures(Document, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``steps.json`` holds."""

    what: ClassVar[str] = "step figures"

    calibration: dict[str, Any]
    """``Calibration.to_json``."""
    interval: tuple[
        Annotated[float, msgspec.Meta(gt=0, le=1)], Annotated[float, msgspec.Meta(ge=1)]
    ]
    """``Pricing.interval``."""
    correction: StepsDocument | None = None
    """What measured steps say of others like them."""
    made_with: str = ""
    """``Pricing.sha256`` of the prices it corrects (``with_steps=False``); to others it does not
    apply. Empty: they stand beside it in the folder of one fit."""
    data: list[DataSource] = msgspec.field(default_factory=list)
    """What all of it was learned from."""
    licenses: dict[str, str] = msgspec.field(default_factory=dict)
    """By ``source`` of the rows; what was not told is absent."""

    def write(self, folder: Path) -> None:
        """Write ``steps.json`` into the folder of a fit."""
        self.write_to(folder / STEPS_NAME)


def read_step_figures(
    path: Path, *, parts_sha256: str = ""
) -> tuple[Calibration, tuple[float, float], StepCorrector | None]:
    """The calibration, the interval and the correction in a ``steps.json``.

    A correction that was made with other prices than those of ``parts_sha256`` is left out.

    Raises:
        BadRequest: it cannot be read, or does not follow the form.
    """
    form = StepFigures.read(path)
    is_made_for = not form.made_with or form.made_with == parts_sha256
    steps = LazySteps(form.correction) if form.correction is not None and is_made_for else None
    calibration = Calibration.from_json(form.calibration, where=one_line(str(path)))
    return calibration, form.interval, steps


def pretrained_folder() -> Path:
    """Where the weights lie that come with the package."""
    return Path(str(resources.files("meshwright.gnn_cost").joinpath("pretrained")))


def load_pricing(
    folder: Path | None = None, *, with_calibrations: bool = True, with_steps: bool = True
) -> Pricing:
    """The pricing a folder holds; without one, the package's.

    A device calibration that was made with other weights is left out; ``with_calibrations=False``
    leaves out all of them. ``with_steps=False`` leaves out what measured steps taught, also from
    the hash: what steps are fitted on top of.

    Raises:
        BadRequest: the folder holds no learned prices, or damaged ones.
    """
    where = pretrained_folder() if folder is None else folder
    paths = [where / name for name in (_OPERATORS, _COLLECTIVES, STEPS_NAME)]
    operators, collectives, steps = (path if path.is_file() else None for path in paths)
    steps = steps if with_steps else None
    if operators is None and collectives is None and steps is None:
        if folder is None:
            return ANALYTIC
        raise BadRequest(
            f"{folder}: holds no learned cost model; give the folder of a `meshwright fit`"
        )
    calibration, interval, corrector = DEFAULTS, ANALYTIC_INTERVAL, None
    if steps is not None:
        calibration, interval, corrector = read_step_figures(
            steps, parts_sha256=_sha256(where, with_steps=False)
        )
    pricing = Pricing(
        name="learned" if folder is None else f"learned in {folder.name}",
        sha256=_sha256(where, with_steps=with_steps),
        data_sha256=_data_hashes(where),
        operators=None if operators is None else load_operators(operators),
        collectives=(
            None if collectives is None else LearnedCollectives(load_collectives(collectives))
        ),
        steps=corrector,
        memory=read_memory(where / MEMORY_NAME) if (where / MEMORY_NAME).is_file() else None,
        calibration=calibration,
        interval=interval,
    )
    if not with_calibrations:
        return pricing
    found = load_calibrations(where, pricing_sha256=pricing.sha256)
    return calibrated(pricing, found.calibrations)


def usual_pricing(cluster: Cluster) -> Pricing:
    """What plans for ``cluster`` are priced with unless asked otherwise.

    The package's learned prices, and on CPUs, which they know nothing of, data sheets.
    """
    return ANALYTIC if _is_cpu(cluster) else load_pricing()


def named_pricing(name: str | None, cluster: Cluster) -> Pricing:
    """What ``--cost-model`` names: ``analytic``, ``learned``, or the folder of a fit.

    ``None``: the usual.

    Raises:
        BadRequest: there is no such folder, or it holds no learned prices.
    """
    if name is None or name == "learned":
        return usual_pricing(cluster)
    if name == "analytic":
        return ANALYTIC
    if not Path(name).is_dir():
        raise BadRequest(
            f"--cost-model: {name!r} is no folder; use analytic, learned or the folder of a "
            "`meshwright fit`"
        )
    return load_pricing(Path(name))


def _is_cpu(cluster: Cluster) -> bool:
    return all(device.name == "cpu" for device in cluster.devices)


def _data_hashes(folder: Path) -> frozenset[str]:
    """Of all files that the cards in a folder name as data."""
    found: set[str] = set()
    for name in (_CARD, f"{Path(_OPERATORS).stem}.json", _COLLECTIVES, STEPS_NAME, MEMORY_NAME):
        if (folder / name).is_file():
            data, where = read_source(folder / name, error=BadRequest, what="model card")
            found |= _hashes(load_json(data, error=BadRequest, name=where), is_data=False)
    return frozenset(found)


def _hashes(raw: JsonValue, *, is_data: bool) -> set[str]:
    """Values of ``sha256`` anywhere below a key ``data``."""
    if isinstance(raw, dict):
        own = raw.get("sha256")
        found = {own} if is_data and isinstance(own, str) else set()
        return found.union(*(_hashes(v, is_data=is_data or k == "data") for k, v in raw.items()))
    if isinstance(raw, list):
        return set().union(*(_hashes(item, is_data=is_data) for item in raw))
    return set()


def weights_sha256(folder: Path) -> str:
    """``Pricing.sha256`` of what ``load_pricing`` finds in a folder without calibrations."""
    return _sha256(folder, with_steps=True)


def _sha256(folder: Path, *, with_steps: bool) -> str:
    """Of the model card; without one, of all that prices are made of."""
    names = [_OPERATORS, _COLLECTIVES]
    if with_steps:
        names = [_CARD] if (folder / _CARD).is_file() else [*names, STEPS_NAME]
    digest = hashlib.sha256()
    try:
        for name in names:
            if (folder / name).is_file():
                digest.update((folder / name).read_bytes())
    except OSError as error:
        raise BadRequest(f"{folder}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
