"""How the process treats memory that it has freed."""

import ctypes
import os
import platform

# malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_NEVER, _PADDING = -1, 64 << 20


def set_up_memory() -> None:
    """For a process that is one command: it keeps what it frees, and few copies of temporaries.

    By default JAX computes on CPUs in a thread of its own. What the others allocate meanwhile came
    to lie where temporaries had been, which then did not fit there any more: a run held them four
    and five times, 18.9 and 23.1 GB, where one that computes in the calling thread holds them
    twice, 10.4 GB (160 px, 64 images; experiments/benchmarks/README.md).

    To be called before JAX is used.
    """
    keep_freed_memory()
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def release_freed_memory() -> None:
    """Gives the system back what is free right now; on Linux with glibc, else nothing.

    For the start of another phase: its larger program cannot use the places that the temporaries
    of the one before had.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Lets the process keep what it frees, to use it again; on Linux with glibc, else nothing.

    Nothing either in a process with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`: large pages are the
    way to less memory for a little more time (experiments/benchmarks/README.md).

    To be called before JAX is used: afterwards it was measured to make a step slower, not faster.

    XLA's CPU backend allocates the temporaries of every step anew, hundreds of megabytes. glibc
    maps such blocks from the system and gives them back, so that each step of a ResNet-50 pays for
    some 200,000 page faults (256 px, batch 8), 8 to 18 % of its time. The process keeps the most
    that it ever held. For what it aligns to 64 bytes glibc needs 112 more, which are free again at
    once; if some small block takes them and still lives when the next step begins, the temporaries'
    old place is too small by that much.
    """
    if platform.libc_ver()[0] != "glibc" or "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_ARENA_MAX, 1)  # other arenas than the first hold no block of that size
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, _NEVER)
    mallopt(_TOP_PAD, _PADDING)
