"""Types each README, command by command and in order, into two lasting terminals, as a reader does.

What a reader must know of a README, and this test reads as well:

```bash           typed line by line into the first terminal; what it changes (cd, variables, the environment) lasts.
```bash server    typed into the second terminal, which it keeps. After "third terminal" in the text: into a third.
```bash cluster   not typed: it needs a Kubernetes cluster. ```bash machines: nor this, it needs several machines.
```text, ```json  what the command before it prints; … stands for anything. A server is ready when it has printed it.
```text measured  the same, and each number stands for any number: it is another on each machine.
```text server    what the second terminal shows after the commands before it.
in every terminal, said before the first block: that block is typed into each terminal.
Stop the server with Ctrl-C (or any "stop … with Ctrl-C"): pressed where it is said, in the terminal of the newest
                  server. Nothing else stops a server: a README that forgets to say it fails at the next block that
                  needs the terminal or the port.

At the end of the page Ctrl-C ends what still serves, and nothing that was ever started may be left.
"""

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import FRAMEWORKS, REPOSITORY_DIR, refuse_taken_ports
from endpoints.base import load_endpoints
from helpers import run, wait_until
from terminal import Terminal

# `make benchmark` runs in full for a student; here it does all of its steps, with shorter windows.
SHORT_BENCHMARK = "--rounds 1 --seconds 0.3 --settle-seconds 0 --connections 1 16 --rows 1 --rates 100"
# The same with fewer users, and with room for a machine whose cores others use.
SHORT_AB_TEST = "--margin 4 --latency-margin 100"
SHORT_CANARY = "--margin 8 --latency-margin 100"
NO_ENGINE = "needs a Docker engine: test_containers.py does what it does, on an engine of its own"
NOT_EXECUTED = {
    "make calibrate": "test_calibrate.py runs it, and does not take a busy machine for a broken bound",
    "make peers": "installs 2 GB: test_peers.py starts what is installed",
    "make benchmark-peers": "installs 2 GB: test_peers.py starts what is installed",
    "make test": "it is a command that runs these tests",
    'make check CHECK_OPTIONS="--answer"': "it asks for answers: test_check.py gives them",
    "make setup": "it has been run, or no test would run",
    "make lint": "it looks at the texts of programs",
    "python benchmarks/choose.py --rate 5000 --p99-ms 20 --memory-mb 600 --maintained": "test_choose.py runs it",
    "make docker-build": NO_ENGINE,
    "make docker-up": NO_ENGINE,
    "make docker-verify": NO_ENGINE,
    "make docker-benchmark": NO_ENGINE,
    "make docker-measure": NO_ENGINE,
    "make docker-down": NO_ENGINE,
    "ONNX_PORT= ONNX_GRPC_PORT= docker compose --profile gateway up --detach --wait --scale onnx=3": NO_ENGINE,
    r"""curl -s -w '\n' -X POST http://localhost:8090/onnx/predict -H "Content-Type: application/json" """
    r"""-d '{"data": [[13.82, 24.49, 0.1162, 0.1357, 0.2275]]}'""": NO_ENGINE,
    "(cd / && bentoml containerize my_model_service:latest --image-tag my_model_service:latest)": NO_ENGINE,
    "docker run --rm -p 127.0.0.1:3001:3000 my_model_service:latest": NO_ENGINE,
    "(cd ../onnx && python convert_to_onnx.py)": "onnx/README.md runs it; here make train has been run",
    "sudo RUNLEVEL=1 apt-get install --no-install-recommends prometheus prometheus-alertmanager": ".ci/run does it",
    "docker build -t my_model-torchserve .": NO_ENGINE,
    "docker run --rm -d --name my_model -p 127.0.0.1:9080:8080 my_model-torchserve": NO_ENGINE,
    "docker stop my_model": NO_ENGINE,
    "docker build -t onnx-server .": NO_ENGINE,
    "docker run --rm -p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 onnx-server": NO_ENGINE,
    "docker compose --file ../docker-compose.yml --file docker-compose.yml up --detach --wait": NO_ENGINE,
    "docker compose up --detach --wait": NO_ENGINE,
    "docker compose down": NO_ENGINE,
}

FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
STOP = re.compile(r"\b[Ss]top(\s+(the\s+\w+|it))?\s+with\s+Ctrl-C\b")
EVERY_TERMINAL = re.compile(r"\bin\s+every\s+terminal\b", re.IGNORECASE)
THIRD_TERMINAL = re.compile(r"\bthird\s+terminal\b")
NUMBER = re.compile(r" *[-+]?\d[\d,.]*(T\d+Z|e[-+]?\d+)? *")  # with the blanks that line it up in a table
TYPED = ("README.md", "REFERENCE.md")  # of a folder: the lesson, and then what is looked up
WORDS_PER_MINUTE, READING_MINUTES = 220, 8  # of a lesson's prose; its commands take the other half of a quarter hour
FOLDERS = (*FRAMEWORKS, "gateway", "monitoring", "sealing", "kubernetes", "data")
LONG = ("monitoring", "sealing")  # minutes each: their lessons are typed by make test-slow, as every REFERENCE.md is
NOT_TYPED = {  # fences whose commands need what no CI here has
    "bash cluster": "a Kubernetes cluster: test_kubernetes.py checks what the commands would send",
    "bash machines": "several machines: test_swarm.py makes three of this one, and does what the commands do",
}


@dataclass
class Step:
    """What a reader does next: types commands, starts a server, watches its terminal, or stops it."""

    kind: str  # type, serve, watch or stop
    line: int  # of the README
    commands: str = ""
    terminal: str = "first"
    expected: list[str] = field(default_factory=list)  # the lines that appear then


def read_steps(text: str) -> list[Step]:
    """Return what the README tells its reader to do, in order."""
    steps: list[Step] = []
    end, takes_output = 0, False
    for fence in [*FENCE.finditer(text), None]:
        prose = text[end : fence.start() if fence else None]
        for stop in STOP.finditer(prose):
            steps.append(Step("stop", text.count("\n", 0, end + stop.start()) + 1))
        if fence is None:
            break
        info, lines, end = fence["info"].strip(), fence["text"].splitlines(), fence.end()
        line = text.count("\n", 0, fence.start()) + 1
        printed = [line.rstrip() for line in lines if line.strip()]
        if info in ("bash", "bash server"):
            commands = "\n".join(line for line in lines if line.strip() not in NOT_EXECUTED)
            terminal = "first" if info == "bash" else "third" if THIRD_TERMINAL.search(prose) else "second"
            steps.append(Step("type" if info == "bash" else "serve", line, commands, terminal))
        elif info == "text server":
            steps.append(Step("watch", line, expected=printed))
        elif info in ("text", "text measured", "json") and takes_output:
            steps[-1].expected = [NUMBER.sub("…", line) for line in printed] if info == "text measured" else printed
        takes_output = info in ("bash", "bash server")
    return [step for step in steps if step.kind in ("stop", "watch") or step.commands.strip()]


def find_missing(expected: list[str], output: str) -> str | None:
    """Return the first expected line that does not follow in the output, or None when all are there in order."""
    lines = iter(output.splitlines())
    for wanted in expected:
        pattern = re.compile(".*".join(re.escape(part) for part in wanted.split("…")))
        if not any(pattern.fullmatch(line.rstrip()) for line in lines):
            return wanted
    return None


