"""From logits to tokens, for a batch whose rows may all want something else.

Order, as in Hugging Face's processors: penalties, logit bias, `min_tokens` mask, temperature,
top-k, top-p, min-p. Randomness is a hash of (seed, output index, token id), so a row's token
depends on nothing but its own logits and parameters: neither on its neighbours, nor on the process
that computes it, nor on what was sampled before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from baton.engine.batch import SampleRequest
from baton.errors import InternalError
from baton.kernels.noise import stream_start, uniform
from baton.types.request import SampledToken, SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow float32 (as in vLLM)."""

_CANDIDATES = 1024
"""Tokens that top-p looks at first. Sorting a whole vocabulary costs ten times as much and is only
needed for distributions so flat that these do not reach the mass."""


NOT_FINITE = "the model produced logits that are not finite (NaN or infinity)"


def sample(
    logits: torch.Tensor, requests: Sequence[SampleRequest], best: Sequence[int] | None = None
) -> list[SampledToken]:
    """One token per row of `logits` `[rows, vocab]` float32. Does not modify `logits`.

    `best` are the rows' first greatest, from a decoder that has found them on its way, and whose
    logits are finite. Raises InternalError when a row holds NaN or its best logit is not finite.
    """
    if not requests:
        return []
    adjusted = _adjust(logits, requests)
    if best is None or adjusted is not logits:
        best = _finite_argmax(adjusted)
    tokens = list(best)
    random_rows = [row for row, request in enumerate(requests) if not _is_greedy(request.params)]
    if random_rows:
        drawn = _draw(adjusted[random_rows], [requests[row] for row in random_rows])
        for row, token in zip(random_rows, drawn, strict=True):
            tokens[row] = token
    logprobs = dict(_logprobs(logits, requests, tokens))
    return [
        SampledToken(token, request.index, logprobs.get(row))
        for row, (token, request) in enumerate(zip(tokens, requests, strict=True))
    ]


def _finite_argmax(scores: torch.Tensor) -> list[int]:
    best = _argmax(scores)
    if not bool(scores.gather(1, best[:, None]).isfinite().all()):
        raise InternalError(NOT_FINITE)
    tokens: list[int] = best.tolist()
    return tokens


def wants_best(request: SampleRequest) -> bool:
    """Whether the greatest logit decides alone, and nobody wants to know probabilities."""
    params = request.params
    return _is_greedy(params) and params.logprobs is None and not _is_adjusted(request)


def is_plain(request: SampleRequest) -> bool:
    """Whether the kernel `choose` samples the row as `sample` does: greedy, or by temperature
    alone, and nobody wants to know probabilities."""
    params = request.params
    filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return (
        params.logprobs is None
        and not _is_adjusted(request)
        and (_is_greedy(params) or not filtered)
    )


def noise_of(request: SampleRequest | None) -> tuple[int, float]:
    """What the kernel `choose` takes for a row: start of its noise, and temperature (0: greedy, and
    for rows whose token nobody wants)."""
    if request is None or _is_greedy(request.params):
        return 0, 0.0
    return stream_start(request.params.seed, request.index), request.params.temperature


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW


def _adjust(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> torch.Tensor:
    """Penalties, logit bias and the `min_tokens` mask; `logits` itself when no row has any."""
    rows = [row for row, request in enumerate(requests) if _is_adjusted(request)]
    if not rows:
        return logits
    adjusted = logits.clone()
    for row in rows:
        _adjust_row(adjusted[row], requests[row])
    return adjusted


def _is_adjusted(request: SampleRequest) -> bool:
    params = request.params
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or request.index < params.min_tokens
    )


def _adjust_row(row: torch.Tensor, request: SampleRequest) -> None:
    """In place, on `[vocab]`."""
    params = request.params
    if params.repetition_penalty != 1.0 and (request.prompt or request.output):
        seen = _ids(sorted({*request.prompt, *request.output}), row)
        values = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and request.output:
        said, counts = torch.unique(_ids(request.output, row), return_counts=True)
        row[said] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias:
        row[token] += bias
    if request.index < params.min_tokens and request.stop_ids:
        row[_ids(request.stop_ids, row)] = -torch.inf


def _ids(tokens: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=like.device)


