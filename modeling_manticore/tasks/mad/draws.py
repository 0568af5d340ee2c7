"""Random numbers that are the same on every machine: PCG64's raw output and integer arithmetic, nothing else."""

import math

import numpy as np


class Draws:
    """
    Integers and permutations from one `numpy.random.Generator(PCG64(seed))`. numpy promises that PCG64's raw output
    stays as it is, not that of the generator's methods, so only the raw output is used.
    """

    def __init__(self, seed: int, stream: int = 0):
        """
        Args:
            stream: how many of PCG64's jumps (about 0.62 * 2**128 draws each) the numbers start after the seed's own.

        Raises:
            ValueError: the seed is no integer of at least 0.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed: got {seed!r}, allowed is an integer of at least 0.")
        self.generator = np.random.Generator(np.random.PCG64(seed).jumped(stream))

    def raw(self, *shape: int, kind: str = "<u4") -> np.ndarray:
        """Uniform unsigned numbers; 64 bits of the generator give one or several, the lowest first."""
        count = math.prod(shape)
        words = self.generator.bit_generator.random_raw(-(-count * int(kind[-1]) // 8))
        return words.astype("<u8", copy=False).view(kind)[:count].reshape(shape)

    def below(self, limit: int, *shape: int) -> np.ndarray:
        """Uniform int32 numbers of 0..limit - 1 (limit at most 2**16; the bias is at most 2**-16)."""
        if limit <= 2**8 and limit & (limit - 1) == 0:
            return (self.raw(*shape, kind="<u1") & np.uint8(limit - 1)).astype(np.int32)
        raw = self.raw(*shape)
        if limit <= 2**8:  # 24 bits times 8 bits: no need for wider numbers
            return (((raw >> np.uint32(8)) * np.uint32(limit)) >> np.uint32(24)).view(np.int32)
        return ((raw.astype(np.uint64) * np.uint64(limit)) >> np.uint64(32)).astype(np.int32)

    def happens(self, probability: float, *shape: int) -> np.ndarray:
        """Booleans that are True with the probability."""
        return self.raw(*shape) < np.uint32(min(round(probability * 2**32), 2**32 - 1))

    def permutations(self, rows: int, length: int) -> np.ndarray:
        """Independent permutations of 0..length - 1 (length at most 2**16), (rows, length)."""
        # The number itself is in the lower bits of its lot, so that lots are sorted in one go and none are equal.
        kind, bits = ("<u4", 8) if length <= 2**8 else ("<u8", 16)
        lots = self.raw(rows, length, kind=kind)
        lots &= ~lots.dtype.type(2**bits - 1)
        lots |= np.arange(length, dtype=kind)
        lots.sort(axis=1)
        return lots & lots.dtype.type(2**bits - 1)

    def arrangements(self, limit: int, count: int, size: int) -> np.ndarray:
        """So many draws of `size` different numbers of 0..limit - 1 in random order, (size, count) int32."""
        drawn = np.empty((size, count), dtype=np.int32)
        ascending: list[np.ndarray] = []
        for place in range(size):
            number = self.below(limit - place, count)
            # The number counts what is left over; every smaller number that is taken moves it up by one.
            for taken in ascending:
                number += number >= taken
            drawn[place] = number
            for rank, taken in enumerate(ascending):
                ascending[rank], number = np.minimum(taken, number), np.maximum(taken, number)
            ascending.append(number)
        return drawn
