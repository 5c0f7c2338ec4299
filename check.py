"""Say what this checkout has done, objective by objective, from what lies in
its folders and results; nobody is asked.

    python check.py                     what is done, what comes next
    python check.py --answer            the tasks whose answer a program checks
    python check.py --answer TASK=NUMBER
    python check.py --grade NAME        judge an endpoint file, "add a server"

Tasks are asked of this machine's newest result, so every machine has answers of
its own. --grade starts the server and writes benchmarks/results/grade-NAME.md,
one page as a receipt. The rest writes nothing.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
RESULTS_DIR = ROOT / "benchmarks" / "results"
SHIPPED = ("sample.json", "peers.json", "containers.json", "gpu.json")  # results that come with the repository
TOLERANCE = 1e-5
NEAR = 0.1  # an answer is right within a tenth


@dataclass(frozen=True)
class Step:
    """One thing to have done: how it is seen, and the command that does it."""

    objective: str
    what: str
    see: Callable[["Checkout"], str]  # what was seen; "" if nothing was
    command: str


class Checkout:
    """The artefacts and results of a checkout."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        results = root / "benchmarks" / "results"
        self.results = {path.name: content for path in sorted(results.glob("*.json")) if path.name not in SHIPPED
                        and (content := _read(path)) is not None}  # fmt: skip

    def find(self, *patterns: str) -> str:
        """Name what lies at all of the patterns; "" unless every one of them matches."""
        found = [sorted(self.root.glob(pattern)) for pattern in patterns]
        return ", ".join(str(paths[0].relative_to(self.root)) for paths in found) if all(found) else ""

    def benchmarks(self) -> dict[str, dict[str, Any]]:
        """The benchmark results, by file; those of other commands have no profile."""
        return {name: result for name, result in self.results.items() if "profile" in _dict(result.get("settings"))}

    def predicted(self, framework: str, protocol: str) -> str:
        """Name the result in which a framework's server gave right answers over a protocol."""
        for name, result in self.benchmarks().items():
            for endpoint, about in _dict(result.get("endpoints")).items():
                if endpoint.partition("-")[0] == framework and about.get("protocol") == protocol:
                    differences = about.get("max_abs_difference") or {}
                    if len(differences) > 1 and max(differences.values()) <= TOLERANCE:
                        return f"{endpoint}, both versions, in {name}"
        return ""

    def experiment(self, kind: str, verdicts: tuple[str, ...] = ()) -> str:
        """Name the newest finished A/B test ("ab") or canary, with its verdict if the file has one."""
        for name, result in reversed(self.results.items()):
            if name.startswith(f"{kind}-") and result.get("looks") and not result.get("interrupted"):
                verdict = str(result.get("verdict", ""))
                if not verdicts or verdict in verdicts:
                    users = sum(len(look.get("users", [])) for look in result["looks"])
                    return f"{users:,} users in {name}" + (f", {verdict}" if verdict else "")
        return ""

    def finished_benchmark(self) -> str:
        for name, result in self.benchmarks().items():
            measured = {window["endpoint"].partition("-")[0] for window in result.get("windows", [])} - {"null"}
            if result.get("complete") and len(measured) > 1:
                return f"{', '.join(sorted(measured))} in {name}"
        return ""

    def swept_benchmark(self) -> str:
        """Name a result with offered rates, from which a choice can be made."""
        for name, result in self.benchmarks().items():
            if any(window.get("load") == "open" for window in result.get("windows", [])):
                return f"rates were offered in {name}: python benchmarks/choose.py benchmarks/results/{name}"
        return ""

    def added_server(self) -> str:
        """Name a graded endpoint whose file git does not know and is still the one that was graded."""
        for name, result in self.results.items():
            if name.startswith("grade-") and result.get("passed") and not self._is_tracked(result.get("file", "")):
                return f"{result['endpoint']}, {result['points']} of {result['most']} points, in {name}"
        return ""

    def _is_tracked(self, file: str) -> bool:
        path = self.root / "benchmarks" / "endpoints" / file
        if not file or not path.is_file():
            return True
        done = subprocess.run(
            ["git", "ls-files", "--error-unmatch", str(path)], cwd=self.root, capture_output=True, check=False
        )
        return done.returncode == 0


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def list_steps() -> list[Step]:
    """The learning objectives of the exercise, each with what shows that it was done."""
    torchserve, tensorflow = "Deploy PyTorch models with TorchServe", "Serve TensorFlow models with TF Serving"
    bentoml, onnx = "Use BentoML for multi-framework serving", "Optimize models with ONNX Runtime"
    versions, speed = "Implement model versioning and A/B testing", "Benchmark serving performance"
    choice, more = "Choose appropriate serving framework for use cases", "Add a server"

    def at(*patterns: str) -> Callable[[Checkout], str]:
        return lambda checkout: checkout.find(*patterns)

    def over(framework: str, protocol: str) -> Callable[[Checkout], str]:
        return lambda checkout: checkout.predicted(framework, protocol)

    benchmark = "make benchmark"
    return [
        Step(torchserve, "trained", at("torchserve/model.pth"), "cd torchserve && python train_model.py"),
        Step(torchserve, "archived", at("torchserve/model_store/*.mar"), "cd torchserve && python archive.py"),
        Step(torchserve, "predicted, REST", over("torchserve", "REST"), benchmark),
        Step(torchserve, "predicted, gRPC", over("torchserve", "gRPC"), benchmark),
        Step(tensorflow, "exported, two versions", at(*(f"tfserving/models/my_model/{n}/saved_model.pb" for n in "12")),
             "cd tfserving && python export_model.py"),
        Step(tensorflow, "predicted, REST", over("tfserving", "REST"), benchmark),
        Step(tensorflow, "predicted, gRPC", over("tfserving", "gRPC"), benchmark),
        Step(bentoml, "trained and saved", at("bentoml/store/models/my_model/latest"),
             "cd bentoml && python train_and_save.py"),
        Step(bentoml, "built", at("bentoml/store/bentos/my_model_service/latest"), "cd bentoml && bentoml build"),
        Step(bentoml, "predicted, REST", over("bentoml", "REST"), benchmark),
        Step(onnx, "converted, two versions", at(*(f"onnx/models/my_model/{n}/model.onnx" for n in "12")),
             "cd onnx && python convert_to_onnx.py"),
        Step(onnx, "optimized", at("onnx/*quant*.onnx"), "cd onnx && python optimize.py"),
        Step(onnx, "predicted, REST", over("onnx", "REST"), benchmark),
        Step(versions, "A/B test decided", lambda checkout: checkout.experiment("ab"), "make gateway; make ab-test"),
        Step(versions, "canary shipped or taken back",
             lambda checkout: checkout.experiment("canary", ("promote", "roll back")), "make gateway; make canary"),
        Step(speed, "several servers measured", Checkout.finished_benchmark, benchmark),
        Step(choice, "rates offered on this machine", Checkout.swept_benchmark, benchmark),
        Step(more, "graded and passed", Checkout.added_server, "make grade ENDPOINT=<yours>"),
    ]  # fmt: skip


