"""The command line of a worker, for all three programs that are one.

torch takes seconds to import, so that this module does without: what can fail cheaply fails before,
and the parent is watched meanwhile.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from baton.config import parse_config
from baton.cpus import choose_placement
from baton.errors import ConfigError
from baton.types.fleet import Role
from baton.worker.config import WorkerConfig
from baton.worker.lifecycle import watch_parent

if TYPE_CHECKING:
    from baton.worker.lives import Make

ConfigT = TypeVar("ConfigT", bound=WorkerConfig)


def start(
    kind: type[ConfigT],
    program: str,
    first_role: Callable[[ConfigT], Role],
    makes: Callable[[], Mapping[Role, Make]],
) -> None:
    """Run the worker that the command line describes and end the process. `makes` imports what it
    can be and is called late. Exits with 2 and a sentence when the configuration is wrong."""
    try:
        config = parse_config(kind, sys.argv[1:], os.environ, program)
        placement = choose_placement(config.cpus, config.threads)
    except ConfigError as error:
        sys.stderr.write(f"error: {error.message}\n")
        sys.exit(2)
    if config.exit_with_parent:
        watch_parent()
    placement.apply()
    from baton.worker.process import main

    main(config, first_role(config), makes())
