"""The model repository, <name>/<version>/model.onnx, watched while the server runs."""

import asyncio
import errno
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from models import Model
from onnx_inference import DeviceError, ModelError, shorten
from settings import Settings

Key = tuple[str, str]  # name and version
Files = dict[str, tuple]  # by path in the version's folder: a stamp that changes with the file


class Repository:
    """The served models: the content of a folder, including changes while the server runs.

    A version is its model.onnx and every other file next to it, such as external weights. It is read completely, so
    that the served model no longer depends on the files. A file that changes is read again once it is unchanged from
    one scan to the next.
    """

    def __init__(
        self, folder: Path, settings: Settings, only_version: str | None = None, only_model: str | None = None
    ):
        self.folder = folder
        self.settings = settings
        self.only_version = only_version  # of every model; None: all of them
        self.only_model = only_model  # None: all of them
        self.models: dict[str, dict[str, Model]] = {}  # by name and version, the newest version last
        self.defaults: dict[str, str] = {}  # by name, the version that answers requests without one
        self.bad_defaults: dict[str, tuple[str, str]] = {}  # reported: the version named, the one kept
        self.failures: dict[Key, str] = {}  # why a version in the folder is not served
        self.tried: dict[Key, Files] = {}  # the files that were loaded, or could not be
        self.seen: dict[Key, Files] | None = None  # the files at the last scan
        self.told: set[str] = set()

    def scan(self) -> bool:
        """Load new and changed versions, drop removed ones, choose the defaults; return whether anything has changed.

        A version that cannot be loaded is reported in one line and changes nothing: if it was served before, the old
        model stays. Each scan makes new dictionaries, so that other threads can go on reading the old ones.
        Raises DeviceError if the requested device cannot be used at all, and OSError if the folder cannot be
        read; in both cases nothing changes.
        """
        found = self.list_versions()
        versions = {
            key: model
            for models in self.models.values()
            for model in models.values()
            if (key := (model.name, model.version)) in found
        }
        changed = len(versions) != sum(map(len, self.models.values()))
        for name, version in self.tried.keys() - found:
            self.tell(f"{name} version {version} is gone and no longer served")
        self.tried = {key: files for key, files in self.tried.items() if key in found}
        failures = {key: reason for key, reason in self.failures.items() if key in found}
        for key, files in found.items():
            if self.tried.get(key) == files or (self.seen is not None and self.seen.get(key) != files):
                continue  # known, or still being written
            self.tried[key] = files
            try:
                versions[key] = self.load(key, files)
                failures.pop(key, None)
                changed = True
            except DeviceError:
                raise
            except ModelError as error:
                failures[key] = str(error)
                kept = "stays as it was" if key in versions else "is left out"
                self.tell(f"{key[0]} version {key[1]} {kept}: {error} ({self.folder / key[0] / key[1]})")
        self.seen = found
        models: dict[str, dict[str, Model]] = {}
        for name, version in sorted(versions, key=lambda key: (key[0], int(key[1]))):
            models.setdefault(name, {})[version] = versions[name, version]
        defaults = {name: self.choose_default(name, list(models[name])) for name in models}
        if changed or defaults != self.defaults:
            self.models, self.defaults = models, defaults
            changed = True
        changed |= failures != self.failures
        self.failures = failures
        return changed

    def load(self, key: Key, files: Files) -> Model:
        """Return the model in these files; ModelError with one line, whatever their fault."""
        name, version = key
        folder = self.folder / name / version
        try:
            contents = {path: read_file(folder / path) for path in files}
            if list_files(folder) != files:
                raise ModelError("its files change while they are read; they will be read again")
            return Model(name, version, contents, self.settings)
        except ModelError:
            raise
        except OSError as error:
            raise ModelError(f"{Path(error.filename or 'a file').name}: {error.strerror}") from None
        except Exception as error:  # noqa: BLE001 - these files may come from anyone
            raise ModelError(f"it cannot be used ({type(error).__name__}: {shorten(error)})") from None

    def list_versions(self) -> dict[Key, Files]:
        """Return the files of every version, sorted; OSError if the repository cannot be listed.

        A model or version whose folder cannot be read now keeps its files of the last scan.
        """
        found: dict[Key, Files] = {}
        for model in os.scandir(self.folder):
            if not model.name.startswith(".") and self.only_model in (None, model.name) and is_folder(model):
                if not model.name.isprintable():  # nor can JSON and gRPC carry names that are not UTF-8
                    self.tell_once(f"{model.name!r} is not served: its name has characters that cannot be printed")
                    continue
                try:
                    found |= self.list_model(model.name)
                except OSError:
                    found |= {key: files for key, files in (self.seen or {}).items() if key[0] == model.name}
        return dict(sorted(found.items()))

    def list_model(self, name: str) -> dict[Key, Files]:
        """Return the files of every version of one model; OSError if its folder cannot be listed."""
        found: dict[Key, Files] = {}
        strange = []
        for entry in os.scandir(self.folder / name):
            key = name, entry.name
            if not is_folder(entry):
                strange += [entry.name] if entry.name.endswith(".onnx") else []
            elif not (entry.name.isascii() and entry.name.isdecimal()):
                if os.path.exists(f"{entry.path}/model.onnx"):  # noqa: PTH110 - Path.exists raises if it may not look
                    strange.append(entry.name)
            elif self.only_version in (None, entry.name):
                try:
                    files = list_files(self.folder / name / entry.name)
                except OSError:
                    files = (self.seen or {}).get(key, {})
                if "model.onnx" in files:
                    found[key] = files
                elif any(path.endswith(".onnx") for path in files):
                    strange += [f"{entry.name}/{path}" for path in files if path.endswith(".onnx")]
        for path in strange:
            self.tell_once(
                f"{name}/{path} is not served: a model lies at <name>/<version>/model.onnx, its version a number"
            )
        return found

    def choose_default(self, name: str, versions: list[str]) -> str:
        """Return the version that the file <name>/default names, or the newest if there is no such file.

        A name that cannot be followed is reported once; the default stays, or becomes the newest if it is gone.
        """
        path = self.folder / name / "default"
        try:
            wanted = None if self.only_version else read_file(path).decode().strip()
        except FileNotFoundError:
            wanted = None
        except (OSError, UnicodeDecodeError):
            wanted = "something unreadable"
        if wanted is None or wanted in versions:
            self.bad_defaults.pop(name, None)
            return wanted or versions[-1]
        kept = self.defaults.get(name) if self.defaults.get(name) in versions else versions[-1]
        if self.bad_defaults.get(name) != (wanted, kept):
            self.bad_defaults[name] = wanted, kept
            print(f"server: {path} names {wanted!r}, not one of {', '.join(versions)}; {kept} stays", file=sys.stderr)
        return kept

    def describe(self) -> str:
        """Return one line with the served models, and the defaults that are not the newest."""
        words = []
        for name, versions in self.models.items():
            default = self.defaults[name]
            chosen = "" if default == list(versions)[-1] else f" (default {default})"
            words.append(f"{name} {', '.join(versions)}{chosen}")
        return "; ".join(words) or "none"

    async def watch(self, on_change: Callable[[], None]) -> None:
        """Scan every `poll_s` seconds, in a thread, forever; call `on_change` after each change."""
        problem = ""
        while self.settings.poll_s:
            await asyncio.sleep(self.settings.poll_s)
            served = self.models
            try:
                changed = await asyncio.to_thread(self.scan)
            except Exception as error:  # noqa: BLE001 - whatever is there, the next scan follows
                if problem != (problem := f"the model repository cannot be read, all stays as it is: {error}"):
                    self.tell(problem)
            else:
                problem = ""
                if changed:
                    on_change()
                if self.models is not served:
                    print(f"models and versions: {self.describe()}\n", end="", flush=True)

    def tell_once(self, line: str) -> None:
        if line not in self.told:
            self.told.add(line)
            self.tell(line)

    def tell(self, line: str) -> None:
        print(f"server: {line}\n", end="", file=sys.stderr, flush=True)


def is_folder(entry: os.DirEntry) -> bool:
    """Return whether it is a folder, or a link that leads nowhere for now, perhaps in a circle."""
    try:
        return entry.is_dir() or (entry.is_symlink() and not Path(entry.path).exists())
    except OSError:
        return entry.is_symlink()


def read_file(path: Path) -> bytes:
    """Return the content of a regular file; OSError for anything else: a pipe would never end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        return file.read()


def list_files(folder: Path) -> Files:
    """Return every file below `folder` with its stamp; OSError if one cannot be read.

    The stamp has the time of the last change: programs that copy set the time of modification, to any value.
    """
    files: Files = {}
    for parent, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = Path(parent, name)
            try:
                status = path.stat()
            except OSError as error:
                if not (isinstance(error, FileNotFoundError) or path.is_symlink()):
                    raise
                files[path.relative_to(folder).as_posix()] = ()  # a link that leads nowhere: reading it reports that
                continue
            if stat.S_ISREG(status.st_mode):
                files[path.relative_to(folder).as_posix()] = (
                    status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size,
                    status.st_mode, status.st_uid, status.st_gid,
                )  # fmt: skip
    return dict(sorted(files.items()))


def _raise(error: OSError) -> None:
    raise error
