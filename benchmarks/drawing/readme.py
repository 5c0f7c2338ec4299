"""The parts of a page that a command makes from a result file, between two marks."""

from drawing.answers import answer_one_user, answer_under_load
from drawing.tables import NOT_RIVALS
from endpoints.base import REPOSITORY_DIR
from figures.measured import Measured
from figures.result_file import ResultError

README_PATH = REPOSITORY_DIR / "README.md"
CONTAINERS_PAGE = REPOSITORY_DIR / "CONTAINERS.md"


def replace_part(readme: str, begin: str, end: str, text: str) -> str:
    """Return `readme` with `text` between the marks `begin` and `end`; ResultError if they are not both there."""
    before, found_begin, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ResultError(f"the page: the marks {begin!r} and {end!r} are not both there")
    return f"{before}{begin}\n{text}{end}{after}"


def format_summary(measured: Measured) -> str:
    """Return in Markdown what a run has shown, in four lines."""
    environment = measured.environment
    return "\n".join(
        [
            f"- **{NOT_RIVALS}**",
            f"- One user at a time: {answer_one_user(measured).answer}",
            f"- Under load: {answer_under_load(measured).answer}",
            f"- Measured on {environment['utc'][:10]}, {environment['cores']} shared cores ({environment['cpu']}): the "
            "servers on one, the client on the other.",
            "",
        ]
    )
