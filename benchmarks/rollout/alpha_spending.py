"""Look at data while they come in without more false alarms: boundaries by alpha spending, and their power.

Each look at accumulating data is one more chance to be fooled. Lan and DeMets ("Discrete sequential boundaries
for clinical trials", Biometrika 70, 1983) fix beforehand how much of the error alpha may be spent by the time
that a share t of the information is in; the boundary at each look follows from that and from the looks before.
The z-values at the looks are those of a Brownian motion B(t) / sqrt(t), so the chance to cross a boundary
is an integral over the looks, solved here numerically look by look (Armitage, McPherson and Rowe, "Repeated
significance tests on accumulating data", J. R. Statist. Soc. A 132, 1969).
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, special

# A density: values of B between the boundaries, their weights in the integral, and the density at each of those who
# are still going on; three arrays (160,).
Density = tuple[np.ndarray, np.ndarray, np.ndarray]

NODES, WEIGHTS = np.polynomial.legendre.leggauss(160)  # of the integral over one look's values
NEGLIGIBLE = 1e-12  # alpha below this is spent at its look without integrating: a bound on the safe side


def spend_late(fraction: float, alpha: float) -> float:
    """Return the alpha of one side that may be spent at information `fraction`; O'Brien and Fleming's kind.

    Next to nothing early, nearly all at the end, so that the last boundary hardly differs from that of
    a test with one look. Lan and DeMets 1983, alpha*_1.
    """
    return float(2 * special.ndtr(special.ndtri(alpha / 2) / math.sqrt(fraction)))


def spend_evenly(fraction: float, alpha: float) -> float:
    """Return the alpha of one side that may be spent at information `fraction`; Pocock's kind.

    Nearly the same boundary at every look: finds harm early and needs more data at the end. Lan and DeMets
    1983, alpha*_2.
    """
    return float(alpha * math.log(1 + (math.e - 1) * fraction))


SPENDING = {"late": spend_late, "evenly": spend_evenly}


def find_boundaries(fractions: Sequence[float] | np.ndarray, alpha: float, spending: str) -> np.ndarray:
    """Return the z-value (looks,) that |z| must exceed at each look, two-sided, `alpha` for both sides together.

    `fractions` are the shares of the information at the looks, ascending, the last is 1.
    """
    boundaries: list[float] = []
    density: Density | None = None
    spent = 0.0
    for number, fraction in enumerate(fractions):
        allowed = SPENDING[spending](fraction, alpha / 2)
        here = allowed - spent
        spent = allowed
        before = fractions[number - 1] if number else 0.0
        if here < NEGLIGIBLE:
            boundaries.append(float(-special.ndtri(max(here, 1e-300))))
        elif density is None or spent - here < NEGLIGIBLE:  # nothing worth the name was stopped before
            boundaries.append(float(-special.ndtri(here)))
        else:
            boundaries.append(_solve_boundary(density, fraction, before, here))
        density = _advance(density, boundaries[-1], fraction, before, 0.0)
    return np.array(boundaries)


def find_power(
    fractions: Sequence[float] | np.ndarray, boundaries: Sequence[float] | np.ndarray, drift: float
) -> float:
    """Return the chance that z exceeds its upper boundary at some look and the lower one at none before.

    `drift` is the mean of z once all the information is in: the true difference over its standard error.
    """
    density: Density | None = None
    power = before = 0.0
    for fraction, boundary in zip(fractions, boundaries, strict=True):
        power += _tail(density, boundary, fraction, before, drift)
        density = _advance(density, boundary, fraction, before, drift)
        before = fraction
    return float(power)


def find_drift(
    fractions: Sequence[float] | np.ndarray, boundaries: Sequence[float] | np.ndarray, power: float
) -> float:
    """Return the drift at which `find_power` is `power`."""
    return optimize.brentq(lambda drift: find_power(fractions, boundaries, drift) - power, 0.0, 15.0, xtol=1e-8)


def _solve_boundary(density: Density, fraction: float, before: float, alpha: float) -> float:
    """Return the z-value that is exceeded at this look with chance `alpha`."""
    return optimize.brentq(lambda z: _tail(density, z, fraction, before, 0.0) - alpha, 0.5, 12.0, xtol=1e-10)


def _tail(density: Density | None, boundary: float, fraction: float, before: float, drift: float) -> float:
    """Return the chance to be above the boundary at this look, having gone on until now."""
    edge = boundary * math.sqrt(fraction)
    spread = math.sqrt(fraction - before)
    shift = drift * (fraction - before)
    if density is None:
        return float(special.ndtr((shift - edge) / spread))
    places, weights, heights = density
    return float(np.sum(weights * heights * special.ndtr((places + shift - edge) / spread)))


def _advance(density: Density | None, boundary: float, fraction: float, before: float, drift: float) -> Density:
    """Return the density at this look of those who go on from it."""
    spread = math.sqrt(fraction - before)
    shift = drift * (fraction - before)
    edge = min(boundary, 9.0 + abs(drift)) * math.sqrt(fraction)
    places, weights = edge * NODES, edge * WEIGHTS
    if density is None:
        return places, weights, _normal_density(places - shift, spread)
    old_places, old_weights, old_heights = density
    kernel = _normal_density(places[:, None] - old_places[None, :] - shift, spread)  # (new, old)
    return places, weights, kernel @ (old_weights * old_heights)


def _normal_density(distances: np.ndarray, spread: float) -> np.ndarray:
    """Return the normal density so far from its mean; SciPy's takes seconds to import."""
    heights: np.ndarray = np.exp(-0.5 * (distances / spread) ** 2) / (spread * math.sqrt(2 * math.pi))
    return heights
