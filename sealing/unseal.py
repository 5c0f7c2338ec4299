"""Open a server's sealed models into memory; refuse those that do not verify.

    python unseal.py onnx --to /dev/shm/models
    python unseal.py onnx --to /dev/shm/models --watch
    python unseal.py onnx --to /dev/shm/models --watch -- COMMAND

Reads sealed/SERVER/<model>/<version>/, keys/trusted/*.pub,
keys/identities/SERVER/*.txt and policy.toml, and keeps state/state.json, all in
--home. Copies each version into memory, verifies the copy, checks it against
policy and state, decrypts it, and moves it in one step to its place below DIR.
Prints a line if a version is refused; one that was accepted before stays.
--watch looks again every second until a signal ends it, and drops versions
that are no longer trusted. A COMMAND is started when the models are open, and
DIR is removed after it.

The file DIR/.ready names the versions in DIR once all that can be accepted are
there. A server may be started when unseal.py has ended with 0 or, with --watch,
when `test -f DIR/.ready` succeeds, which a startupProbe can run.

Exit codes: 0 DIR holds a version; 1 it holds none, or a line names the problem;
2 wrong command line. With a COMMAND, that command's.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from release import FOLDER, NOTE, PLACES, SIGNATURE, SUFFIX, Release, find_place, put, pyrage, verify

POLL_S = 1.0
MAX_FILES, MAX_DEPTH = 1_000, 50  # of a version
MAX_NOTE_BYTES = 1 << 20  # of its note and its signature, which are parsed
SERVER, MODEL, VERSION, DIGEST = f"({'|'.join(PLACES)})", r"\w[\w.-]*", "[1-9][0-9]*", "[0-9a-f]{64}"
RULES = rf"max_bytes=\d+|floor {SERVER}(/{MODEL}(/{VERSION})?)?=\d+|pin {SERVER}/{MODEL}/{VERSION}='{DIGEST}'"
LOCK, READY, STAGE = ".lock", ".ready", ".unsealing-"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
stopping: list[bool] = []  # not empty once a signal has come


class Refused(Exception):
    """A version is refused; the message is why, in one line."""


class UnsealError(OSError):
    """Nothing can be accepted now; the message is one line that says what to do."""


@dataclass(frozen=True)
class Trust:
    """Keys and policy, read at each look."""

    keys: dict[Path, bytes]  # public keys that may have signed
    identities: list[str]  # age identities to decrypt with
    max_bytes: int
    floor: dict[str, int]
    pin: dict[str, str]


@dataclass(frozen=True)
class Opened:
    """A version that was verified."""

    release: Release
    digest: str  # SHA-256 of release.json
    key: bytes  # the public key that verified it

    def check(self, name: str, trust: Trust) -> None:
        """Raise Refused if this version may not, or no longer, be served as `name`."""
        floor = max([0, *(low for place, low in trust.floor.items() if f"{name}/".startswith(f"{place}/"))])
        if self.release.name != name:
            raise Refused(f"it was sealed as {self.release.name}")
        if self.key not in trust.keys.values():
            raise Refused("the key that signed it is not trusted any more")
        if type(self.release.serial) is not int or self.release.serial < floor:
            raise Refused(f"serial {self.release.serial!r} is no number, or below the policy's floor {floor}")
        if trust.pin.get(name, self.digest) != self.digest:
            raise Refused(f"its digest {self.digest} is not the one that the policy pins")


def read_trust(home: Path, server: str) -> Trust:
    """Return policy and keys, without comments; raise UnsealError if they cannot be used."""
    try:
        keys = {path: path.read_bytes() for path in sorted(home.glob("keys/trusted/*.pub"))}
        texts = [path.read_text() for path in sorted(home.glob(f"keys/identities/{server}/*.txt"))]
        identities = [line for text in texts for line in text.splitlines() if line and not line.startswith("#")]
        trust = Trust(keys, identities, **tomllib.loads((home / "policy.toml").read_text()))
        rules = [f"max_bytes={trust.max_bytes!r}", *(f"floor {place}={low!r}" for place, low in trust.floor.items())]
        rules += [f"pin {name}={digest!r}" for name, digest in trust.pin.items()]
        if wrong := [rule for rule in rules if not re.fullmatch(RULES, rule, re.ASCII)]:  # would protect from nothing
            raise ValueError(f"{wrong[0]!r} names no server, model or version, or no value")
        return trust
    except Exception as error:  # noqa: BLE001 - whatever is in them
        raise UnsealError(f"policy.toml or keys in {home} cannot be used: {error}") from None


def list_files(folder: Path) -> dict[str, os.stat_result]:
    """Return the status of each path below `folder`, of one more than a version may have at most.

    No link is followed, and no more is read, since there may be millions.
    """
    found, folders = {}, [str(folder)]
    for path in folders:
        with os.scandir(path) as entries:
            for entry in islice(entries, MAX_FILES + 1 - len(found)):
                found[entry.path[len(f"{folder}/") :]] = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return found


def measure_files(folder: Path, max_bytes: int) -> dict[str, int]:
    """Return the sizes of a version's files; raise Refused if it is too large or has anything but regular files."""
    found = list_files(folder)
    files = {path: status for path, status in found.items() if not stat.S_ISDIR(status.st_mode)}
    if folder.is_symlink() or any(not stat.S_ISREG(file.st_mode) or file.st_nlink > 1 for file in files.values()):
        raise Refused("it holds a link, or something that is no file")
    if len(found) > MAX_FILES or sum(file.st_size for file in files.values()) > max_bytes:
        raise Refused("it has too many files, or more bytes than the policy's max_bytes")
    if any(path.count("/") > MAX_DEPTH for path in files):
        raise Refused(f"its folders are more than {MAX_DEPTH} deep")
    return {path: file.st_size for path, file in files.items()}


