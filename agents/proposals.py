"""Plans a policy proposes for one instance whose rooms may be priced as it goes.

The instance is encoded once. Greedy plan and samples walk down together; those that have made the
same decisions share the episode and what the policy said there.

n = states that the policy is asked about at once
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from meshwright.agents.policy import Encoding, PlacementPolicy, collate
from meshwright.agents.ppo import MaskedCategorical
from meshwright.env.decode import Placed
from meshwright.env.episode import Episode
from meshwright.env.instance import Instance

__all__ = ["propose"]


@dataclass(slots=True, eq=False)
class _Place:
    """A beginning of a plan, and where walks went on from it."""

    episode: Episode
    probability: NDArray[np.float64] | None = None
    """Of each candidate, once the policy was asked."""
    next_by_slot: dict[int, _Place] = field(default_factory=dict)

    def after(self, slot: int) -> _Place:
        if slot not in self.next_by_slot:
            self.next_by_slot[slot] = _Place(self.episode.after(slot))
        return self.next_by_slot[slot]


@torch.no_grad()
def propose(
    policy: PlacementPolicy,
    instance: Instance,
    *,
    num_samples: int,
    rng: np.random.Generator,
    temperature: float = 1.0,
) -> tuple[Placed, ...]:
    """Distinct plans that fit, the greedy one first, then the others as they were drawn.

    Args:
        policy: decides.
        instance: what to plan.
        num_samples: drawn besides the greedy one; equal ones count once.
        rng: draws; equal states of it give equal plans.
        temperature: logits are divided by it: above 1 the drawn ones differ more.

    Raises:
        NoFeasiblePlan: nothing fits.
    """
    encoding = policy.encode(collate([instance.graph]))
    walks = [_Place(Episode(instance))] * (1 + num_samples)
    while active := [place for place in walks if not place.episode.is_done]:
        unknown = {id(place): place for place in active if place.probability is None}
        _ask(policy, encoding, list(unknown.values()), temperature)
        for walk, place in enumerate(walks):
            if place.episode.is_done:
                continue
            assert place.probability is not None, "the policy was asked"
            if walk == 0:
                slot = int(place.probability.argmax())
            else:
                slot = int(rng.choice(len(place.probability), p=place.probability))
            walks[walk] = place.after(slot)
    plans = (place.episode.placed for place in walks)
    return tuple(dict.fromkeys(plan for plan in plans if plan is not None))


def _ask(
    policy: PlacementPolicy, encoding: Encoding, places: list[_Place], temperature: float
) -> None:
    episodes = [place.episode for place in places]
    if not episodes:
        return
    found = [episode.candidates() for episode in episodes]
    widest = max(len(each) for each in found)
    candidates = np.zeros((len(found), widest, found[0].shape[1]), np.float32)
    mask = np.zeros((len(found), widest), np.bool_)
    for row, (each, episode) in enumerate(zip(found, episodes, strict=True)):
        candidates[row, : len(each)] = each
        mask[row, : len(each)] = episode.valid
    observation = {
        "decision": torch.tensor([episode.decision for episode in episodes]),
        "action_mask": torch.from_numpy(mask),
        "candidates": torch.from_numpy(candidates),
        "state": torch.from_numpy(np.stack([episode.state() for episode in episodes])),
    }
    same_n = torch.zeros(len(episodes), dtype=torch.int64)
    logits, _ = policy.decide(encoding, same_n, observation)
    warm = logits.double() / temperature
    chance = MaskedCategorical(warm, observation["action_mask"]).log_probability_BA.exp()
    for place, row, each in zip(places, chance.numpy(), found, strict=True):
        place.probability = row[: len(each)] / row[: len(each)].sum()
