"""Setting of the C library's memory allocator for training on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys

LARGE = 1 << 20
"""Size in bytes from which a block of memory gets a mapping of its own, which is given back when it is freed."""

M_MMAP_THRESHOLD = -3  # of malloc.h


def give_back_large_blocks() -> bool:
    """Makes glibc give large blocks of memory back to the system as soon as they are freed.

    By default glibc raises the size of such blocks up to 32 MiB as a program frees larger ones, and takes smaller ones
    from its heap. There an aligned block, as every tensor's is, does not fit into the hole that another one of its size
    has left (glibc before 2.38), so that a backward pass needs up to twice the memory of its tensors, and keeps it. On
    rows of 350 tokens SmolLM2-135M with adapters took 3.3 GB in place of 1.7, for 5 to 10 % less processor time.

    Nothing is changed where the variable ``MALLOC_MMAP_THRESHOLD_`` is set, or on another C library.

    Returns:
        True if it was changed.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, LARGE))
