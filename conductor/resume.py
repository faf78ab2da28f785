"""Where a client is in its answers: a token with every event, which any conductor can go on from.

    KEY:SEED:COUNTS        cmpl-3f0c….9a41…:1f:12.7e

KEY begins the ids of the request's attempts and ends with a digest of what was asked, so that
nobody reaches an answer without knowing its question. SEED (hexadecimal) may have been drawn here.
COUNTS are the tokens of each answer that were passed on; `e` marks those whose end was.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import orjson

from baton.errors import InvalidRequest
from conductor.answer_run import Delta
from conductor.request import Ask, Request, Sent

PARAM = "Last-Event-ID"
_TOKEN = re.compile(
    r"(?P<key>[A-Za-z0-9][A-Za-z0-9._:~-]{0,200}\.[0-9a-f]{16})"
    r":(?P<seed>[0-9a-f]{1,16})"
    r":(?P<counts>[0-9]{1,9}e?(?:\.[0-9]{1,9}e?)*)"
)


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A token, taken apart. `sent` has an entry for each answer."""

    key: str
    seed: int
    sent: tuple[Sent, ...]


def parse_token(text: str) -> ResumePoint:
    """Raises InvalidRequest."""
    match = _TOKEN.fullmatch(text)
    if match is None:
        raise InvalidRequest(
            "this is not the id of an event of ours: send the last one that came, as it is",
            param=PARAM,
        )
    sent = tuple(
        Sent(int(count.rstrip("e")), ended=count.endswith("e"))
        for count in match["counts"].split(".")
    )
    return ResumePoint(match["key"], int(match["seed"], 16), sent)


def check_token(point: ResumePoint, ask: Ask, answers: int) -> None:
    """Raises InvalidRequest when the token belongs to another request than this one."""
    if not point.key.endswith(f".{digest_of(ask)}") or len(point.sent) != answers:
        raise InvalidRequest(
            "the event id belongs to another request: send the same body as the first time",
            param=PARAM,
        )


def digest_of(ask: Ask) -> str:
    """16 hexadecimal digits of everything that was asked, cache_salt included."""
    asked = orjson.dumps(ask, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(asked, digest_size=8).hexdigest()


class Bookmark:
    """The token of one stream, as it goes on."""

    def __init__(self, request: Request) -> None:
        sent = [request.sent_of(answer.index) for answer in request.answers]
        self._start = f"{request.key}:{request.answers[0].sampling.seed:x}:"
        self._tokens = [each.tokens for each in sent]
        self._counts = [str(each) for each in sent]

    def note(self, delta: Delta) -> None:
        """The client gets this next. Called for every token: as cheap as it can be."""
        index = delta.index
        self._tokens[index] += len(delta.tokens)
        end = "e" if delta.finish_reason else ""
        self._counts[index] = f"{self._tokens[index]}{end}"

    @property
    def token(self) -> str:
        return self._start + ".".join(self._counts)
