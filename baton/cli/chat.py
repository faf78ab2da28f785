"""`baton chat`: talk with the model."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import typer

from baton.cli.generate import print_answer
from baton.cli.options import CaFile, Url, connect
from baton.client.http import DEFAULT_URL, Client, Prompt
from baton.errors import BatonError

_HELP = "/reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D ends it"


@dataclass(slots=True)
class _Conversation:
    client: Client
    first: tuple[Mapping[str, str], ...]
    max_tokens: int
    temperature: float
    timing: bool
    messages: list[Mapping[str, str]] = field(default_factory=list)

    async def turn(self, text: str) -> None:
        """One question and its streamed answer. A turn that fails leaves no trace."""
        question = {"role": "user", "content": text}
        prompt = Prompt(
            (*self.first, *self.messages, question),
            max_tokens=self.max_tokens,
            chat=True,
            options={"temperature": self.temperature},
        )
        answer = await print_answer(self.client, prompt, self.timing)
        self.messages += [question, {"role": "assistant", "content": answer.text}]


def chat(
    url: Url = DEFAULT_URL,
    system: Annotated[str | None, typer.Option(help="What the model should be.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Length of each answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 = always the likeliest token.")] = 0.7,
    timing: Annotated[bool, typer.Option("--timing", help="TTFT, TPOT, tokens/s.")] = False,
    ca_file: CaFile = "",
) -> None:
    """Talk with the model; the conversation is kept in memory."""
    first = ({"role": "system", "content": system},) if system else ()
    # Input is read while the loop stands still, so that Ctrl-C and Ctrl-D work at the prompt.
    with asyncio.Runner() as runner:
        client = runner.run(_open(url, ca_file))
        try:
            _converse(runner, _Conversation(client, first, max_tokens, temperature, timing))
        finally:
            runner.run(client.close())


async def _open(url: str, ca_file: str) -> Client:
    client = connect(url, ca_file)
    try:
        model = await client.default_model()
    except BaseException:
        await client.close()
        raise
    sys.stderr.write(f"{model} at {url}: {_HELP}\n")
    return client


def _converse(runner: asyncio.Runner, conversation: _Conversation) -> None:
    while (text := _read()) is not None:
        if text == "/reset":
            conversation.messages.clear()
        elif text:
            try:
                runner.run(conversation.turn(text))
            except BatonError as error:  # one failed turn does not end the conversation
                sys.stderr.write(f"baton: {error.message}\n")
            except KeyboardInterrupt:
                sys.stderr.write("(stopped)\n")


def _read() -> str | None:
    """The user's next line; None at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        sys.stderr.write("\n")
        return None