def report(checkout: Checkout) -> int:
    """Print every step; return how many are open."""
    steps, first_open, objective = list_steps(), None, ""
    seen = [step.see(checkout) for step in steps]
    for step, found in zip(steps, seen, strict=True):
        if step.objective != objective:
            objective = step.objective
            print(objective)
        print(f"  {'done' if found else 'open':5}{step.what:31}{found or step.command}")
        first_open = first_open or (None if found else step)
    done = sum(map(bool, seen))
    print(f"{done} of {len(steps)} done" + (f"; next: {first_open.command}" if first_open else ""))
    return len(steps) - done


@dataclass(frozen=True)
class Task:
    """A question about this machine's newest result whose answer is a number."""

    name: str
    question: str
    low: float
    high: float


def list_tasks() -> list[Task]:
    """Return the tasks with the range of right answers, from the newest benchmark of this machine."""
    _find_rooms()
    from figures.measured import Measured
    from figures.result_file import find_newest_result, read_result
    from machine.environment import describe_machine
    from planning.capacity import CapacityError, count_replicas, held_rates

    path = find_newest_result(describe_machine())
    measured = Measured(read_result(path))
    connections = measured.settings["connections"]
    tasks = []
    for name in [name for name in measured.names if not measured.is_floor(name)][:1]:
        cell = measured.cell(name, connections[-1])
        if cell and connections[-1] > 1:
            mean_ms = float(cell.latencies_s.mean()) * 1e3
            tasks.append(Task(
                "little",
                f"{name} answers {cell.rate.estimate:,.0f} requests/s over {connections[-1]} connections in a closed "
                "loop. What is its mean latency, in ms? (Little's law)",
                mean_ms * (1 - NEAR), mean_ms * (1 + NEAR),
            ))  # fmt: skip
    objective_s = measured.settings["objective_p99_s"]
    for name in measured.knees:
        try:
            sustained, broken = held_rates(measured, name, objective_s)
        except CapacityError:
            continue
        replicas = count_replicas(10 * sustained, sustained)
        tasks.append(Task(
            "replicas",
            f"One {name} keeps up with {sustained:,.0f} requests/s. How many replicas do {10 * sustained:,.0f} take, "
            "at 70 % of that each, if one may die?",
            replicas, replicas,
        ))  # fmt: skip
        if broken:
            tasks.append(Task(
                "knee",
                f"In the report of {path.name}: at which rate, in requests/s, is {name} known to break? Name the "
                "lowest, or any up to twice what it keeps up with.",
                broken, 2 * sustained if 2 * sustained > broken else broken,
            ))  # fmt: skip
        break
    return tasks


