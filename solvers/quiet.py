"""Keep a C library that prints from standard output."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Send what C code writes to standard output to standard error instead.

    HiGHS 1.12 prints a line now and then even where its log is off, which would end up between
    results that a program reads.  Without file descriptors nothing is redirected.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        saved = os.dup(1)
        os.dup2(2, 1)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # C keeps its own buffer
        os.dup2(saved, 1)
        os.close(saved)
