"""Query the prediction log in SQL.

    python ask.py                       list the queries of queries.sql
    python ask.py versions              run one of them
    python ask.py "SELECT count(*) FROM predictions WHERE status = 200"

`predictions` has a row for each predicted row, `labels` one for each label.
Reads state/predictions and state/labels, also while they are written.
"""

import argparse
import os
import re
import sys
from pathlib import Path

try:
    import duckdb

    from prediction_log import open_view
except ModuleNotFoundError as error:
    sys.exit(f"ask: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

FOLDER = Path(__file__).resolve().parent


def read_questions(text: str) -> dict[str, tuple[str, str]]:
    """Return each query's description and SQL, by name."""
    found = re.findall(r"^-- name: (\S+)\n-- (.*)\n((?:.*\n?)*?)(?=^-- name:|\Z)", text, re.MULTILINE)
    return {name: (meaning, sql.strip()) for name, meaning, sql in found}


def print_table(columns: list[str], rows: list[tuple]) -> None:
    """Print rows under their columns' names, numbers aligned to the right."""
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[place]) for row in cells)]) for place, name in enumerate(columns)]
    to_the_right = [
        all(isinstance(row[p], int | float | None) for row in rows) and bool(rows) for p in range(len(columns))
    ]
    for line in [columns, *cells]:
        pairs = zip(line, widths, to_the_right, strict=True)
        print("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in pairs).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="a name from queries.sql, or SQL (default: list the names)")
    parser.add_argument(
        "--state", type=Path, default=FOLDER / "state", help="the collector's folder (default: state in this folder)"
    )
    arguments = parser.parse_args()
    questions = read_questions((FOLDER / "queries.sql").read_text())
    if not arguments.question:
        print_table(["question", "asks"], [(name, meaning) for name, (meaning, _) in questions.items()])
        return
    predictions = arguments.state / "predictions"
    if not predictions.is_dir():
        sys.exit(f"ask: no log in {predictions}: python monitor.py makes one, or name its folder with --state")
    if " " not in arguments.question and arguments.question not in questions:
        sys.exit(f"ask: no question {arguments.question!r}; there are {', '.join(questions)}")
    _, sql = questions.get(arguments.question, ("", arguments.question))
    for last_try in (False, True):  # an hour's lines may become Parquet between listing and reading
        try:
            with open_view(predictions, arguments.state / "labels") as connection:
                answer = connection.execute(sql)
                print_table([column[0] for column in answer.description or ()], answer.fetchall())
            return
        except duckdb.IOException as error:
            if last_try:
                sys.exit(f"ask: {str(error).splitlines()[0]}")
        except duckdb.Error as error:
            sys.exit(f"ask: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`; Python would try again at its end, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        sys.exit(f"ask: {error.filename or 'the output'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("ask: interrupted")
