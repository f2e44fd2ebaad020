"""Compile functions to machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile a function to machine code that runs without Python's lock. Keep it on disk if numba can."""
    try:
        return cast(_Function, numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # Numba finds no folder in which it may write its cache.
        return cast(_Function, numba.njit(nogil=True)(function))
