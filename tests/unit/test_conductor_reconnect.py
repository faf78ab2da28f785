"""A client loses its conductor and goes on at another one: every token once, whatever was lost."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from baton.errors import BatonError, InvalidRequest, NoWorker, TakenOver, WorkerLost
from baton.rpc.registry_memory import MemoryRegistry, RegistryServer
from baton.types.fleet import Peer
from baton.types.registry import AnswerPlace
from baton.types.request import (
    AttemptId,
)
from conductor.answer_run import NUMBER_GAP, Delta
from conductor.dispatch import Usage
from conductor.records import FEW, RETRY_S, Records
from conductor.request import Ask, Options, Sent
from conductor.resume import Bookmark, digest_of, parse_token
from conductor.service import Conductor
from conductor.trace_json import timeline_json
from tests.fake_worker import EOS
from tests.scripted_worker import Site, site, until
from tests.virtual_time import settle, virtual_time

ANSWER = (*b"abcdefghij", EOS)


def question(text: str = "what", **options: object) -> Ask:
    return Ask("tiny", (text,), Options(**options), default_max_tokens=100)  # type: ignore[arg-type]


@dataclass
class Client:
    """What one client has got, over as many connections as it took."""

    ask: Ask
    deltas: list[Delta] = field(default_factory=list)
    usage: Usage | None = None
    token: str | None = None

    async def read(self, conductor: Conductor, most: int = 1000) -> None:
        """Until the end, or until `most` more deltas have come."""
        request = await conductor.prepare(self.ask, "test", resume_token=self.token)
        bookmark = Bookmark(request)
        async with aclosing(conductor.generate(request)) as results:
            async for result in results:
                if isinstance(result, Usage):
                    self.usage = result
                    continue
                for delta in result:
                    self.deltas.append(delta)
                    bookmark.note(delta)
                    self.token = bookmark.token
                    most -= 1
                if most <= 0:
                    await asyncio.Event().wait()  # the connection hangs, unnoticed

    def tokens(self, index: int = 0) -> list[int]:
        return [t.token_id for d in self.deltas if d.index == index for t in d.tokens]

    def text(self, index: int = 0) -> str:
        return "".join(d.text for d in self.deltas if d.index == index)

    def ends(self, index: int = 0) -> list[str]:
        return [d.finish_reason for d in self.deltas if d.index == index and d.finish_reason]


async def has(client: Client, deltas: int) -> None:
    await until(lambda: len(client.deltas) >= deltas)


async def lose_conductor(place: Site, client: Client, after: int) -> None:
    """The client reads from the first conductor, which is killed when `after` deltas have come."""
    reading = asyncio.create_task(client.read(place.conductors[0], after))
    await has(client, after)
    await settle()
    await place.kill_conductor(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


@virtual_time
@pytest.mark.parametrize("after", [1, 4, 10])
async def test_another_conductor_goes_on_where_the_first_one_was(after: int) -> None:
    async with site(ANSWER) as place:
        client = Client(question(seed=5))
        await lose_conductor(place, client, after)
        await asyncio.sleep(2.5)  # meanwhile the worker goes on
        await client.read(place.conductors[1])
        assert client.tokens() == list(ANSWER)
        assert [t.index for d in client.deltas for t in d.tokens] == list(range(len(ANSWER)))
        assert (client.text(), client.ends()) == ("abcdefghij", ["stop"])
        assert client.usage == Usage(4, len(ANSWER), 3)
        assert len(place.all_tasks()) == 1  # adopted, not begun again


@virtual_time
async def test_it_finds_an_answer_that_has_ended_meanwhile() -> None:
    async with site(ANSWER) as place:
        client = Client(question())
        await lose_conductor(place, client, 8)
        await asyncio.sleep(10)
        await client.read(place.conductors[1])
        assert (client.tokens(), client.ends()) == (list(ANSWER), ["stop"])
        assert len(place.all_tasks()) == 1


@virtual_time
@pytest.mark.parametrize("lost", ["registry", "record", "answer", "worker"])
async def test_what_cannot_be_found_is_made_again_and_not_sent_again(lost: str) -> None:
    async with site(ANSWER) as place:
        client = Client(question(seed=5))
        await lose_conductor(place, client, 4)
        if lost == "registry":
            place.registry.down = True
        elif lost == "record":
            place.registry.wipe()
        elif lost == "answer":  # nobody came in time
            await asyncio.sleep(60)
        else:
            busy = next(name for name, w in place.workers.items() if w.work)
            place.network.kill(f"{busy}:1")
            await settle()
            for attempt in list(place.workers[busy].work):
                place.workers[busy].work.pop(attempt).cancel()
        await client.read(place.conductors[1])
        assert (client.tokens(), client.text()) == (list(ANSWER), "abcdefghij")
        assert client.ends() == ["stop"]
        tasks = sorted(place.all_tasks(), key=lambda task: task.attempt.number)
        first, again = tasks[0], tasks[-1]
        assert again.attempt.request_id == first.attempt.request_id
        assert again.attempt.number >= NUMBER_GAP
        assert again.sampling == first.sampling


@virtual_time
async def test_a_drawn_seed_stays_the_same() -> None:
    async with site(ANSWER) as place:
        client = Client(question(temperature=0.8, n=2))
        await lose_conductor(place, client, 6)
        place.registry.wipe()
        await client.read(place.conductors[1])
        seeds = {task.attempt.request_id: set[int]() for task in place.all_tasks()}
        for task in place.all_tasks():
            seeds[task.attempt.request_id].add(task.sampling.seed)
        assert [len(found) for found in seeds.values()] == [1, 1]
        assert client.tokens(0) == client.tokens(1) == list(ANSWER)


@virtual_time
async def test_a_conductor_that_has_just_started_waits_for_its_links() -> None:
    async with site(ANSWER) as place:
        client = Client(question())
        await lose_conductor(place, client, 4)
        new = await place.add_conductor(alone=True)
        reading = asyncio.create_task(client.read(new))
        await asyncio.sleep(1)
        await place.link_workers(new)
        await reading
        assert (client.tokens(), client.ends()) == (list(ANSWER), ["stop"])
        assert len(place.all_tasks()) == 1


@virtual_time
async def test_it_does_not_wait_for_ever() -> None:
    async with site(ANSWER) as place:
        client = Client(question())
        await lose_conductor(place, client, 4)
        new = await place.add_conductor(alone=True)
        began = asyncio.get_running_loop().time()
        with pytest.raises(WorkerLost, match="has just gone"):
            await client.read(new)
        assert asyncio.get_running_loop().time() - began < 60


@virtual_time
async def test_the_same_conductor_notices_that_the_client_is_back() -> None:
    async with site(ANSWER) as place:
        client = Client(question())
        hanging = asyncio.create_task(client.read(place.conductors[0], 3))
        await has(client, 3)
        await client.read(place.conductors[0])
        assert (client.tokens(), client.ends()) == (list(ANSWER), ["stop"])
        assert len(place.all_tasks()) == 1
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)


@virtual_time
async def test_a_conductor_that_is_cut_off_from_its_client_alone_loses_the_request() -> None:
    async with site(ANSWER) as place:
        client = Client(question())
        other = Client(client.ask)
        reading = asyncio.create_task(client.read(place.conductors[0]))
        await has(client, 3)
        other.token, other.deltas = client.token, list(client.deltas)
        await other.read(place.conductors[1])
        assert (other.tokens(), other.ends()) == (list(ANSWER), ["stop"])
        with pytest.raises(TakenOver, match="adopted by another conductor"):
            await reading
        assert len(place.all_tasks()) == 1


@virtual_time
async def test_a_conductor_that_shuts_down_hands_its_requests_over() -> None:
    async with site(ANSWER) as place:
        client = Client(question())
        reading = asyncio.create_task(client.read(place.conductors[0]))
        await has(client, 3)
        place.conductors[0].abort_all(NoWorker("shutting down"))
        with pytest.raises(NoWorker):
            await reading
        await place.kill_conductor(0)
        await client.read(place.conductors[1])
        assert (client.tokens(), client.ends()) == (list(ANSWER), ["stop"])
        assert len(place.all_tasks()) == 1


@virtual_time
async def test_conductors_may_be_lost_again_and_again() -> None:
    async with site(ANSWER) as place:
        client = Client(question())
        await lose_conductor(place, client, 3)
        for number in (1, 2):
            await place.add_conductor()
            reading = asyncio.create_task(client.read(place.conductors[number], 2))
            before = len(client.deltas)
            await has(client, before + 2)
            if number == 2:
                place.registry.wipe()
            await place.kill_conductor(number)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await client.read(place.conductors[3])
        assert (client.tokens(), client.ends()) == (list(ANSWER), ["stop"])


@virtual_time
async def test_a_character_and_a_stop_string_span_the_change() -> None:
    euro = "€".encode()
    answer = (*b"x", *euro, *b" ST", *b"OP tail", EOS)
    for after in (2, 6):
        async with site(answer) as place:
            client = Client(question(stop=("STOP",)))
            await lose_conductor(place, client, after)
            await client.read(place.conductors[1])
            assert (client.text(), client.ends()) == ("x€ ", ["stop"])


@virtual_time
async def test_logprobs_of_a_resumed_attempt_that_nobody_has_are_made_again() -> None:
    async with site(ANSWER) as place:
        client = Client(question(logprobs=0))
        await lose_conductor(place, client, 4)
        await client.read(place.conductors[1])
        assert client.tokens() == list(ANSWER)
        assert all(t.logprob is not None for d in client.deltas for t in d.tokens)
        assert len(place.all_tasks()) == 1


@virtual_time
async def test_who_has_everything_gets_only_the_usage() -> None:
    async with site(ANSWER) as place:
        client = Client(question())
        await client.read(place.conductors[0])
        client.usage = None
        before = list(client.deltas)
        await client.read(place.conductors[1])
        assert client.deltas == before
        assert client.usage is not None
        assert client.usage.completion_tokens == len(ANSWER)
        assert len(place.all_tasks()) == 1


@virtual_time
async def test_records_name_the_worker_and_go_after_a_while() -> None:
    async with site(ANSWER) as place:
        client = Client(question())
        reading = asyncio.create_task(client.read(place.conductors[0]))
        await asyncio.sleep(2)
        (record,) = place.registry.requests.live().values()
        assert record.conductor == place.conductors[0].incarnation
        assert place.workers[record.answers[0].decode.name].work
        await reading
        await asyncio.sleep(14)
        assert place.registry.requests.live()
        await asyncio.sleep(2)
        assert not place.registry.requests.live()


@virtual_time
@pytest.mark.parametrize("noticed", ["down", "wiped"])
async def test_a_registry_that_was_away_has_all_records_again(noticed: str) -> None:
    async with site(ANSWER) as place:
        client = Client(question(seed=5))
        place.registry.down = noticed == "down"
        reading = asyncio.create_task(client.read(place.conductors[0], 4))
        await has(client, 4)
        place.registry.down = False
        if noticed == "wiped":
            place.registry.wipe()
            place.conductors[0].records.tell_again()
        await asyncio.sleep(RETRY_S)
        await place.kill_conductor(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await client.read(place.conductors[1])
        assert (client.tokens(), client.ends()) == (list(ANSWER), ["stop"])
        assert len(place.all_tasks()) == 1  # adopted


@virtual_time
@pytest.mark.parametrize("lost", ["away", "wiped"])
async def test_a_conductor_needs_no_registry_for_what_it_began_itself(lost: str) -> None:
    """Found by the fault harness: the answer was begun again under a number that was in use."""
    async with site(ANSWER) as place:
        client = Client(question())
        other = Client(client.ask)
        reading = asyncio.create_task(client.read(place.conductors[0]))
        await has(client, 4)
        place.registry.down = lost == "away"
        place.registry.wipe()
        other.token, other.deltas = client.token, list(client.deltas)
        await other.read(place.conductors[0])
        assert (other.tokens(), other.ends()) == (list(ANSWER), ["stop"])
        with pytest.raises(TakenOver):
            await reading
        assert len(place.all_tasks()) == 1


@virtual_time
async def test_records_that_have_run_out_are_forgotten() -> None:
    server = RegistryServer()
    records = Records(MemoryRegistry(server, "c"), "life")
    place = AnswerPlace(AttemptId("r.0"), Peer("d", "i", "d:1"))
    telling = asyncio.create_task(records.run())
    for number in range(3 * FEW):
        records.note(f"r{number}", (place,), ttl_s=10.0)
        await asyncio.sleep(0.1)
    server.wipe()
    assert 99 <= len(records) <= FEW + 1
    records.tell_again()
    await settle(500)
    assert len(server.requests.live()) == 99
    telling.cancel()
    await asyncio.gather(telling, return_exceptions=True)


@virtual_time
async def test_without_a_registry_it_is_made_again() -> None:
    async with site(ANSWER) as place:
        alone = await place.add_conductor(registry=False)
        client = Client(question(seed=3))
        await lose_conductor(place, client, 4)
        await client.read(alone)
        assert (client.tokens(), client.ends()) == (list(ANSWER), ["stop"])


async def refused(place: Site, ask: Ask, token: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await place.conductors[1].prepare(ask, "test", resume_token=token)
    assert caught.value.param == "Last-Event-ID"
    return caught.value.message


@virtual_time
async def test_tokens_of_others_and_nonsense_are_refused() -> None:
    async with site(ANSWER) as place:
        client = Client(question(seed=3))
        await client.read(place.conductors[0])
        token = client.token
        assert token is not None
        for other in (question("other", seed=3), question(seed=4), question(), question(n=2)):
            assert "same body" in await refused(place, other, token)
        salted = Ask("tiny", ("what",), client.ask.options, cache_salt="x", default_max_tokens=100)
        assert "same body" in await refused(place, salted, token)
        key, seed, _ = token.rsplit(":", 2)
        assert "same body" in await refused(place, client.ask, f"{key}:{seed}:1.1")
        for nonsense in ("", "x", token + "x", token[1:] + ":", f"{key}:{seed}:", "é" * 9):
            assert "not the id" in await refused(place, client.ask, nonsense)


def test_a_token_says_what_it_was_made_from() -> None:
    ask = question()
    key = f"my:request~0123456789ab.{digest_of(ask)}"
    point = parse_token(f"{key}:1f:12.7e.0")
    assert (point.key, point.seed) == (key, 31)
    assert point.sent == (Sent(12), Sent(7, ended=True), Sent(0))


@virtual_time
async def test_a_request_id_is_its_own_when_it_comes_back() -> None:
    async with site(ANSWER) as place:
        ask = Ask("tiny", ("x",), Options(), request_id="mine:1", default_max_tokens=100)
        client = Client(ask)
        await lose_conductor(place, client, 4)
        await client.read(place.conductors[1])
        assert client.tokens() == list(ANSWER)
        before, timeline = (each.traces.get("mine:1") for each in place.conductors[:2])
        assert before is not None
        assert timeline is not None
        first, second = before.tracing.context, timeline.tracing.context
        assert (first.trace_id, first.sampled) == (second.trace_id, second.sampled)
        assert first.span_id != second.span_id
        (attempt,) = timeline_json(timeline, now_s=0.0)["attempts"]
        assert attempt["reasons"] == ["another conductor began it, or an earlier connection"]
        with pytest.raises(BatonError):
            await place.conductors[1].prepare(ask, "test", resume_token="mine:1")
