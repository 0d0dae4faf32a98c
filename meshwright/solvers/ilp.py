"""Integer programs for HiGHS: variables and linear rows in, the least objective and a bound out.

A program is collected as lists and handed over at once as a compressed row matrix, so building
costs about a microsecond a coefficient. One thread and a fixed seed: equal programs give equal
answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import highspy
import numpy as np
from numpy.typing import NDArray

__all__ = ["IntegerProgram", "IntegerSolution", "IntegerStatus"]

Terms = Iterable[tuple[int, float]]
"""``(variable, coefficient)`` pairs; a variable may occur once."""

_MAX_NODES = 500
"""Of branch and bound: about ten times what our programs were seen to need."""


class IntegerStatus(StrEnum):
    """How a minimization ended."""

    OPTIMAL = "optimal"
    """Within the relative gap asked for."""
    FEASIBLE = "feasible"
    """Stopped by the time limit with a solution that is not proven best."""
    INFEASIBLE = "infeasible"
    STOPPED = "stopped"
    """Stopped without a solution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerSolution:
    """What a minimization found."""

    status: IntegerStatus
    objective: float
    """Of ``values``; infinite without a solution."""
    bound: float
    """No solution has a lower objective."""
    values: NDArray[np.float64]
    """(variables,); integer variables are rounded. Empty without a solution."""

    @property
    def is_found(self) -> bool:
        """Whether there is a solution."""
        return self.status in {IntegerStatus.OPTIMAL, IntegerStatus.FEASIBLE}

    def is_set(self, variable: int) -> bool:
        """Whether a 0-1 variable is 1."""
        return bool(self.values[variable] > 0.5)


@dataclass(slots=True)
class IntegerProgram:
    """A program being collected; minimizes the sum of ``cost * variable``."""

    _cost: list[float] = field(default_factory=list)
    _lower: list[float] = field(default_factory=list)
    _upper: list[float] = field(default_factory=list)
    _is_integer: list[bool] = field(default_factory=list)
    _row_lower: list[float] = field(default_factory=list)
    _row_upper: list[float] = field(default_factory=list)
    _row_start: list[int] = field(default_factory=list)
    _index: list[int] = field(default_factory=list)
    _value: list[float] = field(default_factory=list)

    @property
    def num_variables(self) -> int:
        """Variables so far."""
        return len(self._cost)

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return len(self._row_start)

    def variable(
        self,
        *,
        cost: float = 0.0,
        lower: float = 0.0,
        upper: float = 1.0,
        is_integer: bool = True,
    ) -> int:
        """A new variable's number; 0 or 1 by default."""
        self._cost.append(cost)
        self._lower.append(lower)
        self._upper.append(upper)
        self._is_integer.append(is_integer)
        return len(self._cost) - 1

    def add_cost(self, variable: int, cost: float) -> None:
        """Raise the cost of a variable."""
        self._cost[variable] += cost

    def set_cost(self, variable: int, cost: float) -> None:
        """Change the cost of a variable; the program may be minimized again."""
        self._cost[variable] = cost

    def fix(self, variable: int, value: float) -> None:
        """Hold a variable at ``value``."""
        self._lower[variable] = self._upper[variable] = value

    def release(self, variable: int, *, lower: float = 0.0, upper: float = 1.0) -> None:
        """Undo ``fix``."""
        self._lower[variable], self._upper[variable] = lower, upper

    def row(self, terms: Terms, *, lower: float = -math.inf, upper: float = math.inf) -> int:
        """A new row's number: ``lower <= sum of terms <= upper``."""
        self._row_start.append(len(self._index))
        for variable, coefficient in terms:
            self._index.append(variable)
            self._value.append(coefficient)
        self._row_lower.append(lower)
        self._row_upper.append(upper)
        return len(self._row_start) - 1

    def set_row(self, row: int, *, lower: float = -math.inf, upper: float = math.inf) -> None:
        """Change the bounds of a row; the program may be minimized again."""
        self._row_lower[row], self._row_upper[row] = lower, upper

    def choose_one(self, variables: Iterable[int]) -> int:
        """A row that sets exactly one of ``variables``."""
        return self.row(((variable, 1.0) for variable in variables), lower=1.0, upper=1.0)

    def minimize(
        self, *, time_limit_s: float | None = None, relative_gap: float = 1e-6
    ) -> IntegerSolution:
        """The best solution found, and a bound.

        Args:
            time_limit_s: seconds after which to stop with what there is; without it the search
                ends after ``_MAX_NODES`` nodes, which is the same on every machine.
            relative_gap: how far the objective may be from the bound to count as best.
        """
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("random_seed", 0)
        solver.setOptionValue("mip_rel_gap", relative_gap)
        solver.setOptionValue("mip_max_nodes", _MAX_NODES)
        if time_limit_s is not None:
            solver.setOptionValue("time_limit", max(time_limit_s, 1e-3))
        solver.passModel(self._model())
        solver.run()
        status = solver.getModelStatus()
        info = solver.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return _without_solution(IntegerStatus.INFEASIBLE)
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return _without_solution(IntegerStatus.STOPPED)
        is_best = status in {
            highspy.HighsModelStatus.kOptimal,
            highspy.HighsModelStatus.kModelEmpty,
        }
        values = np.array(solver.getSolution().col_value, dtype=np.float64)
        integer = np.array(self._is_integer, dtype=np.bool_)
        objective = float(info.objective_function_value)
        bound = float(info.mip_dual_bound) if integer.any() else objective
        return IntegerSolution(
            status=IntegerStatus.OPTIMAL if is_best else IntegerStatus.FEASIBLE,
            objective=objective,
            bound=min(bound, objective),
            values=np.where(integer, np.rint(values), values),
        )

    def _model(self) -> highspy.HighsLp:
        model = highspy.HighsLp()
        infinity = highspy.kHighsInf
        model.num_col_, model.num_row_ = self.num_variables, self.num_rows
        model.col_cost_ = np.array(self._cost, dtype=np.float64)
        model.col_lower_ = np.clip(np.array(self._lower, dtype=np.float64), -infinity, infinity)
        model.col_upper_ = np.clip(np.array(self._upper, dtype=np.float64), -infinity, infinity)
        model.row_lower_ = np.array(self._row_lower, dtype=np.float64)
        model.row_upper_ = np.array(self._row_upper, dtype=np.float64)
        matrix = model.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        matrix.num_col_, matrix.num_row_ = self.num_variables, self.num_rows
        matrix.start_ = np.array([*self._row_start, len(self._index)], dtype=np.int32)
        matrix.index_ = np.array(self._index, dtype=np.int32)
        matrix.value_ = np.array(self._value, dtype=np.float64)
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        model.integrality_ = [kinds[is_integer] for is_integer in self._is_integer]
        return model


def _without_solution(status: IntegerStatus) -> IntegerSolution:
    return IntegerSolution(
        status=status, objective=math.inf, bound=-math.inf, values=np.zeros(0, np.float64)
    )