class Reader:
    """Types a README into terminals, which open in `folder` when they are first needed."""

    def __init__(self, readme: str, text: str, folder: Path, environment: dict[str, str]):
        self.readme, self.folder, self.environment = readme, folder, environment
        self.steps = read_steps(text)
        self.in_every_terminal = ""
        if EVERY_TERMINAL.search(text.partition("```bash")[0]):
            self.in_every_terminal = self.steps.pop(0).commands
        self.terminals: dict[str, Terminal] = {}
        self.serving: dict[str, int] = {}  # by terminal, the newest last: where its server begins on the screen
        self.seen: dict[str, int] = {}  # by terminal: how much was on its screen before the last typed block

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for terminal in self.terminals.values():
            terminal.close()

    def read(self) -> None:
        """Do all steps, then stop what still serves, and see that nothing is left."""
        for step in self.steps:
            try:
                getattr(self, step.kind)(step)
            except AssertionError as error:
                raise AssertionError(f"{self.readme}:{step.line}: {error}") from None
        while self.serving:
            self.stop()
        for name, terminal in self.terminals.items():
            terminal.wait_until_empty(f"{self.readme}: the {name} terminal's commands")

    def open(self, name: str) -> Terminal:
        if name not in self.terminals:
            self.terminals[name] = Terminal(f"{self.folder}:{name}", self.folder, self.environment)
            self.terminals[name].type(self.in_every_terminal)
        return self.terminals[name]

    def type(self, step: Step) -> None:
        terminal = self.open(step.terminal)
        self.seen = {name: len(other.screen) for name, other in self.terminals.items()}
        shown = terminal.type(step.commands)
        line = terminal.find_unfinished_line(self.seen.get(step.terminal, 0))
        assert line is None, f"the prompt sticks to {line!r}: end the line, curl does it with -w '\\n'"
        missing = find_missing(step.expected, shown)
        assert missing is None, f"the README shows {missing!r}, the commands printed\n{shown}"

    def serve(self, step: Step) -> None:
        assert step.expected, "a server needs a text block that ends with the line that says it is ready"
        assert step.terminal not in self.serving, (
            f"the server in the {step.terminal} terminal still runs: say to stop it"
        )
        terminal = self.open(step.terminal)
        *first, last = step.commands.splitlines()
        terminal.type("\n".join(first))
        start = self.serving[step.terminal] = len(terminal.screen)
        terminal.press(f"{last}\n".encode())
        self.wait_for(step.expected, step.terminal, start)

    def watch(self, step: Step) -> None:
        assert self.serving, "no server runs whose terminal could show this"
        name = list(self.serving)[-1]
        self.wait_for(step.expected, name, self.seen[name])

    def wait_for(self, expected: list[str], name: str, start: int) -> None:
        """Wait until the lines have appeared on a terminal whose server goes on."""
        terminal = self.terminals[name]

        def says() -> str:
            missing = find_missing(expected, terminal.shown_since(start))
            return f"the {name} terminal does not show {missing!r}, but\n{terminal.shown_since(start)}"

        def has_come() -> bool:
            ended = terminal.has_prompted_since(self.serving[name])  # first: its last words count
            come = find_missing(expected, terminal.shown_since(start)) is None
            assert come or not ended, f"the server has ended; {says()}"
            return come

        wait_until(has_come, says, while_alive=terminal.bash)

    def stop(self, _step: Step | None = None) -> None:
        """Press Ctrl-C once in the newest server's terminal, and see that it ends without a word of complaint."""
        assert self.serving, "there is no server to stop"
        name, start = self.serving.popitem()
        terminal = self.terminals[name]
        assert not terminal.has_prompted_since(start), f"the server has ended before\n{terminal.shown_since(start)}"
        typed, start = start, len(terminal.screen)
        terminal.interrupt(typed)
        wait_until(
            lambda: terminal.has_prompted_since(start), lambda: f"Ctrl-C does not end it\n{terminal.shown_since(start)}"
        )
        terminal.wait_until_empty("Ctrl-C")
        assert "Traceback" not in terminal.shown_since(start), terminal.shown_since(start)


def list_files(*options: str) -> list[str]:
    listing = run("git", "ls-files", "--exclude-standard", "--others", *options, check=True)
    return [path for path in listing.stdout.splitlines() if (REPOSITORY_DIR / path).is_file()]


def list_readmes() -> list[str]:
    return [path for path in list_pages() if Path(path).name in TYPED]


def list_pages() -> list[str]:
    return sorted(path for path in list_files("--cached") if path.endswith(".md"))


def copy_files(paths: list[str], folder: Path) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY_DIR / path, folder / path)


@pytest.fixture
def environment(tmp_path):
    """The variables of a reader who has a new account, and no virtual environment yet."""
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder) != Path(sys.executable).parent]
    (tmp_path / "home").mkdir()
    # TorchServe's pid file and sockets lie in $TMPDIR: not in a shared one, and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="t-", ignore_cleanup_errors=True) as temporary:
        yield {
            **{"PATH": os.pathsep.join(path), "HOME": str(tmp_path / "home"), "LANG": "C.UTF-8", "COLUMNS": "200"},
            **{"TMPDIR": temporary, "TEMP": temporary, "FREE_PORTS": os.environ["FREE_PORTS"]},
            "VIRTUAL_ENV_DISABLE_PROMPT": "1",
            "BENCHMARK_OPTIONS": SHORT_BENCHMARK,
            "AB_TEST_OPTIONS": SHORT_AB_TEST,
            "CANARY_OPTIONS": SHORT_CANARY,
        }


def read_whole(
    folder: str, tmp_path: Path, environment: dict[str, str], trained: bool, pages: tuple[str, ...] = TYPED
) -> None:
    """Read the folder's pages in a fresh copy of the repository, with the models of this one if `trained`."""
    copy = tmp_path / "repository"
    copy_files(list_files("--cached"), copy)
    if trained:
        made = list_files("--ignored", *FRAMEWORKS)
        copy_files([path for path in made if "__pycache__" not in path and "prometheus" not in path], copy)
    (copy / ".venv").symlink_to(REPOSITORY_DIR / ".venv")
    for page in pages:
        path = Path(folder, page)
        if (REPOSITORY_DIR / path).exists():
            with Reader(str(path), (REPOSITORY_DIR / path).read_text(), copy, environment) as reader:
                reader.read()


