"""Chat examples: an instruction from a function's docstring or name, answered by its source."""

from __future__ import annotations

import ast
import random
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from .tokenizer import ASSISTANT, END, SYSTEM, USER

MIN_LINES, MAX_LINES, MAX_CHARS = 2, 32, 1400
SYSTEM_SHARE = 0.2
TURNS, TURN_WEIGHTS = (1, 2, 3), (0.75, 0.17, 0.08)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that writes Python.",
    "Answer with Python code.",
    "You write short Python functions.",
)
# Docstrings that open with one of these become "a function that <verb>s ..." more often than not.
VERBS = frozenset(
    """return get set create read write compute parse convert find check add remove make build print
    open close send load test split join copy run start stop format replace generate determine
    display handle encode decode extract calculate update call raise yield list delete
    insert initialize construct wait connect register save search sort compare merge count
    """.split()  # noqa: SIM905 - sixty quoted words would hide the list
)


@dataclass(frozen=True)
class Exchange:
    """One instruction with its answer."""

    instruction: str
    answer: str


def render(exchanges: list[Exchange], system: str | None = None) -> str:
    """The conversation as the model sees it; equals what the chat template renders."""
    parts = [] if system is None else [f"{SYSTEM}{system}{END}"]
    for exchange in exchanges:
        parts.append(f"{USER}{exchange.instruction}{END}{ASSISTANT}{exchange.answer}{END}")
    return "".join(parts)


def conversations(source: str, rng: random.Random) -> list[str]:
    """Rendered conversations of one to three turns from the functions of one source file."""
    exchanges = [
        Exchange(_instruction(function, rng), answer) for function, answer in _functions(source)
    ]
    rendered: list[str] = []
    while exchanges:
        turns = rng.choices(TURNS, TURN_WEIGHTS)[0]
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < SYSTEM_SHARE else None
        rendered.append(render(exchanges[:turns], system))
        exchanges = exchanges[turns:]
    return rendered


def _functions(source: str) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Functions and methods of a useful size, each with its source moved to the left margin."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith(("__", "test", "do_")):
            continue
        answer = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        fits = MIN_LINES <= answer.count("\n") + 1 <= MAX_LINES and len(answer) <= MAX_CHARS
        if fits and answer.startswith("def ") and _parses(answer):
            yield node, answer


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _instruction(function: ast.FunctionDef, rng: random.Random) -> str:
    sentence = _first_sentence(ast.get_docstring(function) or "")
    if not sentence:
        return _from_name(function, rng)
    verb, _, rest = sentence.partition(" ")
    stem = verb.lower().removesuffix("s")
    if stem in VERBS and rest and rng.random() < 0.6:
        third = stem + ("es" if stem.endswith(("s", "sh", "ch", "x")) else "s")
        return rng.choice(
            (
                f"Write a function that {third} {rest}",
                f"Write a Python function that {third} {rest}",
                f"Write a function to {stem} {rest}",
                f"Write a Python function named {function.name} that {third} {rest}",
            )
        )
    return rng.choice(
        (
            sentence,
            f"Write a Python function. {sentence}",
            f"Write a function named {function.name}. {sentence}",
            f"Write a function {function.name}({_arguments(function)}): {sentence}",
        )
    )


def _from_name(function: ast.FunctionDef, rng: random.Random) -> str:
    words = function.name.strip("_").replace("_", " ")
    return rng.choice(
        (
            f"Write a function named {function.name}.",
            f"Write a Python function called {function.name}.",
            f"Implement {function.name}({_arguments(function)}).",
            f"Write a function to {words}.",
            f"Write a function for {words}.",
        )
    )


def _arguments(function: ast.FunctionDef) -> str:
    return ", ".join(argument.arg for argument in function.args.args)


def _first_sentence(docstring: str) -> str:
    """The first sentence on one line, or "" where there is none of a sensible length."""
    paragraph = docstring.strip().split("\n\n")[0]
    sentence = re.split(r"(?<=[.!?])\s", " ".join(paragraph.split()))[0]
    return sentence if 8 <= len(sentence) <= 200 else ""
