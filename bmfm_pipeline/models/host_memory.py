"""Memory of the host between training steps."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of the GNU C library
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep what a step frees for the next, instead of returning it and having it zeroed again page by page.

    By default every tensor of more than 32 MB is returned. Holds for the whole process; whether it could be set.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30) and mallopt(_TRIM_THRESHOLD, _MOST))
