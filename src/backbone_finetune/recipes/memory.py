"""Memory that is freed on the CPU, and needed again in the next batch."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Keep freed memory in this process, for the next batch; return whether this machine's ``malloc`` can.

    By default, glibc returns a block of more than 32 MiB to the system when it is freed, and smaller ones at the end of
    its heap. Activations of a batch are such blocks, so each batch on the CPU gets pages that the system must find and
    clear again. Afterwards, the process keeps as much memory as it ever needed at once, until it ends, and so does each
    DataLoader worker that it forks. The setting is of the whole process, so the command line calls this, and functions
    of this library do not. GPU memory is not concerned.

    >>> keep_freed_memory() == (sys.platform == "linux")  # with glibc
    True

    The parameters are those of mallopt(3). PyTorch's performance tuning guide has jemalloc and TCMalloc for the same.

    Returns:
        True on Linux with glibc, else False.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
