"""A process group of one process for vLLM, separate from the trainer's ``torch.distributed``.

vLLM builds its groups from the default process group of ``torch.distributed``. If there is none, it makes one;
otherwise it uses the trainer's, with the ranks of other processes. Neither fits an engine in each rank of a training
job: the trainer would find a world of one process, or all ranks would have to make, reload and close their engines in
step. So vLLM gets process-group bookkeeping of its own while it starts. Afterwards it needs none: with one process,
every collective of vLLM is the identity.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

_lock = threading.Lock()


@dataclass
class _World:
    """Empty bookkeeping of process groups, in place of torch's ``distributed_c10d._World``, which may be replaced."""

    default_pg: ProcessGroup | None = None
    pg_map: dict[ProcessGroup, Any] = field(default_factory=dict)
    pg_names: dict[ProcessGroup, str] = field(default_factory=dict)
    pg_group_ranks: dict[ProcessGroup, dict[int, int]] = field(default_factory=dict)
    pg_backend_config: dict[ProcessGroup, str] = field(default_factory=dict)
    pg_coalesce_state: dict[ProcessGroup, list[Any]] = field(default_factory=dict)
    pg_to_tag: dict[ProcessGroup, str] = field(default_factory=dict)
    tags_to_pg: dict[str, list[ProcessGroup]] = field(default_factory=dict)
    comms: list[Any] = field(default_factory=list)
    group_count: int = 1 << 20  # groups are named by these numbers, and a name is unique in the process


_engine_world = _World()  # vLLM keeps its groups in module globals, so all engines of a process share them


@contextmanager
def engine_world() -> Iterator[None]:
    """Gives ``torch.distributed`` the engines' world of one process inside the block, and the trainer's afterwards."""
    with _lock:
        trainer_world, init_method, excepthook = c10d._world, c10d._default_pg_init_method, sys.excepthook
        c10d._world = _engine_world  # type: ignore[assignment]
        try:
            yield
        finally:
            c10d._world, c10d._default_pg_init_method = trainer_world, init_method
            c10d._update_default_pg(trainer_world.default_pg)
            sys.excepthook = excepthook  # making a default group prefixes tracebacks with its rank
