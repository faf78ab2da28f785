"""Clients: each sends one request to the conductor and writes down what comes back."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.errors import BatonError
from conductor.dispatch import Usage
from conductor.request import Ask, Options
from sim.cluster import MODEL, HostedConductor, token_text
from sim.log import EventLog
from sim.plan import Client

CONDUCTOR_LOST = "conductor_lost"  # the code of a request whose connection broke


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
    tired: asyncio.Event = field(default_factory=asyncio.Event)  # the client goes away now

    def note_progress(self) -> None:
        patience = self.client.cancel_after
        if patience is not None and len(self.tokens) >= patience:
            self.tired.set()


async def ask(story: Story, conductor: HostedConductor, log: EventLog) -> None:
    """Runs as the conductor's process, like the handler of an HTTP request."""
    client = story.client
    options = Options(
        temperature=client.sampling.temperature,
        seed=client.sampling.seed,
        max_tokens=client.sampling.max_tokens,
    )
    wanted = Ask(MODEL, (client.prompt,), options, client.name, cache_salt=client.salt)
    service = conductor.service
    story.note_progress()
    try:
        request = await service.prepare(wanted, "sim", client.deadline_s)
        async with aclosing(service.generate(request)) as answer:
            async for part in answer:
                if isinstance(part, Usage):
                    story.usage = part
                    continue
                for delta in part:
                    log.note(client.name, "gets", delta.tokens)
                    story.tokens += [token.token_id for token in delta.tokens]
                    story.text += delta.text
                    if delta.finish_reason is not None:
                        story.ends += 1
                        story.finish_reason = delta.finish_reason
                story.note_progress()
        _end(story, "ok", "", log)
    except BatonError as error:
        story.ends += 1
        _end(story, error.code, error.message, log)
    except asyncio.CancelledError:
        _end(story, "cancelled", "", log)
        raise


def _end(story: Story, code: str, message: str, log: EventLog) -> None:
    story.code, story.message = code, message
    log.note(story.client.name, "ends", f"{code} {message}")


def right_text(tokens: list[int]) -> str:
    return "".join(token_text(token) for token in tokens)
