"""Give freed memory back to the system: after a tier is loaded and packed, and between the stages of a build."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def release_memory() -> None:
    """Collect reference cycles (modules hold some) and return free heap pages to the system where glibc can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # elsewhere only the figure for peak memory is larger
        ctypes.CDLL("libc.so.6").malloc_trim(0)
