"""Which workers serve an answer: a pure function of the request, the fleet and the clock.

Every decision carries its reasons, the candidates with their estimates, and a fetch plan: which
blocks of the prompt the worker that computes it should borrow from whom.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.errors import NoWorker
from baton.hashing import KEY_BYTES
from baton.types.fleet import Role
from baton.types.link import FetchPart
from conductor.estimate import NOTHING, Arrival, Candidate, Fetch, estimate, find_prefix
from conductor.matches import NO_MATCHES, Matches
from conductor.policies import (
    Choice,
    Question,
    RoutePolicy,
    choose_alone,
    choose_decode,
    choose_prefill,
)
from conductor.views import Column, FleetView, Pool, WorkerView

GROUP_BLOCKS = 4  # the leading blocks that make a prefix group
LOCAL_TOKENS = 512  # most that a decode worker prefills itself when the costs decide


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """`local_tokens`: most tokens of a prompt, cached ones aside, that go to the decode worker
    although there are prefill workers. 0 = none; None = where the costs say so. Where nobody may
    `fetch`, workers use what they hold themselves, as schedulers that know no prefix map do.

    Shorter prompts overtake one that comes for `patience` times as long as it takes, as far as it
    can still be done in `DUE_S`. 0 = nobody overtakes, which is also so with the other policies.
    """

    policy: RoutePolicy = RoutePolicy.CACHE_AWARE
    local_tokens: int | None = None
    fetch: Fetch = Fetch.CLUSTER
    patience: float = 0.0

    @property
    def patience_of_prompts(self) -> float:
        return self.patience if self.policy is RoutePolicy.CACHE_AWARE else 0.0


DEFAULTS = RouteOptions()


def group_of(keys: bytes) -> bytes:
    """The key of the prefix that makes requests belong together; empty for short prompts."""
    end = min(GROUP_BLOCKS * KEY_BYTES, len(keys))
    return keys[max(end - KEY_BYTES, 0) : end]


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What routing may depend on. `avoid` names workers that have just failed this request.

    `keys` are of the prompt's first blocks, `matches` what the prefix map knows of them; both are
    empty when nobody caches. `computing`: leading blocks of the prompt, by the worker that has been
    given a prompt with them and not finished it (`ExpectedBlocks`). `number` counts the requests of
    this conductor.
    """

    key: str
    prompt: tuple[int, ...]
    max_tokens: int
    avoid: frozenset[str] = frozenset()
    number: int = 0
    priority: int = 0
    keys: bytes = b""
    matches: Matches = NO_MATCHES
    computing: Mapping[str, int] = field(default_factory=lambda: NOTHING)

    @property
    def group(self) -> bytes:
        return group_of(self.keys)


@dataclass(frozen=True, slots=True)
class Decision:
    """`prefill` is None when the decode worker computes the prompt itself.

    `fetch_plan` is for the worker that computes the prompt. `ttft_s` and `tpot_s` are predictions;
    with `is_guess` they rest on priors, because too little was measured.
    """

    prefill: WorkerView | None
    decode: WorkerView
    chosen: Candidate  # one of the candidates
    candidates: tuple[Candidate, ...]
    reason: str  # of the choice in one word, a metric's label
    fetch_plan: tuple[FetchPart, ...] = ()
    alone: str = ""  # why the decode worker computes the prompt itself
    ttft_factor: float = 1.0  # by which estimates have lately been wrong

    @property
    def ttft_s(self) -> float:
        return self.chosen.ttft_s * self.ttft_factor

    @property
    def queue_s(self) -> float:
        """The part of the predicted TTFT that other prompts are the cause of."""
        return self.chosen.queue_s * self.ttft_factor

    @property
    def tpot_s(self) -> float:
        return self.decode.tpot_s

    @property
    def work_s(self) -> float:
        """Predicted time of the worker that computes the prompt, queue aside."""
        return self.chosen.fetch_s + self.chosen.prefill_s

    @property
    def is_guess(self) -> bool:
        return (
            self.prefill or self.decode
        ).cost.prefill.is_prior or self.decode.cost.decode.is_prior

    @property
    def reasons(self) -> tuple[str, ...]:
        """In words; put together only when somebody wants to read them."""
        reasons = [f"decode {self.decode.info.name}: {_describe(self.decode)}"]
        if self.prefill is None:
            reasons.append(f"{self.alone}: {self.chosen.describe()}")
        else:
            name = self.prefill.info.name
            reasons.append(f"prefill {name} ({self.reason}): {self.chosen.describe()}")
        for part in self.fetch_plan:
            last = part.first_block + part.num_blocks - 1
            reasons.append(
                f"fetch blocks {part.first_block} to {last} from {part.source.name} ({part.tier})"
            )
        return tuple(reasons)


