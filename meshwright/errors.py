"""What can go wrong, said so that the user knows what to do.

Every error a user can cause derives from ``PlannerError``; its message is one line that says
what is wrong, where, and what to do. The command line maps ``exit_code`` to the process status:
1 for a user error, 2 when no feasible plan exists. Our own mistakes stay plain assertions.
"""

from __future__ import annotations

__all__ = [
    "BadClusterFile",
    "BadModel",
    "BadPlanFile",
    "BadRequest",
    "CaptureFailed",
    "DoesNotFit",
    "MissingProfile",
    "NoFeasiblePlan",
    "PlanRefused",
    "PlannerError",
]


class PlannerError(Exception):
    """An error the user can mend; ``str(error)`` is one line."""

    exit_code = 1


class BadRequest(PlannerError):
    """An option or argument has no sensible meaning (batch not divisible, unknown unit...)."""


class BadModel(PlannerError):
    """The model reference names nothing, or what it names is not a model we can use."""


class CaptureFailed(PlannerError):
    """PyTorch could not export the module; the message names the operator and the line."""


class BadClusterFile(PlannerError):
    """The cluster shorthand or file cannot be read."""


class BadPlanFile(PlannerError):
    """The plan file does not follow the schema; the message holds the path of the key."""


class PlanRefused(PlannerError):
    """The plan is well formed but the runtime cannot carry it, or would compute another result."""


class MissingProfile(PlannerError):
    """A measurement is needed that does not exist; the message names the command that makes it."""


class NoFeasiblePlan(PlannerError):
    """Nothing in the search space fits the cluster."""

    exit_code = 2


class DoesNotFit(NoFeasiblePlan):
    """One given plan needs more memory than its devices have."""
