"""Random numbers that are the same on every machine: PCG64's raw output and integer arithmetic, nothing else."""

import numpy as np


class Draws:
    """
    Integers and permutations from one `numpy.random.Generator(PCG64(seed))`. numpy promises that PCG64's raw output
    stays as it is, not that of the generator's methods, so only the raw output is used.
    """

    def __init__(self, seed: int):
        """
        Raises:
            ValueError: the seed is no integer of at least 0.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed: got {seed!r}, allowed is an integer of at least 0.")
        self.generator = np.random.Generator(np.random.PCG64(seed))

    def raw(self, *shape: int) -> np.ndarray:
        """Uniform uint32 numbers; every 64 bits of the generator give two, the lower half first."""
        count = int(np.prod(shape, dtype=np.int64))
        words = self.generator.bit_generator.random_raw(-(-count // 2)).astype("<u8", copy=False)
        return words.view("<u4")[:count].reshape(shape)

    def below(self, limit: int, *shape: int) -> np.ndarray:
        """Uniform int64 numbers of 0..limit - 1 (limit at most 2**16, bias at most 2**-16)."""
        return ((self.raw(*shape).astype(np.uint64) * np.uint64(limit)) >> np.uint64(32)).view(np.int64)

    def happens(self, probability: float, *shape: int) -> np.ndarray:
        """Booleans that are True with the probability."""
        return self.raw(*shape) < np.uint64(round(probability * 2**32))

    def permutations(self, rows: int, length: int) -> np.ndarray:
        """Independent permutations of 0..length - 1, (rows, length)."""
        return np.argsort(self.raw(rows, length), axis=1, kind="stable")

    def arrangements(self, limit: int, count: int, size: int) -> np.ndarray:
        """So many draws of `size` different numbers of 0..limit - 1 in random order, (size, count)."""
        drawn = np.empty((size, count), dtype=np.int64)
        for place in range(size):
            number = self.below(limit - place, count)
            # The number counts what is left over; every smaller number that is taken moves it up by one.
            for taken in np.sort(drawn[:place], axis=0):
                number += number >= taken
            drawn[place] = number
        return drawn