def _draw(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> list[int]:
    """A token per row from its filtered distribution, by the Gumbel-max trick: the best of
    log-probability plus noise (Maddison, Tarlow and Minka, NeurIPS'14, section 2).

    Inverting the cumulative sum would need one number instead of a whole row, but then a rounding
    difference moves each of the vocabulary's boundaries, and two workers that computed the same
    logits in other batches disagree now and then (seen: one token of 1,248). Here only the two best
    scores can trade places. Noise is made for the tokens that the filters leave and no others.
    """
    params = [request.params for request in requests]
    scores = logits / torch.tensor([p.temperature for p in params], device=logits.device)[:, None]
    kept = dict(_kept(scores, params))
    everything = torch.arange(logits.shape[-1], device=logits.device)
    drawn = []
    for row, request in enumerate(requests):
        tokens = kept.get(row, everything)
        start = stream_start(request.params.seed, request.index)
        noise = uniform(start, tokens).log_().neg_().log_()
        drawn.append(int(tokens[_argmax(scores[row, tokens] - noise)]))
    return drawn


def _kept(
    scores: torch.Tensor, params: Sequence[SamplingParams]
) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows that have filters, and the tokens that pass them, ascending."""
    rows = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
    if rows:
        probs = scores[rows].softmax(dim=-1)
        thresholds = _thresholds(probs, [params[row] for row in rows])
        for row, of_row, threshold in zip(rows, probs, thresholds, strict=True):
            yield row, (of_row >= threshold).nonzero()[:, 0]


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """Where the last dimension is greatest: first on ties; a NaN is the greatest. On the CPU by
    numpy, which takes a twentieth of torch's time."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.asarray(scores.numpy().argmax(axis=-1)))
    return scores.argmax(dim=-1)


def _thresholds(probs: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The least probability that each row keeps, `[rows]`: the strictest of top-k, top-p, min-p.

    Tokens with exactly the same probability are kept or dropped together, so no order among them
    has to be invented.
    """
    vocab = probs.shape[-1]
    width = min(vocab, max(map(_width, params)))
    ranked = probs.topk(width, dim=-1).values
    thresholds = []
    for row, p in enumerate(params):
        best = ranked[row]
        threshold = p.min_p * best[0]
        if 0 < p.top_k < vocab:
            threshold = threshold.maximum(best[p.top_k - 1])
        if p.top_p < 1:
            threshold = threshold.maximum(_nucleus(probs[row], best, p))
        thresholds.append(threshold)
    return torch.stack(thresholds)


def _width(params: SamplingParams) -> int:
    """How many of the best tokens decide a row's threshold."""
    if params.top_k > 0:
        return params.top_k
    return _CANDIDATES if params.top_p < 1 else 1


def _nucleus(probs: torch.Tensor, ranked: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The probability of the last token of the smallest set that reaches `top_p`, counted over
    what top-k leaves (arXiv:1904.09751). `ranked` are the best of `probs`, descending."""
    if 0 < params.top_k < len(probs):
        ranked = ranked[: params.top_k]
        wanted = params.top_p * ranked.sum(dtype=torch.float64)
    else:
        wanted = params.top_p * probs.sum(dtype=torch.float64)
    mass = ranked.cumsum(dim=-1, dtype=torch.float64)
    if mass[-1] < wanted and len(ranked) < len(probs) and not params.top_k:
        ranked = probs.sort(descending=True).values
        mass = ranked.cumsum(dim=-1, dtype=torch.float64)
    position = torch.searchsorted(mass, wanted).clamp(max=len(ranked) - 1)
    return ranked[position]


def _logprobs(
    logits: torch.Tensor, requests: Sequence[SampleRequest], tokens: Sequence[int]
) -> Iterator[tuple[int, TokenLogprob]]:
    """Row number and logprob of the rows that asked, under the model's own distribution."""
    for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
        count = request.params.logprobs
        if count is not None:
            values = logits[row].log_softmax(dim=-1)
            yield row, TokenLogprob(float(values[token]), _best(values, count))


def _best(values: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` greatest of `[vocab]` with their ids, best first, lower ids first on ties."""
    count = min(count, len(values))
    if count == 0:
        return ()
    least = values.topk(count).values[-1]
    ids = (values >= least).nonzero()[:, 0]  # ascending
    ranked, order = values[ids].sort(descending=True, stable=True)
    return tuple(zip(ids[order[:count]].tolist(), ranked[:count].tolist(), strict=True))
