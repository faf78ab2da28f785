"""Clients: each sends one request to the conductor and writes down what comes back."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.errors import BatonError
from conductor.answer_run import Delta
from conductor.dispatch import Usage
from conductor.request import Ask, Options
from sim.cluster import MODEL, HostedConductor, token_text
from sim.log import EventLog
from sim.plan import CONDUCTOR, Client

# Codes of stories that end without a word of the cluster: the connection broke, nothing came for
# longer than the client's patience, or its deadline has passed.
CONDUCTOR_LOST = "conductor_lost"
SILENT = "silent"
NO_END = "no_end"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one connection of a client that reconnects ended."""

    client: Client
    conductor: str
    code: str
    began: float
    ended: float


@dataclass(slots=True)
class Story:
    """What one client saw. `code` is "ok", "cancelled" or an error's."""

    client: Client
    began: float
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None
    ends: int = 0  # terminal events
    code: str = ""
    message: str = ""
    ended: float = 0.0
    conductor: str = CONDUCTOR  # that was asked
    failures: list[Failure] = field(default_factory=list)  # in a row, since the last token
    silences: list[Failure] = field(default_factory=list)  # all of them
    tired: asyncio.Event = field(default_factory=asyncio.Event)  # the client goes away now

    def note_progress(self) -> None:
        patience = self.client.cancel_after
        if patience is not None and len(self.tokens) >= patience:
            self.tired.set()

    def hear(self, delta: Delta, log: EventLog) -> None:
        log.note(self.client.name, "gets", delta.tokens)
        self.tokens += [token.token_id for token in delta.tokens]
        self.text += delta.text
        if delta.finish_reason is not None:
            self.ends += 1
            self.finish_reason = delta.finish_reason


async def ask(story: Story, conductor: HostedConductor, log: EventLog) -> None:
    """Runs as the conductor's process, like the handler of an HTTP request."""
    service = conductor.service
    story.note_progress()
    try:
        wanted = wanted_by(story.client)
        request = await service.prepare(wanted, "sim", story.client.deadline_s)
        async with aclosing(service.generate(request)) as answer:
            async for part in answer:
                if isinstance(part, Usage):
                    story.usage = part
                    continue
                for delta in part:
                    story.hear(delta, log)
                story.note_progress()
        _end(story, "ok", "", log)
    except BatonError as error:
        story.ends += 1
        _end(story, error.code, error.message, log)
    except asyncio.CancelledError:
        _end(story, "cancelled", "", log)
        raise


def wanted_by(client: Client) -> Ask:
    options = Options(
        temperature=client.sampling.temperature,
        seed=client.sampling.seed,
        max_tokens=client.sampling.max_tokens,
    )
    return Ask(MODEL, (client.prompt,), options, client.name, cache_salt=client.salt)


def _end(story: Story, code: str, message: str, log: EventLog) -> None:
    story.code, story.message = code, message
    log.note(story.client.name, "ends", f"{code} {message}")


def right_text(tokens: list[int]) -> str:
    return "".join(token_text(token) for token in tokens)
