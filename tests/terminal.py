"""A terminal as a reader has it: an interactive bash on a pseudo-terminal, with a keyboard and a screen."""

import codecs
import contextlib
import os
import re
import subprocess
import termios
import threading
from pathlib import Path

import psutil

from helpers import DEADLINE_S, wait_until

# What bash shows where a reader sees `$ `, `> ` and, in place of nothing, that a command failed.
PROMPT, CONTINUATION = "\x1e$?\x1f", "\x1e>\x1f"
PROMPTED = re.compile(r"\x1e(\d+|>)\x1f")
FAILED = re.compile(r"\x1efailed: (.*?)\x1f", re.DOTALL)
SHOW_FAILURES = r"""set -o pipefail; trap 'printf "\036failed: %s\037" "$BASH_COMMAND" >&2' ERR"""
CTRL_C = b"\x03"
ROWS, COLUMNS = 50, 200
COMMAND_TIMEOUT_S = 1800.0  # make benchmark is the longest command, and takes a few minutes


class Terminal:
    """An interactive bash in `folder`; its working directory, variables and jobs last until `close`.

    `name` marks all that is ever started in it, in the environment variable READERS_TERMINAL.
    """

    def __init__(self, name: str, folder: Path, environment: dict[str, str]):
        self.name = name
        self.screen = ""  # all that was ever shown, with the marks of the prompts
        self.keyboard, screen_fd = os.openpty()
        termios.tcsetwinsize(screen_fd, (ROWS, COLUMNS))
        settings = termios.tcgetattr(screen_fd)
        settings[3] &= ~termios.ECHO  # only what is printed is to be seen
        termios.tcsetattr(screen_fd, termios.TCSANOW, settings)
        self.bash = subprocess.Popen(
            # The session's leader opens the terminal, which so becomes its own: Ctrl-C reaches the command in front.
            ["sh", "-c", 'exec bash --noprofile --norc --noediting -i <>"$0" >&0 2>&1', os.ttyname(screen_fd)],
            cwd=folder,
            env={**environment, "READERS_TERMINAL": name, "PS1": PROMPT, "PS2": CONTINUATION, "TERM": "dumb"},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait_for_prompt(0, "bash starts")
        os.close(screen_fd)  # bash holds it now
        self.type(SHOW_FAILURES)

    def _read(self) -> None:
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        with contextlib.suppress(OSError):  # the last program has closed the terminal
            while shown := os.read(self.keyboard, 65536):
                self.screen += decode(shown)

    def shown_since(self, start: int) -> str:
        """Return the lines on the screen after its first `start` characters, without colours and prompts."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.screen[start:])
        return re.sub(r"\x1e[^\x1f]*\x1f", "\n", text)

    def find_unfinished_line(self, start: int) -> str | None:
        """Return the last line before a prompt that has come since `start` and does not begin a line; None for none."""
        found = re.compile(r"([^\r\n\x1e\x1f]+)\x1e\d+\x1f").search(self.screen, start)
        return found and found[1]

    def press(self, keys: bytes) -> None:
        os.write(self.keyboard, keys)

    def interrupt(self, start: int) -> None:
        """Press Ctrl-C once a program is in front: bash, between two commands or before it has become one, loses it.

        `start` is the screen's length when the line was typed.
        """

        def is_in_front() -> bool:
            group = os.tcgetpgrp(self.keyboard)
            for process in self.list_processes():
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    if os.getpgid(process.pid) == group and process.name() not in ("bash", "sh"):
                        return True
            return False

        wait_until(lambda: is_in_front() or self.has_prompted_since(start), "no program is in front")
        self.press(CTRL_C)

    def has_prompted_since(self, start: int) -> bool:
        return PROMPTED.search(self.screen, start) is not None

    def _wait_for_prompt(self, start: int, what: str) -> re.Match:
        return wait_until(
            lambda: PROMPTED.search(self.screen, start),
            lambda: f"{what}; the terminal shows\n{self.shown_since(start)}",
            while_alive=self.bash,
            timeout_s=COMMAND_TIMEOUT_S,
        )

    def type(self, lines: str) -> str:
        """Type line by line, each when bash asks for it; return what appeared. A failed command is a failure."""
        start = len(self.screen)
        status = "0"
        for line in lines.splitlines():
            before = len(self.screen)
            self.press(f"{line}\n".encode())
            status = self._wait_for_prompt(before, f"`{line}` does not end")[1]
            failed = FAILED.search(self.screen, before)
            if failed or status not in ("0", ">"):
                command = failed[1] if failed else line
                raise AssertionError(f"`{command}` failed\n{self.shown_since(start)}")
        assert status == "0", f"bash waits for the rest of\n{lines}"
        return self.shown_since(start)

    def list_processes(self) -> list[psutil.Process]:
        """Return all that was started here and still runs, wherever it has gone in the meantime."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != self.bash.pid and process.environ().get("READERS_TERMINAL") == self.name:
                    found.append(process)
        return found

    def wait_until_empty(self, what: str) -> None:
        """Wait until nothing that was started here runs."""
        wait_until(lambda: not self.list_processes(), lambda: f"{what} left {self.list_processes()} running")

    def close(self) -> None:
        """Close the window, and end all that was started in it."""
        for process in self.list_processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.bash.kill()
        self.bash.wait()
        self._reader.join(DEADLINE_S)
        os.close(self.keyboard)
