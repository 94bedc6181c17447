"""Tell the C library to keep what is freed: every training step frees and takes the same large
blocks again.
"""

import ctypes
import sys

# malloc.h's names for mallopt's parameters
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Stop glibc from giving freed blocks back to the kernel, which would fault them in again at
    every step.

    Returns whether it was done; other C libraries are left as they are. Peak memory does not
    change: what is kept is taken again by the next step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False  # not glibc
    return all(
        mallopt(parameter, value) == 1
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    )
