"""Transfers over links that they share: max-min fair, in the loop's time.

    transfer --> path of links --> rate = the fair share on the link that bounds it

Shares are those of progressive filling (Bertsekas and Gallager, Data Networks, section 6.5): the
link with the smallest share per transfer is filled first, what its transfers leave on other links
goes to the others. When a transfer begins or ends, only those are computed again that are connected
with it by shared links, once for all changes of one moment. Between changes rates are constant,
so that bytes are known at every time.

Transfers belong to no process: one whose reader was killed without clean-up moves on to its end, as
a NIC's does. One whose task is cancelled stops at once.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from itertools import count

_EARLY_S = 1e-9
"""A loop may call a timer so much too early."""


@dataclass(slots=True, eq=False)
class _Link:
    name: str
    capacity: float
    flows: dict[_Flow, None] = field(default_factory=dict)  # ordered, so that runs are repeatable
    moved: float = 0.0  # until the flows' `settled_at`


@dataclass(slots=True, eq=False)
class _Flow:
    """A transfer that runs. It moved `rate` bytes per second since `settled_at`."""

    path: tuple[_Link, ...]
    remaining: float
    settled_at: float
    done: asyncio.Future[None]
    rate: float = 0.0
    ends: int = -1  # its newest entry in the queue of ends; older ones do not count


class SharedLinks:
    """Named links of so many bytes per second. Used from the event loop only."""

    def __init__(self, bytes_per_s: Mapping[str, float] | None = None) -> None:
        self._links: dict[str, _Link] = {}
        self._context = Context()  # of no process: time is the network's, and nobody can stop it
        self._ends: list[tuple[float, int, _Flow]] = []
        self._numbers = count()
        self._changed: dict[_Link, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        for name, rate in (bytes_per_s or {}).items():
            self.add(name, rate)

    def add(self, name: str, bytes_per_s: float) -> None:
        if name in self._links or not bytes_per_s > 0:
            raise ValueError(f"link {name} is there already or has no bandwidth")
        self._links[name] = _Link(name, bytes_per_s)

    async def transfer(self, path: Sequence[str], nbytes: float) -> None:
        """Returns when `nbytes` have moved over every link of `path`; at once when there are none.

        Cancelled, it leaves its share to the others; what has moved has moved.
        """
        links = tuple(self._links[name] for name in dict.fromkeys(path))
        if not links or nbytes <= 0:
            return
        flow = self._context.run(self._begin, links, nbytes)
        try:
            await flow.done
        finally:
            if flow in flow.path[0].flows:  # it was cancelled
                self._context.run(self._leave, flow)

    def moved(self, name: str) -> float:
        """Bytes that have gone over a link until now."""
        link = self._links[name]
        now = self._context.run(_now)
        return link.moved + sum(_since(flow, now) for flow in link.flows)

    def running(self, name: str) -> int:
        """Transfers that share a link now."""
        return len(self._links[name].flows)

    def rates(self) -> list[tuple[tuple[str, ...], float]]:
        """Path and bytes per second of every transfer that runs."""
        flows = dict.fromkeys(flow for link in self._links.values() for flow in link.flows)
        return [(tuple(link.name for link in flow.path), flow.rate) for flow in flows]

    def _begin(self, links: tuple[_Link, ...], nbytes: float) -> _Flow:
        flow = _Flow(links, nbytes, _now(), asyncio.get_running_loop().create_future())
        for link in links:
            link.flows[flow] = None
        self._change(links)
        return flow

    def _leave(self, flow: _Flow) -> None:
        """Before its end."""
        _settle(flow, _now())
        self._remove(flow)

    def _remove(self, flow: _Flow) -> None:
        flow.ends = -1
        for link in flow.path:
            del link.flows[flow]
        self._change(flow.path)

    def _change(self, links: Iterable[_Link]) -> None:
        """Share again, when everything has happened that happens now."""
        if not self._changed:
            asyncio.get_running_loop().call_soon(self._share, context=self._context)
        self._changed.update(dict.fromkeys(links))

    def _share(self) -> None:
        now = _now()
        flows = _connected(self._changed)
        self._changed = {}
        for flow in flows:
            _settle(flow, now)
        for flow, rate in _fair_rates(flows).items():
            if rate != flow.rate or flow.ends < 0:
                flow.rate, flow.ends = rate, next(self._numbers)
                heapq.heappush(self._ends, (now + flow.remaining / rate, flow.ends, flow))
        self._arm()

    def _arm(self) -> None:
        """Set the timer for the next end."""
        while self._ends and self._ends[0][2].ends != self._ends[0][1]:
            heapq.heappop(self._ends)
        if self._timer is not None:
            if self._ends and self._timer.when() == self._ends[0][0]:
                return
            self._timer.cancel()
            self._timer = None
        if self._ends:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._ends[0][0], self._end_due, context=self._context)

    def _end_due(self) -> None:
        now, self._timer = _now(), None
        while self._ends and self._ends[0][0] <= now + _EARLY_S:
            _, number, flow = heapq.heappop(self._ends)
            if flow.ends != number:
                continue
            for link in flow.path:
                link.moved += flow.remaining  # all of it, whatever rounding says
            flow.remaining = 0.0
            self._remove(flow)
            if not flow.done.done():
                flow.done.set_result(None)
        self._arm()


def _fair_rates(flows: Iterable[_Flow]) -> dict[_Flow, float]:
    """Max-min fair rates of transfers that together are all those on their links."""
    rates = dict.fromkeys(flows, 0.0)
    left = {link: link.capacity for flow in rates for link in flow.path}
    waiting = {link: len(link.flows) for link in left}
    order = {link: number for number, link in enumerate(left)}
    shares = [(left[link] / waiting[link], order[link], link) for link in left]
    heapq.heapify(shares)
    while shares:
        share, number, link = heapq.heappop(shares)
        if not waiting[link]:
            continue
        now = left[link] / waiting[link]
        if now > share:  # shares only grow while others are filled
            heapq.heappush(shares, (now, number, link))
            continue
        for flow in link.flows:
            if rates[flow]:
                continue
            rates[flow] = share
            for crossed in flow.path:
                left[crossed] = max(0.0, left[crossed] - share)
                waiting[crossed] -= 1
    return rates


def _connected(links: Iterable[_Link]) -> list[_Flow]:
    """The transfers on these links, those that share a link with them, and so on."""
    flows: dict[_Flow, None] = {}
    todo = list(links)
    seen = dict.fromkeys(todo)
    while todo:
        for flow in todo.pop().flows:
            if flow in flows:
                continue
            flows[flow] = None
            for link in flow.path:
                if link not in seen:
                    seen[link] = None
                    todo.append(link)
    return list(flows)


def _settle(flow: _Flow, now: float) -> None:
    """Count what it has moved until now."""
    moved = _since(flow, now)
    for link in flow.path:
        link.moved += moved
    flow.remaining -= moved
    flow.settled_at = now


def _since(flow: _Flow, now: float) -> float:
    return min(flow.remaining, flow.rate * (now - flow.settled_at))


def _now() -> float:
    return asyncio.get_running_loop().time()
