"""What must be set before JAX starts: the C library's allocator, on CPU under Linux."""

import os
import platform
import sys

# glibc returns buffers above 128 KiB to the system after every use, so each step pays their page
# faults again: a quarter of a ConvNeXt step on CPU. These keep them, on huge pages.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def keep_large_buffers() -> None:
    """Starts this very command again with `ALLOCATOR` in its environment.

    glibc reads them once, when the process starts. Nothing happens where any of them is set,
    elsewhere than under glibc, or with `JAXROBUST_ALLOCATOR=system`.
    """
    if (
        platform.libc_ver()[0] != "glibc"
        or os.environ.get("JAXROBUST_ALLOCATOR") == "system"
        or any(name in os.environ for name in ALLOCATOR)
    ):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ALLOCATOR)
