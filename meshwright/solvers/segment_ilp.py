"""One choice for every node of a choice graph, by integer programming.

For every node i and choice c a 0-1 variable ``x[i, c]``, for every link from i to j and every pair
of layouts (given s, wanted t) an amount ``e[s, t]``::

    sum_c x[i, c] = 1                                        (``_choose``)
    sum_t e[s, t] = sum of x[i, c] over c that give s        (``_transport``)
    sum_s e[s, t] = sum of x[j, c] over c that want t
    e[s, t] <= r[s, t]     r: one redistribution for all readers in a segment (and phase)
    least  sum of (node seconds + price of memory * bytes) x + sum of redistribution seconds r

The amounts need not be integer: with the x fixed, transport leaves them one value. The relaxation
is nearly tight (usually it is integer), so HiGHS needs few nodes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from meshwright.solvers.choices import ChoiceGraph, ChoiceNode, Link
from meshwright.solvers.ilp import IntegerProgram, IntegerSolution
from meshwright.solvers.segment_prices import ChoicePrices
from meshwright.spmd.layout import MICRO, Layout
from meshwright.spmd.redistribute import StepKind, plan_steps

__all__ = ["GraphChoice", "SegmentProgram"]

_GAP = 1e-4
"""Relative gap that counts as optimal."""

_PRICES = 5
"""Prices of memory tried for one bound."""

_CLOSE = 1e-2
"""A choice so near its bound is good enough to stop."""

_Wanted = tuple[Layout, frozenset[str], frozenset[str]]
"""Layout, axes that must be partial, axes that must not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphChoice:
    """A solution."""

    picks: tuple[int, ...]
    """Choice of each node."""
    step_s: float
    """Objective: all micro-batches, and what is done once in a step; one rank does everything."""
    bound_s: float
    repeated_s: float
    """Of ``step_s`` what every micro-batch repeats."""
    memory_bytes: float
    """Parameters, gradients, optimizer state and kept activations of all segments."""
    is_proven: bool