@pytest.mark.readmes
@pytest.mark.parametrize("folder", [name for name in FOLDERS if name not in LONG])
def test_every_command_of_a_folders_lesson_works_as_written_and_in_order(folder, tmp_path, environment):
    if folder in FRAMEWORKS:
        refuse_taken_ports(folder)
    read_whole(folder, tmp_path, environment, folder not in FRAMEWORKS, TYPED[:1])


@pytest.mark.slow
@pytest.mark.parametrize("folder", [name for name in FOLDERS if (REPOSITORY_DIR / name / TYPED[1]).exists()])
def test_every_command_of_a_folders_pages_works_as_written_and_in_order(folder, tmp_path, environment):
    if folder in FRAMEWORKS:
        refuse_taken_ports(folder)
    read_whole(folder, tmp_path, environment, folder not in FRAMEWORKS)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "benchmarks"])
def test_every_command_of_the_readmes_about_all_servers_works_as_written_and_in_order(folder, tmp_path, environment):
    refuse_taken_ports()
    read_whole(folder, tmp_path, environment, trained=True)


SERVER = "```bash server\necho ready; cat\n```\n```text\nready\n```\n"  # serves until Ctrl-C


@pytest.mark.parametrize(
    "text",
    [
        "```bash\ncd data\nNUMBER=7\n```\n```bash\necho ${PWD##*/} $NUMBER\n```\n```text\ndata 7\n```\n",
        "```bash\nfor word in a b; do\n  echo $word\ndone\n```\n```text\na\nb\n```\n",
        SERVER + "Stop the server\nwith Ctrl-C.\n" + SERVER,
        SERVER + "In a third terminal:\n" + SERVER,
        "In every terminal:\n```bash\nWORD=ready\n```\n" + SERVER.replace("echo ready", "echo $WORD"),
        "```bash\necho 3 of 4: 2.7e-5 s\n```\n```text measured\n1 of 2: 3.1e-07 s\n```\n",
        SERVER.replace("cat", "tail -f asked") + "```bash\necho seen >> asked\n```\n```text server\nseen\n```\n",
    ],
    ids=["it lasts", "a loop", "stopped", "third terminal", "every terminal", "measured", "watched"],
)
def test_a_readme_that_says_all_is_read_to_its_end(text, tmp_path, environment):
    (tmp_path / "data").mkdir()
    (tmp_path / "asked").touch()
    with Reader("a README", text, tmp_path, environment) as reader:
        reader.read()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SERVER + SERVER, "the second terminal still runs"),
        ("```bash\nfalse\ntrue\n```\n", "`false` failed"),
        ("```bash\nfor word in a b; do\n  test $word = b\ndone\n```\n", "failed"),
        ("```bash\nfalse | cat\n```\n", "failed"),
        ("```bash\necho 1\n```\n```text\n2\n```\n", "the README shows '2'"),
        ("```bash server\necho ready\n```\n```text\nready to serve\n```\n", "the server has ended"),
        ("```bash server\necho ready; exit 0\n```\n```text\nready to serve\n```\n", "ended"),
        ("Stop the server with Ctrl-C.\n", "no server to stop"),
        (SERVER.replace("cat", "(trap 'echo Traceback' INT; cat)") + "Stop it with Ctrl-C.\n", "Traceback"),
        ("```bash\necho 1\nprintf 2\ncd .\n```\n", "the prompt sticks to '2'"),
    ],
    ids=[
        "not stopped",
        "fails",
        "fails in a loop",
        "fails in a pipe",
        "other output",
        "ends",
        "exits",
        "none",
        "traces",
        "no line's end",
    ],
)
def test_a_readme_that_forgets_a_step_or_shows_another_output_fails(text, reason, tmp_path, environment):
    with Reader("a README", text, tmp_path, environment) as reader, pytest.raises(AssertionError, match=reason):
        reader.read()


def test_the_tests_that_a_readme_names_are_there():
    named = {
        command
        for readme in list_readmes()
        for command in re.findall(r"`python\s+-m\s+pytest\s([^`]+)`", (REPOSITORY_DIR / readme).read_text())
    }
    assert named
    options = argparse.ArgumentParser(exit_on_error=False)
    for flag in ("-m", "-k"):
        options.add_argument(flag, default="")
    options.add_argument("-s", action="store_true")
    options.add_argument("path")
    for command in named:
        wanted = options.parse_args(shlex.split(command))
        text = (REPOSITORY_DIR / wanted.path).read_text()
        tests = [
            ast.unparse(node)
            for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and wanted.k in node.name
        ]
        marks = [f"pytestmark = pytest.mark.{wanted.m}" in text, *(f"pytest.mark.{wanted.m}" in test for test in tests)]
        assert tests and any(marks), f"pytest {command} selects no test"


