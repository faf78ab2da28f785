"""Command line: trains, exports, verifies against transformers, and writes the card."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .card import Card, Row, render_card
from .corpus import Pool, SourceFile, read_corpus, standard_library
from .dataset import Stream, WindowSampler, build_streams, find_splits
from .evaluate import HeldOut, figure, held_out_text, mean_loss, unigram_loss
from .export import export_model, export_tokenizer, write_card
from .network import Decoder, Shape
from .reporter import Reporter
from .schedule import Schedule
from .tokenizer import train_tokenizer
from .train import Counters, Trainer
from .verify import verify_export

QUICK_HELD_OUT_TOKENS = 60_000


@dataclass(frozen=True)
class Prepared:
    """Everything that follows from the standard library and the seed, before any training."""

    files: list[SourceFile]
    tokenizer: Tokenizer
    streams: dict[str, Stream]

    def held_out(self, pool: Pool) -> HeldOut:
        """The held-out files of one pool."""
        return held_out_text(self.tokenizer, [file for file in self.files if file.pool is pool])


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with Reporter() as reporter:
        prepared = _prepare(options.seed)
        export_tokenizer(prepared.tokenizer, Shape(), options.out)
        counts = {name: len(stream.ids) for name, stream in prepared.streams.items()}
        reporter.say(f"tokens: {counts}")
        model = Decoder(Shape())
        trainer = _trainer(prepared, model, options)
        if trainer.resume():
            reporter.say(f"resumed: {trainer.counters}")
        counters = trainer.run(reporter)
        export_model(model, prepared.tokenizer, options.out)
        reporter.say(f"largest difference to transformers: {verify_export(options.out):.2e}")
        card = _card(prepared, _rounded(model), counters, arguments)
        write_card(render_card(card, options.out), options.out)
        trainer.discard_checkpoint()
        for row in card.rows:
            reporter.say(f"{row.name}: {row.model}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.train_demo", description=__doc__)
    parser.add_argument("--tokens", type=float, default=60e6, help="tokens to train on")
    parser.add_argument("--minutes", type=float, default=85.0, help="time to end by at the latest")
    parser.add_argument(
        "--out", type=Path, default=Path("baton/demo/model"), help="model directory"
    )
    parser.add_argument("--checkpoints", type=Path, default=Path("build/demo"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="where there is no C++ compiler")
    return parser.parse_args(arguments)


def _prepare(seed: int) -> Prepared:
    files = read_corpus(standard_library())
    library = [f.text for f in files if f.pool is Pool.LIBRARY and not f.held_out]
    tokenizer = train_tokenizer(library, Shape().vocab_size)
    return Prepared(files, tokenizer, build_streams(tokenizer, files, seed))


def _trainer(prepared: Prepared, model: Decoder, options: argparse.Namespace) -> Trainer:
    held_out = prepared.held_out(Pool.LIBRARY)
    return Trainer(
        model,
        WindowSampler(prepared.streams, find_splits(prepared.tokenizer), options.seed),
        Schedule(int(options.tokens), options.minutes * 60),
        options.checkpoints,
        lambda model: mean_loss(model, held_out, QUICK_HELD_OUT_TOKENS),
        compiled=not options.no_compile,
    )


def _rounded(model: Decoder) -> Decoder:
    """The model with the bfloat16 weights that were exported."""
    rounded = Decoder(replace(model.shape, compute=torch.float32))
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    return rounded


def _card(prepared: Prepared, model: Decoder, counters: Counters, arguments: Sequence[str]) -> Card:
    names = {Pool.LIBRARY: "library modules", Pool.TESTS: "the library's test suite"}
    return Card(
        rows=[_row(name, pool, prepared, model) for pool, name in names.items()],
        python=platform.python_version(),
        parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=model.shape.vocab_size,
        training_tokens=counters.tokens,
        corpus_tokens={name: len(stream.ids) for name, stream in prepared.streams.items()},
        steps=counters.step,
        minutes=counters.seconds / 60,
        command=_command(arguments),
    )


def _row(name: str, pool: Pool, prepared: Prepared, model: Decoder) -> Row:
    text = prepared.held_out(pool)
    vocab_size = model.shape.vocab_size
    unigram = unigram_loss(prepared.streams[Pool.LIBRARY.value].ids, text, vocab_size)
    return Row(
        name=name,
        model=figure(mean_loss(model, text), text),
        unigram=figure(unigram, text),
        uniform=figure(math.log(vocab_size), text),
        tokens=text.tokens,
        files=len(text.documents),
    )


def _command(arguments: Sequence[str]) -> str:
    """The command without the options that only say where files go."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--out", "--checkpoints"):
            next(words, None)
        else:
            kept.append(word)
    return " ".join(["python -m tools.train_demo", *kept])


if __name__ == "__main__":
    main(sys.argv[1:])
