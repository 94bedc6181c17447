"""Make the C library keep freed memory.

Every training step frees large blocks and allocates blocks of the same sizes again.
"""

import ctypes
import sys

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed blocks to the kernel.

    The kernel would have to map and clear their pages again in every step. Returns whether this
    was set; C libraries other than glibc are left alone. Peak memory stays the same, since the
    next step uses the kept blocks.
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