def copy_file(source: Path, target: Path, size: int) -> None:
    """Copy the first `size` bytes of a regular file, which may have become anything since it was measured."""
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # no link is followed, and no pipe waited for
    with open(source, "rb", opener=lambda path, _: os.open(path, flags)) as file, target.open("wb") as copy:
        while size and (copied := os.sendfile(copy.fileno(), file.fileno(), None, size)):
            size -= copied


def find_signer(folder: Path, signature: Path, keys: dict[Path, bytes]) -> bytes:
    """Return the key that signed exactly these files; raise Refused if none of `keys` did."""
    reason = "keys/trusted is empty or cannot be read"
    for path, key in keys.items():
        try:
            verify(folder, signature, path)
            return key
        except OSError:  # such as too many open files: another look may find the key
            raise
        except Exception as error:  # noqa: BLE001 - an attacker's signature can raise anything
            reason = f"{type(error).__name__}: {str(error)[:60]}"
    raise Refused(f"no trusted key has signed these files ({reason})")


def open_version(name: str, folder: Path, stage: Path, trust: Trust) -> Opened:
    """Verify a version and decrypt it into stage/plain; raise Refused if it may not be served.

    Whoever can write to `folder` may change it at any time. Only this process can change the copy, which is used.
    """
    sealed, signature = stage / "sealed", stage / SIGNATURE
    sizes = measure_files(folder, trust.max_bytes)
    for path, size in sizes.items():
        copy_file(folder / path, sealed / path, size)
    if not {NOTE, SIGNATURE} <= sizes.keys() or max(sizes[NOTE], sizes[SIGNATURE]) > MAX_NOTE_BYTES:
        raise Refused(f"{NOTE} or {SIGNATURE} is missing or too large")
    (sealed / SIGNATURE).rename(signature)
    key = find_signer(sealed, signature, trust.keys)
    note = (sealed / NOTE).read_bytes()
    opened = Opened(Release(**json.loads(note)), hashlib.sha256(note).hexdigest(), key)
    opened.check(name, trust)
    if sizes.keys() != {NOTE, SIGNATURE, *(path + SUFFIX for path in opened.release.files)}:  # no path leads elsewhere
        raise Refused(f"its files are not those of {NOTE}")
    identities = [pyrage.x25519.Identity.from_str(line) for line in trust.identities]
    for path, digest in opened.release.files.items():
        plain = stage / "plain" / path
        plain.parent.mkdir(parents=True, exist_ok=True)
        pyrage.decrypt_file(str(sealed / f"{path}{SUFFIX}"), str(plain), identities)
        with plain.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:  # pyrage does not report a full disk
                raise OSError(f"{path} is not what was sealed, or {stage.parent} is full")
    return opened


