"""Rollouts and sweeps on a Ray cluster, for whoever has one (``pip install 'meshwright[ray]'``).

Workers play with the weights they are sent; the caller learns from all they bring. What a worker
plays is decided by the seed, its number and the iteration, so a worker that died is started again
and plays the same, and a resumed run goes on bit for bit; not so with the baseline ``value``, whose
episodes go on from one iteration to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.agents.ppo import PPO, Iteration, Samples
from meshwright.errors import BadRequest, PlannerError
from meshwright.strict_json import one_line

__all__ = ["RayPPO", "Swept", "concatenated", "ray_session", "sweep"]

_ATTEMPTS = 3
"""Of a rollout whose worker dies."""


@contextmanager
def ray_session(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Connected to the cluster at ``address`` (``"auto"``: this machine's), or to a new local one.

    Raises:
        BadRequest: Ray is not installed, or there is no such cluster.
    """
    ray = _ray()
    local = {} if address is not None else {"num_cpus": num_cpus, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, configure_logging=False, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadRequest(
            f"no Ray cluster at {address or 'this machine'}: {one_line(str(error))}; start one "
            f"with `ray start --head`, or name none for a local one"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class RayPPO:
    """``PPO`` whose rollouts are played by workers; begins, saves and goes on as it does."""

    def __init__(self, ppo: PPO, make: Callable[[], PPO], *, num_workers: int) -> None:
        """Start the workers; needs ``ray_session``.

        Args:
            ppo: learns; its own environment is not played in.
            make: a worker's own trainer, with policy and environment as ``ppo`` has them; called
                on the worker.
            num_workers: one CPU each, until ``close``.

        Raises:
            BadRequest: the cluster has not so many CPUs.
        """
        ray = _ray()
        num_cpus = int(ray.cluster_resources().get("CPU", 0))
        if num_workers > num_cpus:
            raise BadRequest(f"{num_workers} workers need as many CPUs; the cluster has {num_cpus}")
        self.ppo = ppo
        self._ray = ray
        worker = ray.remote(num_cpus=1, max_restarts=_ATTEMPTS, max_task_retries=_ATTEMPTS)(_Worker)
        # What it holds goes to each machine once, and stays for workers that are started again.
        self._make = [ray.put(make)]
        self._workers = [worker.remote(number) for number in range(num_workers)]

    @property
    def iteration(self) -> int:
        """How many are done."""
        return self.ppo.iteration

    @property
    def num_iterations(self) -> int:
        """Of the whole run."""
        return self.ppo.num_iterations

    def train_iteration(self) -> Iteration:
        """A rollout of every worker, and one update from all of them."""
        return self.ppo.train_iteration(self._collect)

    def save(self, path: Path) -> None:
        """See ``PPO.save``."""
        self.ppo.save(path)

    def load(self, path: Path) -> None:
        """See ``PPO.load``."""
        self.ppo.load(path)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers = []

    def _collect(self) -> tuple[Samples, list[float]]:
        weights = self._ray.put(dict(self.ppo.policy.state_dict()))
        asked = [
            worker.collect.remote(self._make, weights, self.iteration) for worker in self._workers
        ]
        parts = self._ray.get(asked)
        samples = concatenated([part for part, _ in parts])
        self.ppo.num_env_steps += len(samples.action_N)
        return samples, [one for _, finished in parts for one in finished]


class _Worker:
    """Plays with weights it is sent."""

    def __init__(self, number: int) -> None:
        torch.set_num_threads(1)
        self.number = number
        self._ppo: PPO | None = None

    def collect(
        self, make: Sequence[Any], weights: Mapping[str, Tensor], iteration: int
    ) -> tuple[Samples, list[float]]:
        ppo: PPO = self._ppo or _ray().get(make[0])()
        self._ppo = ppo
        # Tensors from Ray's store are read-only views of memory that may go.
        ppo.policy.load_state_dict({name: item.clone() for name, item in weights.items()})
        seed = (ppo.config.seed * 1_000_003 + iteration) * 1009 + self.number + 1
        ppo.generator.manual_seed(seed % 2**63)
        return ppo.collect()


def concatenated(parts: Sequence[Samples]) -> Samples:
    """The samples of several rollouts as one."""
    names = [field.name for field in fields(Samples) if field.name != "observation"]
    keys = parts[0].observation
    return Samples(
        observation={key: torch.cat([part.observation[key] for part in parts]) for key in keys},
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What came of one setting of a sweep."""

    setting: Mapping[str, Any]
    figures: Mapping[str, float] | None
    """``None`` where it failed."""
    problem: str = ""


def sweep(
    train: Callable[[Mapping[str, Any]], Mapping[str, float]],
    settings: Sequence[Mapping[str, Any]],
    *,
    num_cpus: float = 1,
) -> tuple[Swept, ...]:
    """Train with each of ``settings`` somewhere on the cluster; needs ``ray_session``.

    One that fails does not stop the others. Answers stand in the order of ``settings``.

    Args:
        train: gives the figures of one; runs on a worker.
        settings: what to try.
        num_cpus: that one takes.
    """
    ray = _ray()
    remote = ray.remote(num_cpus=num_cpus, max_retries=_ATTEMPTS)(_figures)
    stored = ray.put(train)
    asked = [remote.remote(stored, dict(setting)) for setting in settings]
    found = []
    for setting, answer in zip(settings, asked, strict=True):
        try:
            figures, problem = ray.get(answer)
        except ray.exceptions.RayError as error:
            figures, problem = None, one_line(str(error))
        found.append(Swept(setting=setting, figures=figures, problem=problem))
    return tuple(found)


def _figures(
    train: Callable[[Mapping[str, Any]], Mapping[str, float]], setting: Mapping[str, Any]
) -> tuple[dict[str, float] | None, str]:
    torch.set_num_threads(1)
    try:
        return dict(train(setting)), ""
    except PlannerError as error:
        return None, one_line(str(error))


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise BadRequest(
            "Ray is not installed; run pip install 'meshwright[ray]', or train without it"
        ) from error
    return ray
