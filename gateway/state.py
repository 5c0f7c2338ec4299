"""The gateway's state: the split, the API keys and the certificate, as files in its state folder.

HAProxy itself reads these files at its start, so that a restart and a reload find the last settings.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

SPLIT, KEYS, RATES, SERVERS = "split.map", "keys.map", "rates.map", "servers.map"
CERTIFICATE = "tls.pem"
ADMIN_SOCKET = "admin.sock"
CERTIFICATE_DAYS = 365
ANSWER_TIMEOUT_S = 30.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class StateError(Exception):
    """The state cannot be used; the message is one line with the remedy."""


class State:
    """The state folder. Changes replace whole files, under a lock, and are then sent to a running HAProxy."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()

    def create(self) -> None:
        """Make the folder, readable only by its owner, and the files that HAProxy needs."""
        with self.lock():
            pass

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let one command at a time read, change and write; first make the folder and its files if they are missing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = (self.folder / "lock").open("w")
        except OSError as error:
            raise self._cannot_be_used(error) from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                for name in (SPLIT, KEYS, RATES):
                    if not (self.folder / name).exists():
                        self.write(name, {})
            except OSError as error:
                raise self._cannot_be_used(error) from None
            yield

    def _cannot_be_used(self, error: OSError) -> StateError:
        return StateError(f"{self.folder}: {error.strerror}; choose another folder with --state")

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Be the only gateway that runs in the folder; StateError if there is another."""
        with (self.folder / "running").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(
                    f"a gateway runs in {self.folder}; stop it, or choose another folder with --state"
                ) from None
            yield

    def is_claimed(self) -> bool:
        """Return whether a gateway runs in the folder."""
        try:
            with (self.folder / "running").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def read(self, name: str) -> dict[str, str]:
        """Return a map file's pairs; StateError if a line is not a pair."""
        path = self.folder / name
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise StateError(f"{path} cannot be read ({error}); {self.remedy(name)}") from None
        pairs = [line.split() for line in lines if line.strip() and not line.startswith("#")]
        for pair in pairs:
            if len(pair) != 2:
                raise StateError(f"{path} is damaged: {' '.join(pair)[:60]!r} is not a pair; {self.remedy(name)}")
        return dict(pairs)

    def read_percents(self, name: str) -> dict[str, int]:
        """Return the numbers of SPLIT or RATES; StateError for anything else, or if SPLIT has no percentage."""
        numbers = {}
        for key, text in self.read(name).items():
            if not (text.isascii() and text.isdecimal()) or (name == SPLIT and int(text) > 100):
                wanted = "0 to 100" if name == SPLIT else "a number"
                raise StateError(
                    f"{self.folder / name} is damaged: {key} has {text[:20]!r}, expected {wanted}; {self.remedy(name)}"
                )
            numbers[key] = int(text)
        return numbers

    def remedy(self, name: str) -> str:
        lost = "every server then begins with v2=0" if name == SPLIT else "keys must be added again"
        return f"correct it or remove it ({lost})"

    def write(self, name: str, pairs: dict) -> None:
        """Replace a map file."""
        self._replace(name, "".join(f"{key} {value}\n" for key, value in pairs.items()).encode())

    def _replace(self, name: str, content: bytes) -> None:
        """Replace a file in one step: a reader or a crash finds the old or the new one. Only its owner can read it."""
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{name}-")  # mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.folder / name)
        except BaseException:
            Path(temporary).unlink()
            raise

    def ask(self, command: str, socket_name: str = ADMIN_SOCKET) -> str:
        """Send one command to HAProxy's admin socket, return its reply; OSError if no gateway runs."""
        path = self.folder / socket_name
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(ANSWER_TIMEOUT_S)
            try:
                admin.connect(str(path))
            except OSError as error:
                if "too long" not in str(error):
                    raise
                # A socket's path may have 107 bytes; this path to the same file is shorter.
                folder = os.open(self.folder, os.O_PATH)
                try:
                    admin.connect(f"/proc/self/fd/{folder}/{socket_name}")
                finally:
                    os.close(folder)
            admin.sendall(command.encode() + b"\n")
            answer = b""
            while part := admin.recv(1 << 16):
                answer += part
        return answer.decode()

    def tell(self, command: str) -> bool:
        """Send a command without a reply; return False if no gateway runs. StateError if HAProxy refuses it."""
        try:
            answer = self.ask(command).strip()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        if answer and not (command.startswith("del ") and "not found" in answer):
            raise StateError(f"HAProxy refused {command.split()[:2]}: {answer}; start the gateway again")
        return True

    def set_split(self, percents: dict[str, int]) -> bool:
        """Give version 2 these percentages of the users, by server; return whether a running gateway has them."""
        with self.lock():
            self.write(SPLIT, {**self.read_percents(SPLIT), **percents})
            told, refused = [], []
            for server, percent in percents.items():
                try:
                    told.append(self.tell(f"set map {SPLIT} {server} {percent}"))
                except StateError as error:  # the other servers are set all the same
                    refused.append(error)
        if refused:
            raise refused[0]
        return all(told)

    def add_key(self, owner: str, rate: int | None) -> str:
        """Make a key for `owner`, keep its hash, return the key, which cannot be shown again."""
        if not NAME.fullmatch(owner):
            raise StateError(f"the name {owner!r}: use 1 to 64 letters, digits and . _ @ -")
        key = f"gw_{secrets.token_urlsafe(24)}"
        with self.lock():
            keys = self.read(KEYS)
            if owner in keys.values():
                raise StateError(f"{owner} has a key already; revoke that first, or choose another name")
            digest = hash_key(key)
            if rate:
                self.write(RATES, {**self.read(RATES), owner: rate})
                self.tell(f"add map {RATES} {owner} {rate}")
            self.write(KEYS, {**keys, digest: owner})
            self.tell(f"add map {KEYS} {digest} {owner}")
        return key

    def revoke_key(self, owner: str) -> None:
        """Make the key of `owner` invalid from now on."""
        with self.lock():
            keys = self.read(KEYS)
            digests = [digest for digest, name in keys.items() if name == owner]
            if not digests:
                raise StateError(f"no key of {owner!r}; there are {', '.join(sorted(keys.values())) or 'none'}")
            for digest in digests:  # first, so that the key is invalid whatever fails later
                self.tell(f"del map {KEYS} {digest}")
            self.write(KEYS, {digest: name for digest, name in keys.items() if name != owner})
            rates = self.read(RATES)
            if rates.pop(owner, None):
                self.write(RATES, rates)
                self.tell(f"del map {RATES} {owner}")

    def make_certificate(self) -> bool:
        """Make a self-signed certificate for this machine if there is none; return whether one was made."""
        path = self.folder / CERTIFICATE
        if path.exists():
            return False
        try:
            certificate = sign_certificate()
        except ImportError:
            raise StateError(
                f"a certificate needs the package cryptography: python -m pip install cryptography (Debian: sudo apt "
                f"install python3-cryptography), or put your own into {path}"
            ) from None
        self._replace(CERTIFICATE, certificate)
        return True


def sign_certificate() -> bytes:
    """Return a self-signed certificate for localhost with its key, as PEM; ImportError without `cryptography`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    hosts = [
        *map(x509.DNSName, ("localhost", "gateway")),
        *(x509.IPAddress(ip_address(a)) for a in ("127.0.0.1", "::1")),
    ]
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def hash_key(key: str) -> str:
    """Return the stored hash of a key. A key has 24 random bytes, so a plain SHA-256 cannot be inverted by guessing."""
    return hashlib.sha256(key.encode()).hexdigest()
