"""Every message survives the wire; unknown kinds are clear errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import InternalError
from baton.rpc import (
    codec_blocks,
    codec_fleet,
    codec_handoff,
    codec_kv,
    codec_link,
    codec_report,
    codec_request,
)
from baton.types.blocks import (
    Ask,
    BlocksHello,
    BlocksRefused,
    Lend,
    LendEnd,
    LoanExpired,
    Offer,
    RenewLoans,
    Return,
    Returned,
)
from baton.types.figures import OfferCounts, StoreFigures, TierFigures, TierState
from baton.types.fleet import BlockState, FleetLease, KvLayout, Peer, Role, WorkerInfo, WorkerLoad
from baton.types.handoff import (
    Abort,
    Attach,
    Expired,
    Hello,
    Prefilled,
    Ranges,
    Refused,
    Release,
    Released,
    Renew,
)
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from baton.types.link import (
    Adopt,
    Cancel,
    Drain,
    FetchPart,
    Resync,
    SetRole,
    StartDecode,
    StartPrefill,
    StepReport,
)
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    GenerationTask,
    SampledToken,
    SamplingParams,
    Span,
    TokenLogprob,
    WireError,
)
from baton.types.trace import TraceContext
from baton.v1 import blocks_pb2, common_pb2, fleet_pb2, handoff_pb2, worker_pb2

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
real = st.floats(allow_nan=False)
tokens = st.lists(u32, max_size=20).map(tuple)
pairs = st.lists(st.tuples(u32, real), max_size=4).map(tuple)

st.register_type_strategy(
    SamplingParams,
    st.builds(
        SamplingParams,
        temperature=real,
        top_p=real,
        top_k=u32,
        min_p=real,
        presence_penalty=real,
        frequency_penalty=real,
        repetition_penalty=real,
        logit_bias=pairs,
        seed=st.integers(0, 2**64 - 1),
        max_tokens=u32,
        min_tokens=u32,
        ignore_eos=st.booleans(),
        stop_token_ids=tokens,
        logprobs=st.none() | u32,
    ),
)
attempts = st.builds(AttemptId, request_id=text, number=u32)
traces = st.none() | st.builds(TraceContext, text, text, st.booleans(), text)
tasks = st.builds(
    GenerationTask,
    trace=traces,
    attempt=attempts,
    prompt=tokens,
    output=tokens,
    priority=st.integers(-(2**31), 2**31 - 1),
    timeout_s=st.none() | real,
    cache_salt=text,
    cache_pin_s=st.none() | real,
    slack_s=real,
)
logprobs = st.builds(TokenLogprob, logprob=real, top=pairs)
sampled = st.builds(SampledToken, token_id=u32, index=u32, logprob=st.none() | logprobs)
errors = st.builds(WireError, text, text, st.booleans(), st.booleans())
counted = st.lists(st.tuples(text, st.integers(-(2**63), 2**63 - 1)), max_size=3).map(tuple)
spans = st.builds(Span, name=text, start_s=real, end_s=real, counts=counted)
finishes = st.builds(
    Finish,
    error=st.none() | errors,
    cached_tokens=u32,
    spans=st.lists(spans, max_size=3).map(tuple),
)
outputs = st.builds(
    AttemptOutput,
    attempt=attempts,
    tokens=st.lists(sampled, max_size=3).map(tuple),
    finish=st.none() | finishes,
)
layouts = st.builds(KvLayout, text, text, u32, u32, u32, u32, text)
u64 = st.integers(0, 2**64 - 1)
tiers = st.builds(
    TierFigures,
    tier=st.sampled_from(Tier),
    state=st.sampled_from(TierState),
    blocks=u64,
    capacity=u64,
    hits=u64,
    why=text,
)
counts = {name: u64 for name in StoreFigures.__dataclass_fields__ if name != "tiers"}
store_figures = st.builds(StoreFigures, tiers=st.lists(tiers, max_size=2).map(tuple), **counts)
loads = st.builds(
    WorkerLoad,
    offers=st.none() | st.builds(OfferCounts, u64, u64, u64, u64),
    store=st.none() | store_figures,
    running=u32,
    waiting=u32,
    waiting_tokens=st.integers(0, 2**63),
    blocks=st.lists(st.tuples(st.sampled_from(BlockState), u32), max_size=5).map(tuple),
)
peers = st.builds(Peer, text, text, text)
parts = st.lists(st.builds(FetchPart, peers, u32, u32), max_size=3).map(tuple)
infos = st.builds(
    WorkerInfo,
    name=text,
    incarnation=text,
    address=text,
    pid=u32,
    model_name=text,
    layout=layouts,
    num_blocks=u32,
    max_model_len=u32,
    transport=text,
    device=text,
    cpus=text,
    threads=u32,
    node=text,
    pair_to_token=real,
    step_tokens=u32,
)
hellos = st.builds(
    Hello,
    worker=text,
    incarnation=text,
    layout=layouts,
    transport=text,
    endpoint=st.binary(max_size=20),
    lease_ttl_s=real,
    expected_incarnation=text,
)
digests = st.lists(st.binary(max_size=16), max_size=4).map(tuple)
ranges = st.builds(
    Ranges,
    attempt=attempts,
    first_block=u32,
    blocks=tokens,
    layer_begin=u32,
    layer_end=u32,
    digests=digests,
)
prefilleds = st.builds(
    Prefilled, attempt=attempts, first=sampled, num_blocks=u32, cached_tokens=u32
)


def check(value: Any, to_pb: Callable[[Any], Message], from_pb: Callable[[Any], object]) -> None:
    encoded = to_pb(value)
    decoded = type(encoded).FromString(encoded.SerializeToString())
    assert from_pb(decoded) == value


few = settings(max_examples=40, deadline=None)


@few
@given(
    st.builds(StartPrefill, tasks, parts)
    | st.builds(StartDecode, tasks, st.none() | peers, parts)
    | st.builds(Adopt, attempts)
    | st.builds(Cancel, attempts, text)
    | st.just(Drain())
    | st.just(Resync())
    | st.builds(SetRole, st.sampled_from(Role))
)
def test_conductor_messages(message: Any) -> None:
    check(message, codec_link.conductor_to_pb, codec_link.conductor_from_pb)


few_attempts = st.builds(AttemptId, st.sampled_from("ab"), st.integers(0, 1))
plain_tokens = st.builds(SampledToken, token_id=u32, index=u32).map(lambda token: (token,))
plain = st.builds(AttemptOutput, few_attempts, plain_tokens)
mixed = st.builds(
    AttemptOutput,
    few_attempts,
    st.lists(sampled, max_size=3).map(tuple),
    st.none() | finishes,
)
reports = st.builds(StepReport, st.lists(plain | mixed | outputs, max_size=6).map(tuple), loads)


def by_attempt(reports: Iterable[StepReport]) -> dict[AttemptId, list[AttemptOutput]]:
    told: dict[AttemptId, list[AttemptOutput]] = {}
    for report in reports:
        for output in report.outputs:
            told.setdefault(output.attempt, []).append(output)
    return told


@few
@given(st.lists(reports, max_size=6))
def test_worker_messages(sent: list[StepReport]) -> None:
    encoder, decoder = codec_report.ReportEncoder(), codec_report.ReportDecoder()
    wire = [encoder.encode(report).SerializeToString() for report in sent]
    got = [decoder.decode(worker_pb2.WorkerMessage.FromString(raw)) for raw in wire]
    assert [report.load for report in got] == [report.load for report in sent]
    assert by_attempt(got) == by_attempt(sent)


block_keys = st.lists(st.binary(min_size=16, max_size=16), max_size=3).map(b"".join)


@few
@given(
    st.builds(KvEvents, u64, added=block_keys, removed=block_keys)
    | st.builds(KvSnapshot, u64, keys=block_keys)
)
def test_what_holders_tell(message: Any) -> None:
    check(message, codec_report.ReportEncoder().encode, codec_report.ReportDecoder().decode)


def test_a_token_is_a_few_bytes_and_an_attempt_is_named_once() -> None:
    encoder, decoder = codec_report.ReportEncoder(), codec_report.ReportDecoder()
    attempts = [AttemptId(f"cmpl-0123456789abcdef-{i}") for i in range(16)]

    def step(index: int, finish: Finish | None = None) -> bytes:
        token = SampledToken(7000 + index, index)
        outputs = tuple(AttemptOutput(attempt, (token,), finish) for attempt in attempts)
        raw: bytes = encoder.encode(StepReport(outputs, WorkerLoad())).SerializeToString()
        report = decoder.decode(worker_pb2.WorkerMessage.FromString(raw))
        assert report.outputs == outputs
        return raw

    assert len(step(0)) > 16 * len(attempts[0].request_id)
    assert all(len(step(index)) < 16 * 6 for index in (1, 2, 300))
    step(301, Finish(FinishReason.STOP))
    assert len(step(0)) > 16 * len(attempts[0].request_id)  # forgotten with its finish


def test_columns_that_make_no_sense_are_clear_errors() -> None:
    for columns in (
        {"numbers": [0], "token_ids": [1], "indices": [0]},
        {"token_ids": [1], "indices": []},
    ):
        message = worker_pb2.WorkerMessage(step_report=worker_pb2.StepReport(**columns))
        with pytest.raises(InternalError, match="makes no sense"):
            codec_report.ReportDecoder().decode(message)


@few
@given(
    hellos
    | st.builds(Attach, attempts)
    | st.builds(Renew, st.lists(attempts, max_size=3).map(tuple))
    | st.builds(Release, attempts, st.binary(max_size=16))
    | st.builds(Abort, attempts, text)
)
def test_decode_messages(message: Any) -> None:
    check(message, codec_handoff.decode_to_pb, codec_handoff.decode_from_pb)


@few
@given(
    hellos
    | ranges
    | prefilleds
    | st.builds(Released, attempts)
    | st.builds(Expired, attempts)
    | st.builds(Refused, st.none() | attempts, errors)
)
def test_prefill_messages(message: Any) -> None:
    check(message, codec_handoff.prefill_to_pb, codec_handoff.prefill_from_pb)


blocks_messages = (
    st.builds(
        BlocksHello,
        name=text,
        incarnation=text,
        layout=layouts,
        transport=text,
        endpoint=st.binary(max_size=20),
        lease_ttl_s=real,
        expected_incarnation=text,
    )
    | st.builds(Ask, u64, st.binary(max_size=48))
    | st.builds(Offer, u64, st.binary(max_size=48), tokens, u32, digests)
    | st.builds(Lend, u64, u32, tokens, digests)
    | st.builds(LendEnd, u64, u32)
    | st.builds(RenewLoans, st.lists(u64, max_size=4).map(tuple))
    | st.builds(Return, u64)
    | st.builds(Returned, u64)
    | st.builds(LoanExpired, u64)
    | st.builds(BlocksRefused, st.none() | u64, errors)
)


@few
@given(blocks_messages)
def test_blocks_messages(message: Any) -> None:
    check(message, codec_blocks.blocks_to_pb, codec_blocks.blocks_from_pb)


@few
@given(blocks_messages, st.data())
def test_bytes_that_were_damaged_are_a_message_or_a_clear_error(
    message: Any, data: st.DataObject
) -> None:
    raw = bytearray(codec_blocks.blocks_to_pb(message).SerializeToString())
    if raw:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        damaged = blocks_pb2.BlocksMessage.FromString(bytes(raw))
    except DecodeError:
        return
    try:
        codec_blocks.blocks_from_pb(damaged)
    except InternalError:
        return


@few
@given(infos)
def test_worker_info(info: WorkerInfo) -> None:
    check(info, codec_fleet.info_to_pb, codec_fleet.info_from_pb)


@few
@given(st.booleans(), real)
def test_fleet_lease(accepted: bool, ttl_s: float) -> None:
    check(FleetLease(accepted, ttl_s), codec_fleet.lease_to_pb, codec_fleet.lease_from_pb)


def test_token_lists_are_packed() -> None:
    task = GenerationTask(AttemptId("r"), tuple([1] * 1000), SamplingParams())
    assert len(codec_request.task_to_pb(task).SerializeToString()) < 1200


@pytest.mark.parametrize(
    ("decode", "empty"),
    [
        (codec_link.conductor_from_pb, worker_pb2.ConductorMessage()),
        (codec_report.ReportDecoder().decode, worker_pb2.WorkerMessage()),
        (codec_handoff.decode_from_pb, handoff_pb2.DecodeMessage()),
        (codec_handoff.prefill_from_pb, handoff_pb2.PrefillMessage()),
        (codec_blocks.blocks_from_pb, blocks_pb2.BlocksMessage()),
    ],
)
def test_a_message_without_a_known_kind_is_a_clear_error(
    decode: Callable[[Any], object], empty: Message
) -> None:
    with pytest.raises(InternalError, match="same version of baton"):
        decode(empty)


@pytest.mark.parametrize("field", ["added", "removed", "keys"])
def test_a_part_of_a_key_ends_the_stream_and_not_the_conductor(field: str) -> None:
    """Found by fuzzing: the prefix map raised, and with it the fleet."""
    news = {"number": 1, "tier": common_pb2.TIER_GPU, field: bytes(17)}
    if field == "keys":
        message = worker_pb2.WorkerMessage(kv_snapshot=worker_pb2.KvSnapshot(**news))
    else:
        message = worker_pb2.WorkerMessage(kv_events=worker_pb2.KvEvents(**news))
    with pytest.raises(InternalError, match="17 bytes of keys"):
        codec_report.ReportDecoder().decode(message)


def test_unknown_enum_values_are_clear_errors() -> None:
    load = common_pb2.WorkerLoad(blocks=[common_pb2.BlockCount(state=77, count=1)])
    with pytest.raises(InternalError, match="block state 77"):
        codec_fleet.load_from_pb(load)
    with pytest.raises(InternalError, match="role 0"):
        codec_fleet.info_from_pb(fleet_pb2.WorkerInfo())
    with pytest.raises(InternalError, match="tier 0"):
        codec_kv.events_from_pb(worker_pb2.KvEvents())
    figures = common_pb2.StoreFigures(tiers=[common_pb2.TierFigures(state=77)])  # type: ignore[arg-type]
    with pytest.raises(InternalError, match="tier state 77"):
        codec_fleet.load_from_pb(common_pb2.WorkerLoad(store=figures))
    output = worker_pb2.AttemptOutput(finish=worker_pb2.Finish())
    report = worker_pb2.StepReport(outputs=[output])
    with pytest.raises(InternalError, match="finish message"):
        codec_report.ReportDecoder().decode(worker_pb2.WorkerMessage(step_report=report))