class SegmentProgram:
    """The integer program of one choice graph; solved again for other memory bounds."""

    def __init__(
        self, graph: ChoiceGraph, prices: ChoicePrices, *, micro_batches_in_flight: float
    ) -> None:
        """Build the program; ``micro_batches_in_flight`` keep their activations at once."""
        self._graph, self._prices = graph, prices
        self._micro = graph.axis_sizes[MICRO]
        self._program = IntegerProgram()
        self._x: list[list[int]] = []
        self._bytes: dict[int, float] = {}
        self._once: dict[int, float] = {}
        self._node_s: dict[int, float] = {}
        self._in_flight = micro_batches_in_flight
        self._choose()
        groups: defaultdict[tuple[int, int, int], list[Link]] = defaultdict(list)
        for link in graph.links:
            if link.operand < 0:
                self._gradient(link)
                continue
            target = graph.nodes[link.target]
            groups[link.source, link.result, target.segment_class].append(link)
        for links in groups.values():
            self._transport(links)

    @property
    def size(self) -> tuple[int, int]:
        """Variables and rows."""
        return self._program.num_variables, self._program.num_rows

    @property
    def least_memory_bytes(self) -> float:
        """No choice needs fewer bytes."""
        return sum(min(self._bytes[x] for x in xs) for xs in self._x)

    def solve(
        self,
        *,
        memory_price: float = 0.0,
        allowed: Mapping[int, frozenset[int]] = MappingProxyType({}),
        time_limit_s: float | None = None,
    ) -> GraphChoice | None:
        """The least of seconds plus ``memory_price`` times bytes; ``None``: none found in time.

        ``allowed``: node to the choices it may take; all where it is not named. No such choice
        that needs at most as many bytes is faster than the answer's ``bound_s``.
        """
        barred = [
            x
            for node, places in allowed.items()
            for place, x in enumerate(self._x[node])
            if place not in places
        ]
        for x in barred:
            self._program.fix(x, 0.0)
        try:
            return self._solve(memory_price, time_limit_s)
        finally:
            for x in barred:
                self._program.release(x)

    def _solve(self, memory_price: float, time_limit_s: float | None) -> GraphChoice | None:
        for x, seconds in self._node_s.items():
            price_s = memory_price * self._bytes[x]
            self._program.set_cost(x, (seconds + price_s) * self._per_s)
        found = self._program.minimize(time_limit_s=time_limit_s, relative_gap=_GAP)
        if not found.is_found:
            return None
        picks = tuple(
            next(number for number, x in enumerate(xs) if found.is_set(x)) for xs in self._x
        )
        memory = sum(self._bytes[xs[pick]] for xs, pick in zip(self._x, picks, strict=True))
        step_s = found.objective / self._per_s - memory_price * memory
        return GraphChoice(
            picks=picks,
            step_s=step_s,
            bound_s=found.bound / self._per_s - memory_price * memory,
            repeated_s=step_s - self._once_s(found),
            memory_bytes=memory,
            is_proven=found.status == "optimal",
        )

    def solve_within(
        self, memory_bytes: float, *, time_limit_s: float | None = None
    ) -> GraphChoice | None:
        """The fastest choice found within a memory bound; ``None`` where none fits.

        The bound is relaxed: bytes cost seconds, and the price is raised until the choice fits,
        then halved in on (Lagrange). A constraint in its place would put a knapsack into the
        program, which takes HiGHS a hundred times longer. ``bound_s`` is the best dual bound, so
        the gap says what relaxing may have cost.
        """
        fastest = self.solve(time_limit_s=time_limit_s)
        if fastest is None or fastest.memory_bytes <= memory_bytes:
            return fastest
        if self.least_memory_bytes > memory_bytes:
            return None
        bound_s, best = fastest.bound_s, None
        low, high = 0.0, fastest.step_s / fastest.memory_bytes
        for _ in range(_PRICES):
            price = (
                high if best is None else (low + high) / 2 if low == 0 else math.sqrt(low * high)
            )
            found = self.solve(memory_price=price, time_limit_s=time_limit_s)
            if found is None:
                break
            # Dual: seconds + price (bytes - bound), least over all choices.
            dual_s = found.bound_s + price * (found.memory_bytes - memory_bytes)
            bound_s = max(bound_s, dual_s)
            if found.memory_bytes <= memory_bytes:
                best = found if best is None or found.step_s < best.step_s else best
                high = price
            else:
                low = price
                high = high if best is not None else 8 * price
            if best is not None and best.step_s <= bound_s * (1 + _CLOSE):
                break
        if best is None:
            return None
        return replace(best, bound_s=bound_s, is_proven=best.step_s <= bound_s * (1 + _CLOSE))

    def _once_s(self, found: IntegerSolution) -> float:
        """Seconds of what is done once in a step."""
        return sum(seconds * float(found.values[x]) for x, seconds in self._once.items())

    # Nodes -------------------------------------------------------------------------------------

    def _choose(self) -> None:
        graph, prices = self._graph, self._prices
        parameters = [node for node in graph.nodes if node.is_parameter]
        of_parameter = dict(
            zip((n.value for n in parameters), prices.parameters(parameters), strict=True)
        )
        kept = prices.kept_results()
        of_operator = iter(prices.operators_s([n for n in graph.nodes if not n.is_parameter]))
        seconds: list[list[float]] = []
        sizes: list[list[float]] = []
        for number, node in enumerate(graph.nodes):
            if node.is_parameter:
                found = of_parameter[node.value]
                seconds.append([node.weight * s for s in found.step_s])
                sizes.append([node.weight * size for size in found.num_bytes])
                continue
            times = node.weight * self._micro
            seconds.append([times * s for s in next(of_operator)])
            flight = node.weight * self._in_flight
            results = kept.get(number, ())
            sizes.append([flight * prices.kept_bytes(c, results, node) for c in node.choices])
        for number, result, weight in graph.leaving:
            node = graph.nodes[number]
            for place, choice in enumerate(node.choices):
                each_s = prices.leaving_s(node, choice, result)
                if each_s != math.inf:
                    seconds[number][place] += weight * self._micro * each_s
        total_s = sum(max(row) for row in seconds)
        self._per_s = 1e4 / total_s if total_s else 1.0
        for node, row_s, row_bytes in zip(graph.nodes, seconds, sizes, strict=True):
            xs = [self._program.variable(cost=s * self._per_s) for s in row_s]
            self._node_s.update(zip(xs, row_s, strict=True))
            if node.is_parameter:
                self._once.update(zip(xs, row_s, strict=True))
            self._program.choose_one(xs)
            self._x.append(xs)
            self._bytes.update(zip(xs, row_bytes, strict=True))

    # Links -------------------------------------------------------------------------------------

    def _transport(self, links: Sequence[Link]) -> None:
        """Redistributions of one result to its readers in one segment.

        Readers in one phase share them; exchanges (all-to-all) both phases share.
        """
        given = self._given(links[0])
        shared: dict[tuple[Layout, Layout, bool], int] = {}
        for link in links:
            wanted = self._wanted(link)
            cost = {
                (s, t): self._convert_s(link, s, t) * link.weight * self._micro * self._per_s
                for s in given
                for t in wanted
            }
            if not any(cost.values()):
                continue
            amounts: dict[tuple[Layout, _Wanted], int] = {}
            for (s, t), price in cost.items():
                if price == math.inf:
                    continue
                own = price if len(links) == 1 else 0.0
                amount = self._program.variable(cost=own, is_integer=False)
                amounts[s, t] = amount
                if len(links) > 1 and price:
                    phase = link.is_backward and not is_exchange(s, t[0])
                    key = (s, t[0], phase)
                    if key not in shared:
                        shared[key] = self._program.variable(cost=price, is_integer=False)
                    self._program.row([(amount, 1.0), (shared[key], -1.0)], upper=0.0)
            self._balance(given, wanted, amounts)

    def _balance(
        self,
        given: dict[Layout, list[int]],
        wanted: dict[_Wanted, list[int]],
        amounts: dict[tuple[Layout, _Wanted], int],
    ) -> None:
        for s, xs in given.items():
            row = [(amounts[s, t], 1.0) for t in wanted if (s, t) in amounts]
            self._program.row([*row, *((x, -1.0) for x in xs)], lower=0.0, upper=0.0)
        for t, xs in wanted.items():
            row = [(amounts[s, t], 1.0) for s in given if (s, t) in amounts]
            self._program.row([*row, *((x, -1.0) for x in xs)], lower=0.0, upper=0.0)

    def _given(self, link: Link) -> dict[Layout, list[int]]:
        """Layouts the source gives, and the choices that give each."""
        found: defaultdict[Layout, list[int]] = defaultdict(list)
        node = self._graph.nodes[link.source]
        for x, choice in zip(self._x[link.source], node.choices, strict=True):
            layout = choice.results[link.result]
            assert layout is not None
            found[layout].append(x)
        return dict(found)

    def _wanted(self, link: Link) -> dict[_Wanted, list[int]]:
        """Layouts the target wants, in the source's places, and the choices that want each."""
        found: defaultdict[_Wanted, list[int]] = defaultdict(list)
        node = self._graph.nodes[link.target]
        passes = self._passing_axes(node, link.operand)
        for x, choice in zip(self._x[link.target], node.choices, strict=True):
            must = frozenset(axis for axis, where in choice.carried if link.operand in where)
            labeled = {axis for axis, _ in choice.labels}
            never = frozenset(passes) - must - labeled
            layout = link.unseen(choice.operands[link.operand])
            found[layout, must, never].append(x)
        return dict(found)

    def _passing_axes(self, node: ChoiceNode, operand: int) -> set[str]:
        """Axes on which partial sums of this operand alone pass through, so nothing else may be."""
        return {
            axis
            for choice in node.choices
            for axis, where in choice.carried
            if where == frozenset({operand})
        }

    def _convert_s(self, link: Link, given: Layout, wanted: _Wanted) -> float:
        layout, must, never = wanted
        if link.is_storing and given.shards != layout.shards:
            return math.inf
        partial = {axis for axis, _ in given.partial}
        if not must <= partial or never & partial:
            return math.inf
        return self._prices.convert_s(link.value, given, layout)

    def _gradient(self, link: Link) -> None:
        """The way of a gradient to its parameter's layout."""
        given = self._given(link)
        stored: dict[_Wanted, list[int]] = {}
        node = self._graph.nodes[link.target]
        for x, choice in zip(self._x[link.target], node.choices, strict=True):
            layout = choice.results[0]
            assert layout is not None
            stored.setdefault((layout, frozenset(), frozenset()), []).append(x)
        amounts: dict[tuple[Layout, _Wanted], int] = {}
        for s in given:
            for t in stored:
                each_s, once_s = self._prices.gradient_s(link, s, t[0])
                price = (each_s * self._micro + once_s) * link.weight * self._per_s
                if price != math.inf:
                    amounts[s, t] = self._program.variable(cost=price, is_integer=False)
                    self._once[amounts[s, t]] = once_s * link.weight
        self._balance(given, stored, amounts)


def is_exchange(source: Layout, target: Layout) -> bool:
    """Whether the redistribution is nothing but all-to-all."""
    return {step.kind for step in plan_steps(source, target)} == {StepKind.ALL_TO_ALL}
