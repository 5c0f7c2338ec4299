"""The parity contract: a server gives the reference's answers, |p - expected| <= 1e-5 on every test row."""

import numpy as np

from client.ask import ask
from endpoints.base import Endpoint, ServerError
from endpoints.reference import TOLERANCE, load_expected, load_test_rows


def find_problem(endpoint: Endpoint, version: str) -> str:
    """Return why a starting server does not yet give the first test row's answer; "" if it does."""
    rows, _ = load_test_rows()
    try:
        answer = ask(endpoint, rows[:1], version)
        difference = float(np.abs(answer - load_expected(version)[:1]).max()) if endpoint.has_model else 0.0
    except (OSError, ServerError, ValueError) as error:
        return str(error)
    return "" if difference <= TOLERANCE else f"wrong answer, off by {difference:.1e}"


def max_abs_difference(endpoint: Endpoint, version: str) -> float:
    """Return max |p - expected| of a running server over all test rows, asked one by one and all at once.

    Raises ServerError where an answer is not a probability pair per row.
    """
    rows, _ = load_test_rows()
    expected = load_expected(version)
    one_by_one = np.concatenate([ask(endpoint, [row], version) for row in rows])
    at_once = ask(endpoint, rows, version)
    for answer in (one_by_one, at_once):
        if answer.shape != expected.shape:
            raise ServerError(f"{endpoint.name}: answered shape {answer.shape} for {len(rows)} rows")
    differences = np.abs(np.stack([one_by_one, at_once]) - expected)
    return float("inf") if np.isnan(differences).any() else float(differences.max())
