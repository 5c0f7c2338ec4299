"""The prediction log as files: lines of JSON, which become Parquet when their hour is over.

    predictions/date=2026-11-29/14.jsonl      the current hour, appended to
    predictions/date=2026-11-29/13.parquet    an earlier hour, compressed

The hour, in UTC, is that of a record's arrival, so that no file changes after its hour.
"""

import contextlib
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
    "FROM read_json(?, format='newline_delimited', {columns}) WHERE id IS NOT NULL"
)
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
        if written < len(lines):  # the disk is full: what is cut must not join the next line
            with contextlib.suppress(OSError):
                os.write(self._file, b"\n")
            raise OSError(28, "No space left on device")

    def _open(self, hour: str) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file, self._hour = None, ""
        path = self.folder / hour
        path.parent.mkdir(exist_ok=True, mode=0o700)
        self._file, self._hour = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), hour
        if (size := os.fstat(self._file).st_size) and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # a line was cut when the machine went down

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
        for path in sorted(self.folder.glob("date=*/*.jsonl")):
            if path != self.folder / f"{now:date=%Y-%m-%d/%H.jsonl}":
                done.append(f"{path.parent.name}/{path.stem}: {compress(path):,} rows in Parquet")
        oldest = f"{now - timedelta(days=self.keep_days):date=%Y-%m-%d}"
        for day in sorted(self.folder.glob("date=????-??-??")):
            if day.name < oldest:
                shutil.rmtree(day)
                done.append(f"removed {day.name}, older than {self.keep_days} days")
        return done

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._lock.close()


def compress(path: Path) -> int:
    """Replace a file of lines by a Parquet file; return its number of rows.

    After a crash the lines are still there, with or without the Parquet file, and are compressed again.
    """
    target, temporary = path.with_suffix(".parquet"), path.with_suffix(".writing")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    with duckdb.connect() as connection:
        connection.execute(f"COPY ({read_lines()}) TO '{_quote(temporary)}' {PARQUET}", [str(path)])
        [(count,)] = connection.execute("SELECT count(*) FROM read_parquet(?)", [str(temporary)]).fetchall()
    temporary.replace(target)
    path.unlink()
    return count


def read_lines() -> str:
    """Return the query that reads lines of JSON; its parameter is the path, or a list of paths."""
    columns = ", ".join(f"'{name}': '{kind}'" for name, kind in COLUMNS.items())
    return READ_LINES.format(columns=f"columns={{{columns}}}, ignore_errors=true, hive_partitioning=false")


def open_view(folder: Path, labels: Path | None = None) -> duckdb.DuckDBPyConnection:
    """Return a connection with the views `predictions`, the whole log, and `labels`, all labels that have come."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    parquet = sorted(map(str, folder.glob("date=*/*.parquet")))
    lines = [path for path in sorted(map(str, folder.glob("date=*/*.jsonl"))) if path[:-6] + ".parquet" not in parquet]
    columns = ", ".join(f'NULL::{kind} AS "{name}"' for name, kind in COLUMNS.items())
    parts = [f"SELECT * REPLACE (make_timestamp(time) AS time) FROM (SELECT {columns}) WHERE false"]
    if parquet:
        parts.append(f"SELECT * FROM read_parquet({_list(parquet)}, hive_partitioning=false)")
    if lines:
        parts.append(read_lines().replace("?", _list(lines)))
    connection.execute(f"CREATE VIEW predictions AS {' UNION ALL '.join(parts)}")
    files = sorted(map(str, labels.glob("*.csv"))) if labels else []
    source = (
        f"read_csv({_list(files)}, header=false, delim=',', ignore_errors=true, null_padding=true, "
        "columns={'id': 'UUID', 'row': 'USMALLINT', 'target': 'UTINYINT'})"
        if files
        else "(SELECT NULL::UUID AS id, NULL::USMALLINT AS row, NULL::UTINYINT AS target) WHERE false"
    )
    connection.execute(f"CREATE VIEW labels AS SELECT * FROM {source}")
    return connection


def utc_now() -> datetime:
    return datetime.now(UTC)


def _quote(path: Path | str) -> str:
    return str(path).replace("'", "''")


def _list(paths: list[str]) -> str:
    return "[" + ", ".join(f"'{_quote(path)}'" for path in paths) + "]"
