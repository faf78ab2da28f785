"""The command line of a member of the fleet: a store, or one of the three programs of workers.

torch takes seconds to import, so that this module does without: what can fail cheaply fails before,
and the parent is watched meanwhile.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from baton.config import parse_config
from baton.cpus import choose_placement
from baton.errors import ConfigError
from baton.types.fleet import Role
from baton.worker.config import WorkerConfig
from baton.worker.lifecycle import watch_parent
from baton.worker.member_options import MemberOptions

if TYPE_CHECKING:
    from baton.worker.lives import Make

OptionsT = TypeVar("OptionsT", bound=MemberOptions)
ConfigT = TypeVar("ConfigT", bound=WorkerConfig)


def start(
    kind: type[ConfigT],
    program: str,
    first_role: Callable[[ConfigT], Role],
    makes: Callable[[], Mapping[Role, Make]],
) -> None:
    """Run the worker that the command line describes and end the process. `makes` imports what it
    can be and is called late. Exits with 2 and a sentence when the configuration is wrong."""
    config = configured(kind, program)
    with _said_and_ended():
        placement = choose_placement(config.cpus, config.threads)
    placement.apply()
    from baton.worker.process import main

    main(config, first_role(config), makes())


def configured(kind: type[OptionsT], program: str) -> OptionsT:
    """What was asked for; from now on the process ends with its parent, if that was, too. Exits
    with 2 and a sentence when the configuration is wrong."""
    with _said_and_ended():
        options = parse_config(kind, sys.argv[1:], os.environ, program)
    if options.exit_with_parent:
        watch_parent()
    return options


@contextmanager
def _said_and_ended() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        sys.stderr.write(f"error: {error.message}\n")
        sys.exit(2)
