"""The parts of the README that a command makes from a result file, between two marks."""

from endpoints.base import REPOSITORY_DIR
from figures.result_file import ResultError

README_PATH = REPOSITORY_DIR / "README.md"


def replace_part(readme: str, begin: str, end: str, text: str) -> str:
    """Return `readme` with `text` between the marks `begin` and `end`; ResultError if they are not both there."""
    before, found_begin, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ResultError(f"README.md: the marks {begin!r} and {end!r} are not both there")
    return f"{before}{begin}\n{text}{end}{after}"
