"""A policy as a ``Decider``: its most probable plan and samples of it say on which rows to look.

To enter a row is to price all its plans, so the best of these are decided, not those sampled.

Samples that agree so far share an episode: each step computes one row of logits for every distinct
beginning, and divides the samples that are there among its candidates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from meshwright.agents.policy import Encoding, PlacementPolicy, collate
from meshwright.agents.ppo import MaskedCategorical
from meshwright.agents.weights import load_policy
from meshwright.env.build import instance_of
from meshwright.env.decode import Placed, best_of_room, decision_of
from meshwright.env.episode import Episode
from meshwright.env.instance import Instance
from meshwright.env.observation import NUM_CANDIDATE
from meshwright.env.rooms import OutOfTimeError, PricedRooms
from meshwright.errors import BadRequest, NoFeasiblePlan
from meshwright.space.search import Decided, SearchContext
from meshwright.strict_json import one_line

__all__ = [
    "PRETRAINED",
    "PolicyDecider",
    "Sampled",
    "best_of_rows",
    "planner_file",
    "sample_plans",
]

PRETRAINED = Path(__file__).parent / "pretrained" / "planner.safetensors"

_NUM_SAMPLES = {"O1": 16, "O2": 16}
_MAX_DECISIONS = 8
_LEAST_S = 1.0
"""About what it takes to look at the rows of a context; with less time left nothing is begun."""


def planner_file(name: str) -> Path:
    """The weights that ``--planner NAME`` means.

    Args:
        name: ``pretrained`` (the package's), the folder of a training, or a file of weights.

    Raises:
        BadRequest: it is none of these.
    """
    path = Path(name)
    if name == "pretrained":
        return PRETRAINED
    if path.is_file():
        return path
    if path.is_dir():
        return path / PRETRAINED.name
    raise BadRequest(
        f"--planner: {one_line(name)}: no folder and no file; give pretrained, the folder of a "
        "`meshwright train`, or a file of its weights"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A plan that the policy came to, or that stood on a row it came to."""

    placed: Placed
    time_s: float
    """By the room's table."""


class PolicyDecider:
    """Decides with a policy; a ``space.search.Decider``."""

    name = "policy"

    def __init__(
        self,
        policy: PlacementPolicy,
        *,
        num_samples: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        """Decide with ``policy``.

        Args:
            policy: trained for the observations of ``env.observation``.
            num_samples: drawn besides the most probable plan; by default what the level allows.
            temperature: of the samples, as in ``sample_plans``.
        """
        self.policy = policy
        self._num_samples = num_samples
        self.temperature = temperature

    @classmethod
    def pretrained(
        cls, path: Path = PRETRAINED, *, num_samples: int | None = None
    ) -> PolicyDecider:
        """The policy in ``path``, the package's own by default.

        Raises:
            BadRequest: the file is missing, damaged or of another version.
        """
        return cls.of(*load_policy(path), num_samples=num_samples)

    @classmethod
    def of(
        cls,
        policy: PlacementPolicy,
        card: Mapping[str, object],
        *,
        num_samples: int | None = None,
    ) -> PolicyDecider:
        """``policy``, drawing samples at the temperature that its card tells."""
        training = card.get("training")
        told = training.get("sampling_temperature") if isinstance(training, dict) else None
        temperature = float(told) if isinstance(told, int | float) and told > 0 else 1.0
        return cls(policy, num_samples=num_samples, temperature=temperature)

    def decide(self, context: SearchContext, deadline_s: float | None = None) -> Decided:
        """At most 8 decisions, fastest first; none where nothing fits.

        They are the best plans of the rows that samples are on, of each one; where the rows are
        few, samples besides.
        """
        if deadline_s is not None and time.monotonic() + _LEAST_S > deadline_s:
            return Decided(is_complete=False)
        count = self._num_samples
        try:
            instance = instance_of(context, reference=lambda _: 1.0, simulate=False)
        except NoFeasiblePlan:
            return Decided()
        rooms = instance.rooms
        assert isinstance(rooms, PricedRooms), "nothing was stored"
        rooms.deadline_s = deadline_s
        try:
            sampled = sample_plans(
                self.policy,
                instance,
                num_samples=_NUM_SAMPLES[context.level] if count is None else count,
                seed=context.seed,
                temperature=self.temperature,
            )
        except NoFeasiblePlan:
            return Decided(evaluations=rooms.evaluations)
        except OutOfTimeError:
            return Decided(evaluations=rooms.evaluations, is_complete=False)
        best = best_of_rows(instance, (plan.placed.row for plan in sampled))
        found = list(dict.fromkeys((*best, *sampled)))[:_MAX_DECISIONS]
        found.sort(key=_by_time)
        return Decided(
            decisions=tuple(decision_of(context, instance, plan.placed) for plan in found),
            evaluations=rooms.evaluations,
            is_complete=deadline_s is None or time.monotonic() < deadline_s,
        )


def best_of_rows(instance: Instance, rows: Iterable[int]) -> tuple[Sampled, ...]:
    """The fastest plan of each of ``rows`` on which something fits, fastest first."""
    best = (best_of_room(instance.rooms.open(row), row) for row in dict.fromkeys(rows))
    found = (Sampled(placed=placed, time_s=time_s) for time_s, placed in best)
    return tuple(sorted((plan for plan in found if math.isfinite(plan.time_s)), key=_by_time))


def _by_time(plan: Sampled) -> tuple[float, Placed]:
    return plan.time_s, plan.placed


@torch.no_grad()
def sample_plans(
    policy: PlacementPolicy,
    instance: Instance,
    *,
    num_samples: int,
    seed: int,
    temperature: float = 1.0,
) -> tuple[Sampled, ...]:
    """Distinct plans, fastest first: the greedy one and those of ``num_samples`` samples.

    Args:
        policy: decides.
        instance: whose rooms are opened as far as plans need them. Where they have a deadline,
            no more samples are followed after it.
        num_samples: plans drawn, repetitions counted.
        seed: of the draws.
        temperature: logits are divided by it: above 1 the drawn ones differ more.

    Raises:
        NoFeasiblePlan: nothing fits.
        OutOfTimeError: the deadline of the rooms came before the greedy plan.
    """
    encoding = policy.encode(collate([instance.graph]))
    generator = torch.Generator().manual_seed(seed)
    first = Episode(instance)
    greedy = first
    while not greedy.is_done:
        slot = int(_distribution(policy, encoding, [greedy], 1.0).mode())
        greedy = greedy.after(slot)
    done = {greedy.placed: greedy.time_s}
    open_: list[tuple[Episode, int]] = [(first, num_samples)] if num_samples else []
    with suppress(OutOfTimeError):
        while open_:
            episodes = [episode for episode, _ in open_]
            distribution = _distribution(policy, encoding, episodes, temperature)
            later: list[tuple[Episode, int]] = []
            for (episode, count), log_A in zip(open_, distribution.log_probability_BA, strict=True):
                drawn = torch.multinomial(log_A.exp(), count, replacement=True, generator=generator)
                slots, counts = torch.unique(drawn, return_counts=True)
                for slot, number in zip(slots.tolist(), counts.tolist(), strict=True):
                    after = episode.after(slot)
                    if after.is_done:
                        done[after.placed] = after.time_s
                    else:
                        later.append((after, number))
            open_ = later
    found = (Sampled(placed=placed, time_s=time_s) for placed, time_s in done.items() if placed)
    return tuple(sorted(found, key=_by_time))


def _distribution(
    policy: PlacementPolicy, encoding: Encoding, episodes: Sequence[Episode], temperature: float
) -> MaskedCategorical:
    width = max(len(episode.valid) for episode in episodes)
    mask_BA = np.zeros((len(episodes), width), dtype=bool)
    candidates_BAF = np.zeros((len(episodes), width, NUM_CANDIDATE), dtype=np.float32)
    for row, episode in enumerate(episodes):
        mask_BA[row, : len(episode.valid)] = episode.valid
        candidates_BAF[row, : len(episode.valid)] = episode.candidates()
    observation = {
        "decision": torch.tensor([episode.decision for episode in episodes]),
        "action_mask": torch.from_numpy(mask_BA),
        "candidates": torch.from_numpy(candidates_BAF),
        "state": torch.from_numpy(np.stack([episode.state() for episode in episodes])),
    }
    nowhere = torch.zeros(len(episodes), dtype=torch.long)
    logits_BA, _ = policy.decide(encoding, nowhere, observation)
    return MaskedCategorical(logits_BA / temperature, observation["action_mask"])
