"""The settings of server.py: default.toml and tuned.toml hold one value for each field here."""

import dataclasses
import tomllib
from pathlib import Path


class SettingsError(RuntimeError):
    """A settings file cannot be used; the message is one line that says what to do."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """One field per key of the file, with its type."""

    device: str  # "cpu", "cuda" or "auto"
    intra_op_threads: int  # 0: one per core
    allow_spinning: bool
    batch_rows: int  # 0: no batching
    workers: int
    max_connections: int
    max_body_bytes: int
    body_timeout_s: float
    poll_s: float  # 0: the repository is read only once
    metrics: bool


LEAST = {
    "intra_op_threads": 0, "batch_rows": 0, "workers": 1, "max_connections": 1, "max_body_bytes": 1,
    "body_timeout_s": 0.1, "poll_s": 0,
}  # fmt: skip


def read_settings(path: Path, **overrides) -> Settings:
    """Return the settings in the TOML file `path`; an override that is not None replaces its value.

    Raises SettingsError if the file is missing or malformed, if a key is unknown or missing, or if a value has
    the wrong type or is out of range.
    """
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {getattr(error, 'strerror', None) or error}; try default.toml") from None
    fields = {field.name: field.type for field in dataclasses.fields(Settings)}
    if unknown := values.keys() - fields:
        raise SettingsError(f"{path}: unknown key {', '.join(sorted(unknown))}; there are {', '.join(fields)}")
    values |= {name: value for name, value in overrides.items() if value is not None}
    if missing := fields.keys() - values:
        raise SettingsError(f"{path}: {', '.join(sorted(missing))} is missing; default.toml has every key")
    for name, kind in fields.items():
        value = float(values[name]) if kind is float and type(values[name]) is int else values[name]
        if type(value) is not kind:
            raise SettingsError(f"{path}: {name} is {value!r}, expected {kind.__name__}")
        if value < LEAST.get(name, value):
            raise SettingsError(f"{path}: {name} is {value}, expected {LEAST[name]} or more")
        values[name] = value
    if values["device"] not in ("cpu", "cuda", "auto"):
        raise SettingsError(f"{path}: device is {values['device']!r}, expected cpu, cuda or auto")
    return Settings(**values)
