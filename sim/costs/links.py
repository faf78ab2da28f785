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
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from itertools import count

_EARLY_S = 1e-9
"""A loop may call a timer so much too early."""


@dataclass(slots=True, eq=False)
class _Link:
    """`moved` until `settled_at`, and `rate` since then: the sum of its flows' rates."""

    name: str
    capacity: float
    flows: dict[_Flow, None] = field(default_factory=dict)  # ordered, so that runs are repeatable
    moved: float = 0.0
    rate: float = 0.0
    settled_at: float = 0.0
    left: float = 0.0  # while shares are computed: what is not yet given away
    waiting: int = 0  # and the flows that have no rate yet

    def moved_at(self, now: float) -> float:
        return self.moved + self.rate * (now - self.settled_at)

    def change(self, rate: float, now: float) -> None:
        """By so much, from now on."""
        self.moved = self.moved_at(now)
        self.rate = self.rate + rate if self.flows else 0.0  # whatever rounding says
        self.settled_at = now


@dataclass(slots=True, eq=False)
class _Flow:
    """A transfer that runs: at `settled_at` so much remained, and `rate` is less of it since."""

    path: tuple[_Link, ...]
    remaining: float
    settled_at: float
    done: asyncio.Future[None]
    rate: float = 0.0
    ends: int = -1  # its newest entry in the queue of ends; older ones do not count

    def change(self, rate: float, now: float) -> None:
        """To this, from now on."""
        self.remaining = max(0.0, self.remaining - self.rate * (now - self.settled_at))
        for link in self.path:
            link.change(rate - self.rate, now)
        self.rate, self.settled_at = rate, now


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
        return self._links[name].moved_at(self._context.run(_now))

    def running(self, name: str) -> int:
        """Transfers that share a link now."""
        return len(self._links[name].flows)

    def _begin(self, links: tuple[_Link, ...], nbytes: float) -> _Flow:
        flow = _Flow(links, nbytes, _now(), asyncio.get_running_loop().create_future())
        for link in links:
            link.flows[flow] = None
        self._change(links)
        return flow

    def _leave(self, flow: _Flow) -> None:
        for link in flow.path:
            del link.flows[flow]
        flow.change(0.0, _now())
        flow.ends = -1
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
        for flow, rate in _fair_rates(flows).items():
            if rate != flow.rate:
                flow.change(rate, now)
                flow.ends = next(self._numbers)
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
            self._leave(flow)
            for link in flow.path:
                link.moved += flow.remaining  # all of it, whatever rounding says
            if not flow.done.done():
                flow.done.set_result(None)
        self._arm()


def _fair_rates(flows: Collection[_Flow]) -> dict[_Flow, float]:
    """Max-min fair rates of transfers that together are all those on their links."""
    links = dict.fromkeys(link for flow in flows for link in flow.path)
    for link in links:
        link.left, link.waiting = link.capacity, len(link.flows)
    shares = [(link.left / link.waiting, number, link) for number, link in enumerate(links)]
    heapq.heapify(shares)
    rates: dict[_Flow, float] = {}
    while len(rates) < len(flows):
        share, number, link = heapq.heappop(shares)
        if not link.waiting:
            continue
        now = link.left / link.waiting
        if now > share:  # shares only grow while others are filled
            heapq.heappush(shares, (now, number, link))
            continue
        for flow in link.flows:
            if flow in rates:
                continue
            rates[flow] = share
            for crossed in flow.path:
                crossed.left -= share
                crossed.waiting -= 1
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


def _now() -> float:
    return asyncio.get_running_loop().time()
