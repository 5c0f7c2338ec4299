"""Facts from elsewhere: planning/facts.toml, each with its source and the day on which it was read."""

import tomllib
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

FACTS_PATH = Path(__file__).resolve().parent / "facts.toml"
STALE_DAYS = 180


@cache
def load_facts() -> dict[str, Any]:
    """Return the content of facts.toml by kind and name."""
    return tomllib.loads(FACTS_PATH.read_text())


def assume(name: str) -> float:
    """Return the value of an assumption of facts.toml."""
    return float(load_facts()["assumption"][name]["value"])


def is_stale(fact: dict[str, Any], today: date) -> bool:
    """Whether a fact was read more than STALE_DAYS before `today`."""
    return bool((today - fact["read"]).days > STALE_DAYS)