class Unsealer:
    """Keeps exactly the sealed and trusted versions in a folder."""

    def __init__(self, server: str, folder: Path, home: Path):
        self.server, self.folder, self.home = server, folder, home
        self.opened: dict[str, Opened] = {}  # the versions in the folder, by name
        self.tried: dict[str, tuple[Trust, object]] = {}  # the last tried trust and files, by name
        self.told: dict[str, str] = {}

    def look(self) -> None:
        """Accept new versions and drop untrusted ones; raise UnsealError if keys, policy or state cannot be used."""
        trust, sealed = read_trust(self.home, self.server), self.home / "sealed"
        names = sorted(path.relative_to(sealed).as_posix() for path in sealed.glob(f"{self.server}/[!.]*/[!.]*"))
        for name in names:
            self.consider(name, sealed / name, trust)
        for name, opened in list(self.opened.items()):
            try:
                opened.check(name, trust)
            except Refused as error:
                del self.opened[name]
                self.tell(name, f"dropped: {error}")
        self.remove_others()
        for name in read_state(self.home).keys() - names:
            if name.startswith(f"{self.server}/"):
                self.tell(name, "was accepted before and is gone")

    def consider(self, name: str, folder: Path, trust: Trust) -> None:
        """Accept a version or print why not, unless nothing has changed since the last look."""
        try:
            files = {path: (s.st_ino, s.st_size, s.st_ctime_ns) for path, s in list_files(folder).items()}
            if self.tried.get(name) == (trust, files):
                return
            self.tried[name] = trust, files
            with tempfile.TemporaryDirectory(prefix=STAGE, dir=self.folder) as stage:
                place = find_place(*name.split("/"))
                opened = open_version(name, folder, Path(stage), trust)
                remember(self.home, opened)  # before it is in place, so that nothing older can follow
                if name not in self.opened or self.opened[name].release.files != opened.release.files:
                    put(Path(stage, "plain", place.name if place.suffix == ".mar" else ""), self.folder / place)
            self.opened[name] = opened
            self.tell(name, f"accepted: serial {opened.release.serial}", good=True)
        except Exception as error:  # noqa: BLE001 - an attacker may have written these files
            if isinstance(error, OSError):  # such as a full disk: the next look tries again
                self.tried.pop(name, None)
            self.tell(name, f"refused: {error if isinstance(error, (OSError, Refused)) else repr(error)}")

    def remove_others(self) -> None:
        """Remove, each in one step, the versions in the folder that are dropped, or that only an earlier run opened."""
        kept = {self.folder / find_place(*name.split("/")) for name in self.opened}
        for path in {*self.folder.glob(PLACES[self.server][1].format(model="*", version="*"))} - kept:
            with tempfile.TemporaryDirectory(prefix=STAGE, dir=self.folder) as stage:
                path.rename(Path(stage, "removed"))

    def tell(self, name: str, line: str, good: bool = False) -> None:
        """Print a line, unless it was the last one about that version."""
        if self.told.get(name) != line:
            self.told[name] = line
            line = f"{name}: {line}"[:300].encode("unicode_escape").decode()  # a file's name may contain anything
            print(line, file=sys.stdout if good else sys.stderr, flush=True)


def read_state(home: Path) -> dict[str, tuple[int, str]]:
    """Return serial and digest of the newest release of each version that was ever accepted."""
    try:
        state = json.loads((home / "state" / "state.json").read_text())
        return {name: (int(serial), str(digest)) for name, (serial, digest) in state.items()}
    except FileNotFoundError:
        return {}
    except Exception as error:  # noqa: BLE001 - whatever is in it
        problem = f"state.json is damaged ({error}): put back a copy, or raise the floor and remove it"
        raise UnsealError(problem) from None


def remember(home: Path, opened: Opened) -> None:
    """Record a release in state.json; raise Refused if a newer one, or another with its serial, was accepted before."""
    path, name, new = home / "state" / "state.json", opened.release.name, (opened.release.serial, opened.digest)
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = read_state(home)
        last = state.get(name, new)
        if new[0] < last[0] or new[0] == last[0] and new != last:
            raise Refused(f"serial {new[0]} is older than {last[0]}, or not the release that had it")
        path.with_suffix(".new").write_text(json.dumps(state | {name: new}, indent=1))
        path.with_suffix(".new").replace(path)


