"""What glibc does with memory that a pass has freed. Elsewhere (musl, macOS) nothing here does anything."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of <malloc.h>
KEPT = 2**30  # bytes of memory that is free at the end of the heap
ON_ITS_OWN = 2**25  # bytes: what is as large is mapped, and unmapped when it is freed; glibc allows no more


def keep() -> bool:
    """Keep what a pass frees for the next one. Whether that could be asked for.

    By itself glibc hands the end of the heap back to the kernel when it is some tens of MiB, and a wide pass on a
    processor, which allocates more, gets it back page by page: thousands of page faults, a tenth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(TRIM_THRESHOLD, KEPT) and mallopt(MMAP_THRESHOLD, ON_ITS_OWN))


def give_back() -> None:
    """What is free now, to the kernel: a model has gone."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
