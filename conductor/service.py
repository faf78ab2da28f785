"""The conductor's core, the same behind HTTP and gRPC: prepare a request, then stream it."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from baton.errors import BatonError, Cancelled, InternalError, TakenOver
from baton.rpc.registry import Registry
from baton.rpc.services import WorkerDialer
from baton.tokenizer import Tokenizer
from baton.types.fleet import Role
from conductor.admission import Admission, Slos
from conductor.answer_run import Delta
from conductor.cost_model import UNKNOWN_WORKER, WorkerCost
from conductor.dispatch import Dispatcher, Serving, Usage
from conductor.elastic import Elastic
from conductor.fleet import MAP_BLOCKS, Fleet
from conductor.live import Live
from conductor.metrics import Metrics
from conductor.planner import Planner, PlannerOptions
from conductor.records import Records
from conductor.request import Arrival, Ask, Chat, Prompt, Request, Tracing, begin_trace
from conductor.resume import check_token, digest_of, parse_token
from conductor.retries import Retries, RetryOptions
from conductor.router import RouteOptions
from conductor.span_export import Sender, SpanExport
from conductor.tenants.tenancy import Spending, TenancyMaker, open_tenancy, restrict
from conductor.trace import Traces
from conductor.validate import Limits, build_request, check_ask

INLINE_CHARACTERS = 4_000  # shorter texts take less than a millisecond, a thread nearly as much
TOKENIZER_THREADS = 2

_REMEDY = "shorten the prompt, or let workers have more --kv-memory-mib or --max-model-len"

Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the conductor knows of the model. `fingerprint` None trusts the first worker."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int  # tokens
    eos_ids: tuple[int, ...]
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """Bounds that an operator sets. Times in seconds."""

    lease_ttl_s: float = 10.0
    max_answers: int = 1024
    default_deadline_s: float = 600.0
    routing: RouteOptions = field(default_factory=RouteOptions)
    slos: Slos = field(default_factory=Slos)
    retries: RetryOptions = field(default_factory=RetryOptions)
    map_blocks: int = MAP_BLOCKS
    prior: WorkerCost = UNKNOWN_WORKER  # what workers cost until they were measured
    planner: PlannerOptions | None = None  # None: workers keep their roles
    trace_sample: float = 0.0  # of the traces that clients have not begun themselves
    max_prompt_tokens: int | None = None  # of one prompt; None: what fits the context
    max_output_tokens: int | None = None  # of one answer
    keepalive_s: float = 5.0  # of silence in a stream over HTTP, until a comment is sent; 0: never


class Conductor:
    """Make it inside the running loop; `run` owns everything that it starts."""

    def __init__(
        self,
        model: ServedModel,
        dialer: WorkerDialer,
        policy: Policy,
        make_id: Callable[[], str] | None = None,
        registry: Registry | None = None,
        open_spans: Callable[[], Sender] | None = None,
        make_tenancy: TenancyMaker = open_tenancy,
    ) -> None:
        """`open_spans` connects to where traces are exported to; None: nowhere."""
        self.model = model
        self.incarnation = secrets.token_hex(8)
        self.registry = registry  # None: there are no other conductors
        self.policy = policy
        self._make_id = make_id or functools.partial(secrets.token_hex, 12)
        self.fleet = Fleet(
            dialer, policy.lease_ttl_s, model.fingerprint, policy.map_blocks, policy.prior
        )
        self.metrics = Metrics(self.fleet, policy.slos)
        now = asyncio.get_running_loop().time()
        self.traces = Traces(now)
        self.admission = Admission(
            policy.max_answers, policy.slos, self.metrics.note_rejection, policy.retries.seed
        )
        self.tenancy = make_tenancy(self.metrics.tenants)
        self.records = Records(registry, self.incarnation)
        self.live = Live(lambda: self.metrics.output_tokens.value, policy.slos)
        self._dispatcher = Dispatcher(
            self.fleet,
            model.tokenizer,
            model.eos_ids,
            self.metrics,
            self.traces,
            self.admission,
            policy.routing,
            Retries(policy.retries, now, self.metrics.note_retry_refusal),
            self.records,
            self.live,
        )
        self.elastic = self._make_elastic(policy)
        self._spans = (
            None if open_spans is None else SpanExport(open_spans, self.metrics.note_export)
        )
        self._servings: dict[str, Serving] = {}  # by the requests' keys
        self._threads: ThreadPoolExecutor | None = None

    def _make_elastic(self, policy: Policy) -> Elastic | None:
        if policy.planner is None:
            return None
        return Elastic(
            self.fleet,
            Planner(policy.planner),
            policy.slos.tpot_s,
            self.registry,
            self.incarnation,
            self.metrics.note_role_change,
        )

    async def run(self) -> None:
        """Until cancelled."""
        with ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer") as threads:
            self._threads = threads
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self.records.run(), name="records")
                    if self._spans is not None:
                        tasks.create_task(self._spans.run(), name="spans")
                    tasks.create_task(self.tenancy.run(), name="tenancy")
                    if self.elastic is not None:
                        tasks.create_task(self.elastic.run(), name="elastic")
                    await self.fleet.run()
            finally:
                self._threads = None

    @property
    def limits(self) -> Limits:
        """The context is what the model and the largest decode pool allow."""
        capacity = self.fleet.capacity()
        longest = self.model.max_model_len
        context = longest if capacity is None else min(longest, capacity)
        limits = Limits(self.model.name, self.model.vocab_size, context)
        if context != longest:
            limits = replace(limits, remedy=_REMEDY)
        return limits.narrowed(self.policy.max_prompt_tokens, self.policy.max_output_tokens)

    @property
    def ready(self) -> bool:
        """Whether a request would succeed now."""
        return not self.admission.closed and bool(self.fleet.view().live(Role.DECODE))

    @property
    def running(self) -> int:
        """Requests being worked on."""
        return len(self._servings)

    async def prepare(
        self,
        ask: Ask,
        id_prefix: str,
        timeout_s: float | None = None,
        resume_token: str | None = None,
        arrival: Arrival | None = None,
    ) -> Request:
        """Validate and tokenize. With a token, the client comes back for the rest of its answers.
        Without an `arrival` it has come just now. Raises InvalidRequest, ModelNotFound,
        PermissionDenied, Overloaded or NoWorker."""
        now = asyncio.get_running_loop().time
        read_at = now()
        arrival = arrival or Arrival(read_at)
        received, tenant = arrival.at, arrival.tenant
        try:
            limits = self.limits.narrowed(tenant.max_prompt_tokens, tenant.max_output_tokens)
            sampling = check_ask(ask, limits)
            ask = restrict(ask, tenant)
            point = None if resume_token is None else parse_token(resume_token)
            if point is not None:
                check_token(point, ask, len(ask.prompts) * (ask.options.n or 1))
                sampling = replace(sampling, seed=point.seed)
            self.admission.check_open()
            prompts = [await self._to_ids(prompt, ask.add_special_tokens) for prompt in ask.prompts]
            allowed = self.policy.default_deadline_s
            key = self._make_key(ask, id_prefix) if point is None else point.key
            again = "" if point is None else self._make_id()
            context = begin_trace(key, arrival.caller, self.policy.trace_sample, again)
            return build_request(
                ask,
                sampling,
                prompts,
                limits,
                key=key,
                received=received,
                deadline=received + (allowed if timeout_s is None else min(timeout_s, allowed)),
                tenant=tenant,
                tracing=Tracing(context, arrival.caller, read_at, now()),
                sent=() if point is None else point.sent,
            )
        except BatonError as error:
            self.metrics.note_outcome(error.code)
            raise

    def _make_key(self, ask: Ask, id_prefix: str) -> str:
        made, chosen = self._make_id(), ask.request_id
        name = f"{chosen}~{made[:12]}" if chosen else f"{id_prefix}-{made}"
        return f"{name}.{digest_of(ask)}"

    async def generate(self, request: Request) -> AsyncGenerator[list[Delta] | Usage, None]:
        """Deltas as they come, the usage last. Raises the one error that ended the request."""
        outcome = Cancelled.code  # what a generator that is closed early amounts to
        serving: Serving | None = None
        try:
            async with self._admitted(request) as spending:
                self.live.note_begin()
                serving = self._serve(request)
                spending.usage = serving.taken
                async with aclosing(serving.deltas()) as deltas:
                    async for batch in deltas:
                        yield batch
                outcome = "ok"
                yield serving.usage
        except BatonError as error:
            outcome = error.code
            if serving is not None:
                serving.timeline.error = error.message
            raise
        except Exception:
            outcome = InternalError.code
            raise
        finally:
            self.metrics.note_outcome(outcome)
            if serving is not None:
                if self._servings.get(request.key) is serving:
                    del self._servings[request.key]
                self._note_end(request, serving, outcome)

    @asynccontextmanager
    async def _admitted(self, request: Request) -> AsyncGenerator[Spending, None]:
        """What the tenant may take is reserved, and there is a place for the request."""
        async with self.tenancy.reserved(request) as spending:
            with self.admission.admit(request), self.metrics.running.track_inprogress():
                yield spending

    def _serve(self, request: Request) -> Serving:
        older = self._servings.get(request.key)
        if older is not None:  # its client has gone, which was not noticed yet
            older.hand_over(TakenOver("the client came back on another connection"))
        serving = self._servings[request.key] = self._dispatcher.serve(request)
        if older is not None:
            serving.follow(older)
        return serving

    def abort_all(self, error: BatonError) -> None:
        """End every running request with `error`; where there are other conductors, workers go on,
        so that clients get the rest of their answers from those."""
        for serving in list(self._servings.values()):
            if self.records.shared:
                serving.hand_over(error)
            else:
                serving.abort(error)

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Raises InvalidRequest when the chat template refuses the messages."""
        return await self._to_ids(prompt, add_special_tokens)

    async def detokenize(self, ids: tuple[int, ...]) -> str:
        decode = functools.partial(self.model.tokenizer.decode, ids, skip_special_tokens=False)
        return await self._offload(decode, len(ids))

    def _note_end(self, request: Request, serving: Serving, outcome: str) -> None:
        usage = serving.usage
        if outcome == "ok":
            self.metrics.goodput.note(serving.latencies, usage.completion_tokens)
        self.metrics.prompt_tokens.inc(usage.prompt_tokens)
        self.metrics.cached_tokens.inc(usage.cached_tokens)
        serving.timeline.cached_tokens = usage.cached_tokens
        serving.timeline.end(outcome, asyncio.get_running_loop().time())
        serving.timeline.tpot_s = serving.latencies.worst_tpot_s
        self.live.note_end(outcome, serving.latencies)
        if self._spans is not None:
            self._spans.note_end(serving.timeline)

    async def _to_ids(self, prompt: Prompt, add_special_tokens: bool) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            return prompt
        tokenizer = self.model.tokenizer
        if isinstance(prompt, Chat):
            messages = prompt.messages
            size = sum(len(message["content"]) for message in messages)
            text = await self._offload(lambda: tokenizer.render_chat(messages), size)
            add_special_tokens = False  # the template has put them where they belong
        else:
            text = prompt
        encode = functools.partial(tokenizer.encode, text, add_special_tokens)
        return tuple(await self._offload(encode, len(text)))

    async def _offload(self, work: Callable[[], Result], size: int) -> Result:
        """Run `work` here when it is short, else in a thread, so that streams do not stutter."""
        if size <= INLINE_CHARACTERS or self._threads is None:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
