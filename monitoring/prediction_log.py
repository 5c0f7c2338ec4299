"""The prediction log as files: lines of JSON, which become Parquet when their hour is over.

    predictions/date=2026-11-29/14.jsonl      the current hour, appended to
    predictions/date=2026-11-29/13.parquet    an earlier hour, compressed

The hour, in UTC, is that of a record's arrival, so that no file changes after its hour.
"""

import errno
import fcntl
import mmap
import os
import re
import shutil
import struct
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb

COLUMNS = {
    "time": "BIGINT",  # µs since 1970, a TIMESTAMP in Parquet and in the view
    "id": "UUID",
    "row": "USMALLINT",
    "rows": "USMALLINT",
    "server": "VARCHAR",
    "version": "VARCHAR",
    "wanted": "VARCHAR",
    "replica": "VARCHAR",
    "owner": "VARCHAR",
    "bucket": "UTINYINT",  # of the user, 0 to 99
    "protocol": "VARCHAR",
    "status": "SMALLINT",
    "ms": "FLOAT",
    "mean radius": "DOUBLE",
    "mean texture": "DOUBLE",
    "mean smoothness": "DOUBLE",
    "mean concavity": "DOUBLE",
    "mean symmetry": "DOUBLE",
    "malignant": "DOUBLE",
    "benign": "DOUBLE",
    "note": "VARCHAR",
}
# An hour's lines in the order of their columns. Lines that a full disk has cut, nulls to DuckDB, are left out.
READ_LINES = (
    "SELECT * REPLACE (make_timestamp(time) AS time) "
    "FROM read_json({files}, format='newline_delimited', {columns}) WHERE id IS NOT NULL"
)
# What is left out of lines that the file of Parquet has already: a crash, or a clock that was set back, leaves both.
NOT_KNOWN = (
    "SELECT new.* FROM ({lines}) new ANTI JOIN read_parquet('{known}', hive_partitioning=false) old "
    "ON new.id = old.id AND new.row IS NOT DISTINCT FROM old.row"
)
# A label is a line `id,row,target`; other lines are left out, whatever they are. The collector reads them itself.
READ_LABELS = (
    "SELECT TRY_CAST(fields[1] AS UUID) AS id, TRY_CAST(fields[2] AS USMALLINT) AS row, "
    "TRY_CAST(fields[3] AS UTINYINT) AS target FROM (SELECT list_transform(string_split(line, ','), "
    "lambda field: trim(field, ' \t\r\"')) AS fields FROM read_csv({files}, auto_detect=false, header=false, "
    "delim='\x01', quote='', escape='', strict_mode=false, ignore_errors=true, columns={{'line': 'VARCHAR'}})) "
    "WHERE len(fields) = 3 AND id IS NOT NULL AND row IS NOT NULL AND target IN (0, 1)"
)
BESIDE_FIELDS, LARGEST_ROW = ' \t\r"', 65_535
ID = re.compile(rb'"id":"([^"]+)"')
LAST_BYTES = 1 << 20  # of the newest lines: more than one reading of HAProxy's connection becomes
PARQUET = "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 9, PARQUET_VERSION V2)"


class LogError(Exception):
    """The log cannot be used; the message is one line that says what to do."""


