"""64-bit hashing of integer columns, the same on every machine. Not for secrets: equal hashes prove nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shardbook.core.columns import Int64Array

UInt64Array = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def mix(values: UInt64Array) -> UInt64Array:
    """Returns the splitmix64 output of each value, a new array: a bijection whose every bit depends on every bit.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    out = values + _GAMMA
    out ^= out >> _SHIFTS[0]
    out *= _FIRST
    out ^= out >> _SHIFTS[1]
    out *= _SECOND
    out ^= out >> _SHIFTS[2]
    return out


def mix_rows(first: Int64Array, matrix: Int64Array) -> UInt64Array:
    """Returns (N,) a hash of each value of ``first`` (N,) with its row of ``matrix`` (N, D)."""
    out = mix(first.view(np.uint64))
    for dim in range(matrix.shape[1]):
        out ^= matrix[:, dim].view(np.uint64)
        out = mix(out)
    return out
