"""Random bits that are a pure function of a seed and counters.

Data order, dropout, sampling and the built-in corpus use them, so each can be recomputed separately and resumed without
the state of a generator, and none changes with the version of a library.
"""

import numpy as np
import numpy.typing as npt

_GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, SplitMix64's increment
_MASK = 2**64 - 1

DATA, DROPOUT, WEIGHTS = 0, 1, 2  # independent streams of train.seed

Counter = int | npt.NDArray[np.integer]


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(seed: int, *counters: Counter) -> npt.NDArray[np.uint64]:
    """64 random bits for each combination of seed and counters; counters broadcast against each other.

    Each counter is mixed in before the next one is added, so (1, 2) and (2, 1) give independent bits.
    """
    state = _mix(np.asarray([(seed + _GAMMA) & _MASK], dtype=np.uint64))
    for counter in counters:
        state = _mix(state + (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA))
    return state


def uniform(seed: int, *counters: Counter) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits; shapes as for `bits`."""
    return (bits(seed, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def derived_seed(seed: int, *counters: int) -> int:
    """A 63-bit seed for a generator such as `torch.manual_seed`."""
    return int(bits(seed, *counters)[0] >> np.uint64(1))