def route(
    request: RouteRequest, fleet: FleetView, now: float, options: RouteOptions = DEFAULTS
) -> Decision:
    """Choose a pair that has room, or a decode worker alone.

    `now` is the loop's time. Raises NoWorker, which says what is missing.
    """
    prompt_tokens = len(request.prompt)
    total = prompt_tokens + request.max_tokens
    decoders = _fitting(fleet.live(Role.DECODE), total, request.avoid)
    if not decoders:
        raise NoWorker(_why_none(fleet))
    layout = decoders[0].info.layout
    known = find_prefix(
        prompt_tokens, layout, request.matches, fleet, request.avoid, request.computing
    )
    prefix = known.limited(options.fetch)
    question = Question(
        request.key,
        request.number,
        request.group,
        Arrival(now, request.priority, options.patience_of_prompts),
        prefix,
        fleet,
    )
    blocks = layout.blocks_for(total)
    prefillers = _fitting(fleet.live(Role.PREFILL), prompt_tokens + 1, request.avoid)
    if not prefillers:
        choice = choose_alone(options.policy, decoders, blocks, question)
        why = "no live prefill worker has room: the decode worker computes the prompt"
        return _decision(fleet, None, choice.worker, choice, why)
    decode = choose_decode(options.policy, decoders, blocks, question)
    if (local := _without_hop(decode, question, options)) is not None:
        suffix = prompt_tokens - local.chosen.cached_tokens - local.chosen.fetch_tokens
        why = f"{suffix} tokens to compute are too few for a hop"
        return _decision(fleet, None, decode, local, why)
    choice = choose_prefill(options.policy, prefillers, question)
    return _decision(fleet, choice.worker, decode, choice)


def _without_hop(decode: WorkerView, question: Question, options: RouteOptions) -> Choice | None:
    """Conditional disaggregation: when the decode worker should compute the prompt itself.

    Left to the costs, that is when it takes less time than the handoff alone would, counting what
    it costs the sequences that it shares its steps with.
    """
    most = options.local_tokens
    if most == 0:
        return None
    prompt = question.prefix.prompt_tokens
    own = question.prefix.own.of(decode.info.name) * decode.info.layout.block_size
    if not question.prefix.sources and prompt - own > (most or LOCAL_TOKENS):
        return None
    transfers = question.fleet.transfers
    if most is None and (decode.cost.prefill.is_prior or transfers.handoff.is_prior):
        return None
    candidate, fetch = estimate(decode, question.prefix, transfers, question.arrival, "local")
    suffix = prompt - candidate.cached_tokens - candidate.fetch_tokens
    if suffix > (most or LOCAL_TOKENS):
        return None
    layout = decode.info.layout
    handoff_s = transfers.handoff.seconds(layout.blocks_for(prompt) * layout.block_bytes)
    # A prefill holds every sequence of the batch back; a handoff delays this request only.
    if most is None and candidate.ttft_s + candidate.prefill_s * decode.sequences > handoff_s:
        return None
    return Choice(decode, candidate, (candidate,), fetch, "local")


def _decision(
    fleet: FleetView,
    prefill: WorkerView | None,
    decode: WorkerView,
    choice: Choice,
    alone: str = "",
) -> Decision:
    return Decision(
        prefill,
        decode,
        choice.chosen,
        choice.candidates,
        choice.reason,
        choice.fetch,
        alone,
        fleet.ttft_factor,
    )


def _fitting(workers: Pool, tokens: int, avoid: frozenset[str]) -> Pool:
    """Those that can hold `tokens`; not those to avoid, if there are others."""
    fitting = workers.where(workers.column(Column.CAPACITY) >= tokens)
    return (fitting.where(~fitting.named(avoid)) or fitting) if avoid else fitting


def _describe(worker: WorkerView) -> str:
    load = worker.load
    return (
        f"running={load.running} waiting={load.waiting} waiting_tokens={load.waiting_tokens} "
        f"own={worker.own_attempts}"
    )


def _why_none(fleet: FleetView) -> str:
    decoders = [worker for worker in fleet.workers if worker.info.role is Role.DECODE]
    if not decoders:
        return "no decode worker has registered: start one with --conductor pointing here"
    states = ", ".join(f"{worker.info.name} is {worker.state}" for worker in decoders)
    return f"no decode worker can take this request now: {states}"
