"""Seeds made of seeds."""

import numpy as np


def derived_seed(*numbers: int) -> int:
    """A seed for one purpose, 0..2^32 - 1, of the run's seed and numbers that tell purposes (steps, images) apart."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
