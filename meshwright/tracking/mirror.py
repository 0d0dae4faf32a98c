"""The mirror of an experiment in Weights & Biases, online or offline; an optional extra.

Each group of metrics has a step of its own (``operators/0/step``), so that a run that goes on from
a checkpoint may repeat steps; ``operators/0/attempt`` tells them apart. What a model was made from
is an artifact of its own (of type ``dataset``, or an input) that holds names, hashes and
specifications and no measurements; online the run *uses* it, which draws the lineage where its
maker logged an equal one (``tracking.lineage``). Offline there is no server to ask: it is logged
only, and ``wandb sync`` uploads it later.
Nothing about the machine is sent: no code, no environment, no statistics of the system.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from meshwright.errors import BadRequest
from meshwright.strict_json import JsonValue, one_line
from meshwright.tracking.tracker import Tracker

__all__ = ["WandbMirror", "WandbMode", "open_mirror", "require_wandb"]

_START_TIMEOUT_S = 30.0


class WandbMode(StrEnum):
    """What becomes of the mirror."""

    ONLINE = "online"
    OFFLINE = "offline"
    DISABLED = "disabled"


def require_wandb(mode: WandbMode) -> None:
    """Check that the mirror can be had.

    Raises:
        BadRequest: W&B is not installed, or nobody is logged in for ``online``.
    """
    if mode is WandbMode.DISABLED:
        return
    if find_spec("wandb") is None:
        raise BadRequest(
            "--wandb: W&B is not installed; `pip install 'meshwright[wandb]'`, or leave it out: "
            "the local index holds everything"
        )
    if mode is WandbMode.ONLINE and not _is_logged_in():
        raise BadRequest(
            "--wandb online: nobody is logged in to W&B; run `wandb login` or set WANDB_API_KEY, "
            "or use --wandb offline"
        )


def _is_logged_in() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


def open_mirror(
    mode: WandbMode,
    *,
    project: str,
    group: str | None,
    name: str,
    run_id: str,
    folder: Path,
    complain: Callable[[str], None],
    attempt: int = 1,
    job_type: str | None = None,
    best: Mapping[str, str] | None = None,
) -> Tracker | None:
    """The mirror, started; None where it is disabled or cannot be started, which is complained of.

    A server that does not answer makes it offline.

    Args:
        mode: online, offline or disabled.
        project: of W&B.
        group: of runs that belong together.
        name: of the run.
        run_id: of the local index; a run that goes on goes on in W&B too.
        folder: where W&B keeps its files, under ``wandb``.
        complain: told what failed, in one line.
        attempt: how often the run began or went on, with this time.
        job_type: what the run does: ``train``, ``evaluate``...
        best: for metrics (``"validation/gap"``) which of their values sums up the run: ``min``,
            ``max``, ``mean`` or ``last``, which it is for all others.

    Raises:
        BadRequest: see ``require_wandb``.
    """
    require_wandb(mode)
    if mode is WandbMode.DISABLED:
        return None
    for tried in (mode, WandbMode.OFFLINE):
        try:
            return WandbMirror(
                tried,
                project=project,
                group=group,
                name=name,
                run_id=run_id,
                attempt=attempt,
                folder=folder,
                job_type=job_type,
                best=best or {},
            )
        except Exception as error:
            complain(f"W&B cannot start {tried}: {one_line(str(error))}")
            if tried is WandbMode.OFFLINE:
                break
    return None


class WandbMirror:
    """A Tracker that writes to W&B."""

    def __init__(
        self,
        mode: WandbMode,
        *,
        project: str,
        group: str | None,
        name: str,
        run_id: str,
        attempt: int,
        folder: Path,
        job_type: str | None,
        best: Mapping[str, str],
    ) -> None:
        import wandb

        self._wandb: Any = wandb
        self._is_online = mode is WandbMode.ONLINE
        self._groups: set[str] = set()
        self._attempt = attempt
        self._best = dict(best)
        folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=project,
            group=group,
            job_type=job_type,
            name=name,
            id=run_id,
            # Its process may have begun elsewhere: there a relative path is another folder.
            dir=str(folder.resolve()),
            mode=str(mode),  # type: ignore[arg-type] # a Literal there
            resume="allow",
            reinit="finish_previous",  # One that failed was never ended, and would be given again.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
                save_code=False,
                init_timeout=_START_TIMEOUT_S,
                host="",
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )

    def config(self, values: Mapping[str, JsonValue]) -> None:
        """See ``Tracker``."""
        self._run.config.update(dict(values), allow_val_change=True)

    def metrics(self, group: str, values: Mapping[str, float], *, step: int) -> None:
        """See ``Tracker``."""
        if group not in self._groups:
            self._groups.add(group)
            for name in ("step", "attempt"):
                self._run.define_metric(f"{group}/{name}", hidden=True)
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
            for name, summary in self._best.items():
                if name.startswith(f"{group}/"):
                    self._run.define_metric(name, step_metric=f"{group}/step", summary=summary)
        whole = {"step": step, "attempt": self._attempt, **values}
        self._run.log({f"{group}/{key}": value for key, value in whole.items()})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[JsonValue]]) -> None:
        """See ``Tracker``."""
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table})

    def artifact(
        self,
        name: str,
        *,
        kind: str,
        files: Sequence[Path],
        metadata: Mapping[str, JsonValue],
        made_from: Sequence[str] = (),
        is_input: bool = False,
    ) -> None:
        """See ``Tracker``."""
        whole = {**metadata, "made_from": list(made_from)}
        artifact = self._wandb.Artifact(name, type=kind, metadata=whole)
        with artifact.new_file("metadata.json", mode="w") as file:
            json.dump(whole, file, indent=2, sort_keys=True)
        for path in files:
            artifact.add_file(str(path))
        if self._is_online and (is_input or kind == "dataset"):
            self._run.use_artifact(artifact)
        else:
            self._run.log_artifact(artifact)

    def summary(self, values: Mapping[str, JsonValue]) -> None:
        """See ``Tracker``."""
        self._run.summary.update(dict(values))

    def finish(self, status: str) -> None:
        """See ``Tracker``; the run counts as failed where ``status`` says so."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=int(status == "failed"))
