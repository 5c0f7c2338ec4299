"""Replicas of the simulation with planted service times."""

import numpy as np

from planning.simulation import ServiceTimes


def make_one_by_one(draws_s: np.ndarray) -> ServiceTimes:
    """A server that answers one request at a time, in seconds drawn from `draws_s`."""
    return ServiceTimes(np.array([0.0, draws_s.mean()]), draws_s)