def check_answer(text: str | None) -> int:
    tasks = {task.name: task for task in list_tasks()}
    if text is None:
        for task in tasks.values():
            print(f"{task.name}: {task.question}")
        print('answer with: make check CHECK_OPTIONS="--answer TASK=NUMBER"')
        return 0
    name, _, value = text.partition("=")
    if name not in tasks:
        sys.exit(f"check: {name}: no such task; there are {', '.join(tasks)}")
    try:
        number = float(value.replace(",", ""))
    except ValueError:
        sys.exit(f"check: {value!r} is no number")
    is_right = tasks[name].low <= number <= tasks[name].high
    print(f"{name}: {'right' if is_right else 'not right; look again'}")
    return 0 if is_right else 1


def grade_endpoint(name: str) -> int:
    """Judge one endpoint file and write the receipt; return 0 if it has passed."""
    _find_rooms()
    from endpoints.base import load_endpoints
    from machine.signals import interrupt_on_sigterm
    from servers.grading import format_receipt, grade, write_receipt

    interrupt_on_sigterm()
    try:
        classes = load_endpoints(with_peers=True)
    except (ValueError, ImportError, SyntaxError) as error:
        sys.exit(f"check: an endpoint file cannot be read: {error}")
    if name not in classes:
        sys.exit(
            f"check: {name}: no such endpoint; there are {', '.join(classes)}. benchmarks/REFERENCE.md: Add a server"
        )
    result = grade(classes[name], lambda part: print(f"{name}: {part} …", flush=True))
    print(format_receipt(result))
    print(f"wrote {write_receipt(result, RESULTS_DIR)}")
    return 0 if result.passed else 1


def _find_rooms() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answer", nargs="?", const="", metavar="TASK=NUMBER", help="list or check the tasks")
    parser.add_argument("--grade", metavar="NAME", help="an endpoint's name (default: say what is done)")
    arguments = parser.parse_args()
    if arguments.grade:
        return grade_endpoint(arguments.grade)
    if arguments.answer is not None:
        _find_rooms()
        from figures.result_file import ResultError

        try:
            return check_answer(arguments.answer or None)
        except ResultError as error:
            sys.exit(f"check: {error}")
    report(Checkout())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("check: interrupted; the server is stopped")
    except ModuleNotFoundError as error:
        sys.exit(f"check: {error.name} is missing: make setup, then source .venv/bin/activate")