def test_commands_stand_only_in_fences_that_are_typed():
    allowed = {
        *NOT_TYPED,
        "bash",
        "bash server",
        "text",
        "text measured",
        "text server",
        "json",
        "python",
        "yaml",
        "properties",
        "mermaid",
        "diff",
    }
    for page in list_pages():
        for fence in FENCE.finditer((REPOSITORY_DIR / page).read_text()):
            kind = fence["info"].strip()
            assert kind in {*allowed, "protobuf"}, f"{page}: a fence of kind {kind!r} would not be typed"


@pytest.mark.parametrize("readme", list_readmes())
def test_a_wait_of_a_readme_ends_and_shows_that_no_server_listens(readme):
    for fence in FENCE.finditer((REPOSITORY_DIR / readme).read_text()):
        if not fence["info"].startswith("bash"):
            continue
        endless = re.search(r"^\s*(until|while)\b.*", fence["text"], re.MULTILINE)
        assert not endless, f"it never ends if the server has died: {endless[0]}"
        for line in re.findall(r"^.*\bcurl .*(?:--retry |&& break).*$", fence["text"], re.MULTILINE):
            assert "curl -sS " in line, f"without -S curl does not tell why it waits: {line}"


@pytest.mark.parametrize("readme", [path for path in list_readmes() if path != "README.md"])
def test_a_readme_says_where_its_first_cd_starts(readme):
    prose, _, commands = (REPOSITORY_DIR / readme).read_text().partition("```bash\n")
    assert not commands.startswith("cd ") or re.search(r"\bfrom the (repository's )?root\b", prose)


def list_anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them, and those that it sets itself."""
    text = FENCE.sub("", page.read_text())
    titles = [
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
    ]
    numbered = [
        title if (seen := titles[:at].count(title)) == 0 else f"{title}-{seen}" for at, title in enumerate(titles)
    ]
    return {*numbered, *re.findall(r'<a (?:id|name)="([^"]+)"', text)}


@pytest.mark.parametrize("page", list_pages())
def test_every_link_of_a_page_leads_somewhere(page):
    text = FENCE.sub("", (REPOSITORY_DIR / page).read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (REPOSITORY_DIR / page).parent / path if path else REPOSITORY_DIR / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in list_anchors(target), f"{page}: no heading for {link}"


def test_every_readme_is_read_by_a_test():
    assert {str(Path(readme).parent) for readme in list_readmes()} == {".", "benchmarks", *FOLDERS}


@pytest.mark.parametrize("folder", [".", "benchmarks", *FOLDERS])
def test_a_lesson_is_read_in_eight_minutes(folder):
    prose = FENCE.sub("", (REPOSITORY_DIR / folder / "README.md").read_text())
    assert len(prose.split()) <= WORDS_PER_MINUTE * READING_MINUTES


def test_each_command_that_is_not_executed_stands_in_a_page():
    text = "\n".join((REPOSITORY_DIR / page).read_text() for page in list_pages())
    lines = {line.strip() for line in text.splitlines()}
    assert set(NOT_EXECUTED) <= lines, f"not in any page: {set(NOT_EXECUTED) - lines}"


def test_each_command_of_another_page_stands_in_a_readme_too_or_is_known_not_to_be_executed():
    """So that it is typed by a test, or there is a reason why not."""

    def commands(page: str) -> set[str]:
        fences = FENCE.finditer((REPOSITORY_DIR / page).read_text())
        texts = [fence["text"] for fence in fences if fence["info"].startswith("bash")]
        return {line.strip() for text in texts for line in text.splitlines() if line.strip()}

    typed = {command for readme in list_readmes() for command in commands(readme)}
    for page in set(list_pages()) - set(list_readmes()):
        assert commands(page) <= typed | set(NOT_EXECUTED), page


def test_the_root_readme_asks_each_server_as_its_folders_endpoint_does():
    asked = re.findall(
        r"^- `curl -s -X POST http://localhost:(\d+)(\S+) .*? -d '(.*)'`$",
        (REPOSITORY_DIR / "README.md").read_text(),
        re.M,
    )
    row = json.loads(asked[0][2])["data"]
    expected = []
    for name in FRAMEWORKS:
        endpoint = load_endpoints()[name]()
        expected.append((str(endpoint.port), endpoint.path(None), endpoint.body(row, None).decode()))
    assert sorted(asked) == sorted(expected)