class Count:
    """A number in a file that survives even kill -9, because the kernel writes it."""

    def __init__(self, path: Path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(descriptor).st_size != 8:  # written, or a full disk would end the process later on
                os.pwrite(descriptor, bytes(8), 0)
                os.ftruncate(descriptor, 8)
            self._memory = mmap.mmap(descriptor, 8)
        finally:
            os.close(descriptor)

    @property
    def value(self) -> int:
        return struct.unpack("<q", self._memory)[0]

    def add(self, more: int) -> None:
        struct.pack_into("<q", self._memory, 0, self.value + more)


class PredictionLog:
    """Appends lines. Raises LogError if another process writes into the folder."""

    def __init__(self, folder: Path, keep_days: int = 30):
        self.folder, self.keep_days = folder, keep_days
        self._file: int | None = None
        self._hour = ""
        self._told: set[Path] = set()  # files that cannot become Parquet
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (folder.parent / "collector.pid").open("a+")
        except OSError as error:
            raise LogError(f"{folder}: {error.strerror}; choose another folder with --state") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LogError(f"another collector writes into {folder}; stop it, or choose another --state") from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()

    def append(self, lines: bytes, now: datetime) -> None:
        """Append whole lines. OSError where the disk does not take them."""
        if self._lock.closed:
            raise OSError(errno.EBADF, "the log is closed")
        hour = f"date={now.year}-{now.month:02}-{now.day:02}/{now.hour:02}.jsonl"
        if hour != self._hour or not os.fstat(self._file).st_nlink:  # else somebody has deleted the file
            self._open(hour)
        written = os.write(self._file, lines)
        if written < len(lines):  # the disk is full: `_open` separates what is cut from the next line
            self._close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self, hour: str) -> None:
        self._close()
        path = self.folder / hour
        path.parent.mkdir(exist_ok=True, mode=0o700)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        if (size := os.fstat(self._file).st_size) and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # a line was cut when the disk was full or the machine went down
        self._hour = hour

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file, self._hour = None, ""

    def last_ids(self) -> frozenset[str]:
        """Return the ids of the newest lines."""
        newest = max(self.folder.glob("date=*/*.jsonl"), default=None)
        if newest is None:
            return frozenset()
        with newest.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_BYTES))
            return frozenset(key.decode() for key in ID.findall(file.read()))

    def tidy(self, now: datetime) -> list[str]:
        """Compress earlier hours and remove days that are too old; return a line for each."""
        done = []
        # An hour is over a minute later: until then a slow disk may still write its last lines.
        open_hours = [self.folder / f"{at:date=%Y-%m-%d/%H.jsonl}" for at in (now, now - timedelta(minutes=1))]
        for path in sorted(self.folder.glob("date=*/*.jsonl")):
            if path in open_hours:
                continue
            try:
                done.append(f"{path.parent.name}/{path.stem}: {compress(path):,} rows in Parquet")
            except (OSError, duckdb.Error) as error:  # the other hours are compressed, and days removed, all the same
                if path not in self._told:
                    done.append(f"{path} does not become Parquet: {str(error).splitlines()[0]}")
                self._told.add(path)
        oldest = f"{now - timedelta(days=self.keep_days):date=%Y-%m-%d}"
        for day in sorted(self.folder.glob("date=????-??-??")):
            if day.name < oldest:
                shutil.rmtree(day)
                done.append(f"removed {day.name}, older than {self.keep_days} days")
        return done

    def close(self) -> None:
        self._close()
        self._lock.close()


def compress(path: Path) -> int:
    """Replace a file of lines by a Parquet file, or add them to the one that is there; return its number of rows.

    After a crash the lines are still there, with or without the Parquet file, and are compressed again.
    """
    target, temporary = path.with_suffix(".parquet"), path.with_suffix(".writing")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    rows = read_lines([str(path)])
    if target.exists():
        known = _quote(target)
        rows = f"SELECT * FROM read_parquet('{known}', hive_partitioning=false) UNION ALL " + NOT_KNOWN.format(
            lines=rows, known=known
        )
    with duckdb.connect() as connection:
        connection.execute(f"COPY ({rows}) TO '{_quote(temporary)}' {PARQUET}")
        [(count,)] = connection.execute("SELECT count(*) FROM read_parquet(?)", [str(temporary)]).fetchall()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())  # before the lines are removed
    temporary.replace(target)
    path.unlink()
    return count


def read_lines(paths: list[str]) -> str:
    """Return the query that reads the lines of JSON in these files."""
    columns = ", ".join(f"'{name}': '{kind}'" for name, kind in COLUMNS.items())
    return READ_LINES.format(
        files=_list(paths), columns=f"columns={{{columns}}}, ignore_errors=true, hive_partitioning=false"
    )


def find_labels(folder: Path) -> list[Path]:
    """Return the files of labels; a folder or a pipe of such a name is none."""
    return [path for path in sorted(folder.glob("*.csv")) if path.is_file()]


def open_view(folder: Path, labels: Path | None = None) -> duckdb.DuckDBPyConnection:
    """Return a connection with the views `predictions`, the whole log, and `labels`, all labels that have come."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    parquet = sorted(map(str, folder.glob("date=*/*.parquet")))
    lines = sorted(map(str, folder.glob("date=*/*.jsonl")))
    beside = [path for path in lines if path[:-6] + ".parquet" in parquet]
    lines = [path for path in lines if path not in beside]
    columns = ", ".join(f'NULL::{kind} AS "{name}"' for name, kind in COLUMNS.items())
    parts = [f"SELECT * REPLACE (make_timestamp(time) AS time) FROM (SELECT {columns}) WHERE false"]
    if parquet:
        parts.append(f"SELECT * FROM read_parquet({_list(parquet)}, hive_partitioning=false)")
    if lines:
        parts.append(read_lines(lines))
    parts += [NOT_KNOWN.format(lines=read_lines([path]), known=_quote(path[:-6] + ".parquet")) for path in beside]
    connection.execute(f"CREATE VIEW predictions AS {' UNION ALL '.join(parts)}")
    files = list(map(str, find_labels(labels))) if labels else []
    nothing = "SELECT NULL::UUID AS id, NULL::USMALLINT AS row, NULL::UTINYINT AS target WHERE false"
    connection.execute(f"CREATE VIEW labels AS {READ_LABELS.format(files=_list(files)) if files else nothing}")
    return connection


def utc_now() -> datetime:
    return datetime.now(UTC)


def _quote(path: Path | str) -> str:
    return str(path).replace("'", "''")


def _list(paths: list[str]) -> str:
    return "[" + ", ".join(f"'{_quote(path)}'" for path in paths) + "]"
