"""What the soak reads from the kernel."""

from __future__ import annotations

import os

from bench.soak.watch import look, sizes

HEAP = """\
7f00a0000000-7f00a0400000 rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                3000 kB
Pss:                3000 kB
Anonymous:          2900 kB
7f00a0400000-7f00a4000000 ---p 00000000 00:00 0
Rss:                   0 kB
Pss:                   0 kB
Anonymous:             0 kB
"""
POOL = """\
7f00b0000000-7f00b3000000 rw-p 00000000 00:00 0
Rss:               49152 kB
Pss:               49152 kB
Anonymous:         49152 kB
"""
LIBRARY = """\
7f00c0000000-7f00c0100000 r-xp 00000000 08:01 1 /lib/x86_64-linux-gnu/libc.so.6
Rss:                1000 kB
Pss:                  10 kB
Anonymous:             0 kB
"""


def test_arenas_are_told_from_pools_and_libraries() -> None:
    found = sizes(HEAP + POOL + LIBRARY)
    assert found == {"Rss": 53152, "Pss": 52162, "Anonymous": 52052, "arenas": 2900}
    assert sizes(POOL + LIBRARY)["arenas"] == 0


def test_a_look_at_this_process() -> None:
    sample = look(os.getpid(), 1.0)
    assert sample.rss >= sample.anonymous > 0
    assert sample.anonymous >= sample.arenas
    assert sample.fds > 2
