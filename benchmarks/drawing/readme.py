"""The parts of a page that a command writes from a result file, between two marks."""

from collections.abc import Sequence

from drawing.answers import answer_one_user, answer_under_load
from drawing.tables import NOT_RIVALS, TextTable, add_row, format_table, make_speed_table
from endpoints.base import REPOSITORY_DIR
from figures.measured import Measured
from figures.result_file import ResultError
from figures.words import UNKNOWN, format_offered

README_PATH = REPOSITORY_DIR / "README.md"
CONTAINERS_PAGE = REPOSITORY_DIR / "CONTAINERS.md"
LESSON_SERVERS = ("torchserve-tuned", "bentoml-tuned", "onnx-tuned", "tfserving-tuned", "null")


def replace_part(readme: str, begin: str, end: str, text: str) -> str:
    """Return `readme` with `text` between the marks `begin` and `end`; ResultError if they are not both there."""
    before, found_begin, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ResultError(f"the page: the marks {begin!r} and {end!r} are not both there")
    return f"{before}{begin}\n{text}{end}{after}"


def format_summary(measured: Measured) -> str:
    """Return the result of a run as a list in Markdown."""

    def answer(words: str, paragraphs: Sequence[str]) -> list[str]:
        return [f"- {words}:", *(f"  - {paragraph}" for paragraph in paragraphs)]

    environment = measured.environment
    return "\n".join(
        [
            f"- **{NOT_RIVALS}**",
            *answer("One user at a time", answer_one_user(measured).answer),
            *answer("Under load", answer_under_load(measured).answer),
            f"- Measured on {environment['utc'][:10]}, {environment['cores']} shared cores ({environment['cpu']}): the "
            "servers on one, the client on the other.",
            "",
        ]
    )


def format_lesson(measured: Measured) -> str:
    """Return the speed and the sustained rates of the lesson's servers as one table in Markdown."""
    speed = make_speed_table(measured)
    table = TextTable("", [*speed.header, "keeps up with, req/s"], "")
    cells = {row[0]: row[1:] for row in speed.rows}
    for name in (name for name in LESSON_SERVERS if name in measured.names):
        knee = measured.knees.get(name)
        rate = format_offered(knee.sustained_rate) if knee else UNKNOWN
        add_row(table, measured, name, *cells[measured.label(name)], rate)
    _, _, *lines = format_table(table)
    source = f"- {measured.environment['utc'][:10]}, {measured.environment['cpu']}, `{measured.environment['command']}`"
    return "\n".join(["", *(line for line in lines if line), "", source, ""])
