"""Memory of this process: how much it took, and large blocks given back when they are freed."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress

from qexport.errors import QexportError
from qexport.safe_io import read_text

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)
_BLOCK = 4 << 20  # bytes; smaller ones come and go by the thousand, and a mapping of its own costs each its page faults


def return_freed_blocks() -> bool:
    """Let every block of 4 MiB or more be a mapping of its own; whether the C library could be told.

    Weights come and go in a build. glibc keeps what was freed, up to 32 MiB a block, in a heap full of holes: a
    twentieth of the peak of a build. For processes that are ours; a service decides for itself.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _BLOCK) == 1)
    except (OSError, AttributeError):
        return False


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    with suppress(QexportError):  # Linux alone has it; what getrusage tells may be the parent's
        for line in read_text("/proc/self/status").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
