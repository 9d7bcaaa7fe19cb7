"""A world of one process for vLLM, apart from the trainer's ``torch.distributed``.

vLLM builds its groups from the default process group of ``torch.distributed``: it makes one where there is none, and
otherwise takes the trainer's, ranks of other processes included. Neither fits an engine in each rank of a training job:
the trainer would find a world of one process, or all ranks would have to make, reload and close their engines in step.
So vLLM is shown process-group bookkeeping of its own while it starts. Afterwards it needs none: with one process every
collective of its own is the identity.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import distributed_c10d as c10d

_lock = threading.Lock()


class _World(c10d._World):
    """The bookkeeping of process groups, empty. torch shares the maps between instances; here each has its own."""

    pg_map = pg_names = pg_group_ranks = pg_backend_config = tags_to_pg = pg_to_tag = {}
    group_count = 0

    def __init__(self) -> None:
        super().__init__()
        self.pg_map, self.pg_names, self.pg_group_ranks = {}, {}, {}
        self.pg_backend_config, self.tags_to_pg, self.pg_to_tag = {}, {}, {}
        self.group_count = 1 << 20  # names of groups are these numbers, and unique in the process


_engine_world = _World()  # vLLM keeps its groups in module globals, so all engines of a process share them


@contextmanager
def engine_world() -> Iterator[None]:
    """Within it, ``torch.distributed`` is the engines' world of one process; afterwards the trainer's is as it was."""
    with _lock:
        trainer_world, init_method, excepthook = c10d._world, c10d._default_pg_init_method, sys.excepthook
        c10d._world = _engine_world
        try:
            yield
        finally:
            c10d._world, c10d._default_pg_init_method = trainer_world, init_method
            c10d._update_default_pg(trainer_world.default_pg)
            sys.excepthook = excepthook  # making a default group prefixes tracebacks with its rank