def claim(folder: Path, allow_disk: bool) -> TextIO:
    """Return the folder's lock, held until it is closed.

    Raises UnsealError if another process uses the folder, or if its files would reach a disk.
    """
    number = next(path for path in (folder, *folder.parents) if path.exists()).stat().st_dev
    memory = rf"^\d+ \d+ {os.major(number)}:{os.minor(number)} .* - (tmpfs|ramfs) "
    if not allow_disk and not re.search(memory, Path("/proc/self/mountinfo").read_text(), re.MULTILINE):
        raise UnsealError(f"{folder} is not in memory; choose a folder in /dev/shm, or --allow-disk")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    is_ours = folder.lstat().st_uid in (0, os.geteuid()) and folder != Path("/dev/shm")  # which is all programs'
    if not is_ours or (not (folder / LOCK).exists() and any(folder.iterdir())):
        raise UnsealError(f"{folder} is another user's, or holds other files; choose an empty folder")
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UnsealError(f"another unseal.py fills {folder}; stop it, or choose another folder") from None
    for path in [*folder.glob(READY), *folder.glob(f"{STAGE}*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lock


def catch(handler: Callable[..., object] | signal.Handlers) -> dict[int, Any]:
    """Handle the signals that stop this process, but those that are ignored, as by nohup; return the old handlers."""
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt at the first signal; a second one must not stop what is cleaned up after it."""
    catch(lambda *_: None)
    stopping.append(True)
    raise KeyboardInterrupt


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt only after the block, when a server that has started is known and can be ended."""
    came: list[int] = []
    handlers = catch(lambda *_: came.append(1))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        interrupt()


def serve(unsealer: Unsealer, watch: bool, command: list[str]) -> int:
    """Open the models, start the command if there is one, and watch; return the exit code.

    Ctrl-C does not reach the command. It ends when this function does, or with this process, even by kill -9; then the
    folder is removed.
    """
    server = None
    try:
        unsealer.look()
        if not unsealer.opened:
            raise UnsealError(f"no version of {unsealer.server} is accepted")
        (unsealer.folder / READY).write_text("".join(f"{name}\n" for name in sorted(unsealer.opened)))
        if command:
            with deferred_interrupts():
                server = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *command], start_new_session=True)
        while server.poll() is None if server else watch:
            if stopping:  # in a destructor, Python has ignored the exception
                raise KeyboardInterrupt
            time.sleep(POLL_S)
            try:
                if watch:
                    unsealer.look()
            except Exception as error:  # noqa: BLE001 - served versions stay, whatever fails
                unsealer.tell("unseal", f"all stays as it is: {error}")
        return server.returncode if server else 0
    finally:
        if command:
            try:
                catch(lambda *_: None)  # a first signal may come until here
            finally:
                if server:
                    server.terminate()
                    server.wait()
                shutil.rmtree(unsealer.folder, ignore_errors=True)  # the folder itself may be a mount, which stays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", choices=PLACES, help="whose models")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder in memory that the server reads")
    parser.add_argument("--watch", action="store_true", help="look again every second (default: look once)")
    parser.add_argument("--home", type=Path, default=FOLDER, help="folder of keys and sealed (default: this one)")
    parser.add_argument("--allow-disk", action="store_true", help="let DIR lie on a disk (default: refuse)")
    words = [*sys.argv[1:], "--"]
    command = words[words.index("--") + 1 : -1]
    arguments = parser.parse_args(words[: words.index("--")])
    catch(interrupt)
    try:
        if command and not shutil.which(command[0]):
            raise UnsealError(f"{command[0]} is no program on PATH")
        folder = Path(os.path.realpath(arguments.to))  # a link cannot be removed, and may lead elsewhere later
        with claim(folder, arguments.allow_disk):
            sys.exit(serve(Unsealer(arguments.server, folder, arguments.home), arguments.watch, command))
    except OSError as error:
        sys.exit(f"unseal: {error}")
    except KeyboardInterrupt:
        interrupted = f"unseal: interrupted; {arguments.to} holds the versions that were accepted until then"
        sys.exit(0 if arguments.watch or command else interrupted)
    finally:
        catch(signal.SIG_IGN)  # with a handler, a signal would kill Python while it ends, which gives back the defaults


if __name__ == "__main__":
    main()
