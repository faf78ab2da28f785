"""What a cache without bounds that the whole cluster shares would have found of each prompt."""

from __future__ import annotations

from collections.abc import Sequence

from baton.hashing import block_keys, root_key


class InfiniteCache:
    """Counts as cached whatever a request sent earlier had in its prompt, whether or not that has
    been computed by then, and every answer that has ended: an upper bound for any real cache.

    Like the engine's, it finds full blocks only, and never the last token of a prompt.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._root = root_key("ideal", "", block_size)
        self._seen: set[bytes] = set()

    def expect(self, prompt: Sequence[int]) -> int:
        """Tokens that would be found; from now on the whole prompt is known."""
        keys = block_keys(self._root, prompt, self._block_size)
        found = 0
        for key in keys[: (len(prompt) - 1) // self._block_size]:
            if key not in self._seen:
                break
            found += self._block_size
        self._seen.update(keys)
        return found

    def learn(self, context: Sequence[int]) -> None:
        """An answer has ended; the KV of its last token is never computed."""
        self._seen.update(block_keys(self._root, context[:-1], self._block_size))
