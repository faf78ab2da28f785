"""Fields of request bodies: what they mean, and the ranges that `conductor.validate` checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baton.types.request import MAX_PIN_S
from conductor.validate import (
    LEAST_REPETITION_PENALTY,
    MAX_ANSWERS,
    MAX_LOGPROBS,
    MAX_SALT_LENGTH,
    MAX_STOP_TOKENS,
    REQUEST_ID,
)

Json = dict[str, Any]

_INT32 = 2**31
RANGES: Mapping[str, Json] = {
    "messages": {"minItems": 1},
    "max_tokens": {"minimum": 1, "maximum": _INT32 - 1},
    "max_completion_tokens": {"minimum": 1, "maximum": _INT32 - 1},
    "min_tokens": {"minimum": 0, "maximum": _INT32 - 1},
    "stop_token_ids": {"maxItems": MAX_STOP_TOKENS},
    "seed": {"minimum": -(2**63), "maximum": 2**64 - 1},
    "n": {"minimum": 1, "maximum": MAX_ANSWERS},
    "temperature": {"minimum": 0, "maximum": 2},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": _INT32 - 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"minimum": LEAST_REPETITION_PENALTY, "maximum": 100},
    "cache_salt": {"maxLength": MAX_SALT_LENGTH},
    "cache_pin_s": {"exclusiveMinimum": 0, "maximum": MAX_PIN_S},
    "priority": {"minimum": -_INT32, "maximum": _INT32 - 1},
    "request_id": {"pattern": f"^{REQUEST_ID}$"},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
}
NOTHING: Json = {
    "enum": [None, False, "", [], {}],
    "description": "Not supported: taken when its value asks for nothing.",
}
MEANINGS: Mapping[str, str] = {
    "model": "The served name.",
    "prompt": "A text, a list of token ids, or a list of either.",
    "messages": "The conversation, for the model's chat template.",
    "tokens": "Token ids.",
    "max_tokens": (
        "Tokens of an answer at most; left out: 16 in completions, the rest of the context in chat."
    ),
    "max_completion_tokens": "Another name of `max_tokens`.",
    "min_tokens": "No end of sequence and no stop token before that many.",
    "ignore_eos": "Go on to `max_tokens` behind the end of sequence.",
    "stop": "Texts that end the answer and are not part of it.",
    "stop_token_ids": "Tokens that end the answer.",
    "seed": "The same seed and request give the same tokens, on any cluster.",
    "n": "Answers for each prompt; answer i uses seed + i.",
    "temperature": "0 is greedy; left out: 1.",
    "top_p": "Draw from the likeliest tokens that together have this probability.",
    "top_k": "Draw from so many of the likeliest tokens; 0 and -1: from all.",
    "min_p": "Draw from tokens with at least this part of the likeliest one's probability.",
    "presence_penalty": "Taken from the logit of each token that the answer has.",
    "frequency_penalty": "The same, as often as the answer has it.",
    "repetition_penalty": (
        "Divides positive logits of what prompt and answer have, multiplies negative ones."
    ),
    "logit_bias": "Added to the logits of these token ids.",
    "logprobs": "Log-probabilities of its tokens; in completions: and of so many others.",
    "top_logprobs": "With `logprobs`: of that many others at each place.",
    "echo": "Not supported: taken when it is false.",
    "add_special_tokens": "Whether tokenizing adds those of the model; left out: true.",
    "skip_special_tokens": "Whether the answer's text leaves them out; left out: true.",
    "cache_salt": "Prompts share cached KV only with those of the same salt.",
    "cache_pin_s": "Seconds for which the store of the node keeps the prompt's KV.",
    "priority": "Lower runs first; left out: 0.",
    "request_id": "Chosen by the client, for `GET /trace`; left out: the server makes one.",
    "return_token_ids": "Choices also have `token_ids`, of every token that was generated.",
    "user": "Taken for compatibility; changes nothing.",
    "response_format": "Only text.",
    "stream": "Server-sent events instead of one reply.",
    "include_usage": "One more event at the end, with `usage`.",
    "continuous_usage_stats": "`usage` in every event.",
    "role": "Who said it.",
    "content": "A text, or parts that are texts; they are joined by line breaks.",
    "type": "Of the answer: only text.",
    "stream_options": "With `stream`: usage at the end, or in every event.",
}
