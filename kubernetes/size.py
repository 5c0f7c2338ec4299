"""Compute replicas, CPU, memory, probes and times in base/ from measurements.

    python size.py
        for the rate and the p99 of objective.toml

Takes them from ../benchmarks/capacity.py, which computes from
benchmarks/results, and changes only numbers. Run `python to_kserve.py` then.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tomllib

try:
    import rules
    import yaml
    from manifests import FOLDER, ManifestError, render
except ModuleNotFoundError as error:
    sys.exit(f"size: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

OBJECTIVE_PATH = FOLDER / "objective.toml"
CAPACITY = FOLDER.parent / "benchmarks" / "capacity.py"
MEASURED_AS = {  # the set-up that base/ starts, as a row of the result file
    "torchserve": "torchserve-tuned",
    "tfserving": "tfserving-tuned",
    "bentoml": "bentoml-tuned",
    "onnx": "onnx-tuned",
}
PERIOD_S = 5  # of the startup probe
MEBIBYTE = 1 << 20


def read_plans() -> dict[str, dict]:
    """Return capacity.py's plan for each server; raise ManifestError if one cannot meet the objective."""
    objective = tomllib.loads(OBJECTIVE_PATH.read_text())
    command = [sys.executable, str(CAPACITY), "--json", "--rate", str(objective["rate"])]
    command += ["--p99-ms", str(objective["p99_ms"]), "--servers", *MEASURED_AS.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ManifestError((done.stderr.strip().splitlines() or ["capacity.py failed"])[-1])
    answer = json.loads(done.stdout)
    if answer["refused"]:
        name, reason = next(iter(answer["refused"].items()))
        raise ManifestError(f"{name}: {reason}; loosen {OBJECTIVE_PATH.name}")
    return {server: answer["plans"][name] for server, name in MEASURED_AS.items()}


def size(text: str, server: str, plan: dict, in_memory_bytes: int) -> str:
    """Return a server's file with its plan's numbers; `in_memory_bytes` is the size of its volumes in memory."""
    memory = math.ceil((plan["memory_limit_bytes"] + in_memory_bytes) / MEBIBYTE)
    start_s = max(plan["startup_budget_s"], read_start_period_s(server))
    for before, value, after in (
        (r"minReplicas: ", plan["min_replicas"], ""),
        (r"maxReplicas: ", plan["max_replicas"], ""),
        (r"averageUtilization: ", plan["hpa_target_percent"], ""),
        (r"requests: {cpu: \"", plan["cpu_request"], ""),
        (r"memory: ", memory, "Mi"),
        (r"terminationGracePeriodSeconds: ", plan["grace_period_s"], ""),
        (r"startupProbe:[^~]*?failureThreshold: ", math.ceil(start_s / PERIOD_S), ""),
        (r"progressDeadlineSeconds: ", 2 * start_s, ""),  # an image must be pulled first
    ):
        text, count = re.subn(rf"({before})\d+{'[A-Z]i' if after else ''}", rf"\g<1>{value}{after}", text)
        if not count:
            raise ManifestError(f"base/{server}.yaml: no {before!r} to write {value} after")
    return text


def read_start_period_s(server: str) -> int:
    """Return the start period of the image's HEALTHCHECK."""
    if server == "tfserving":
        compose = yaml.safe_load((rules.REPOSITORY_DIR / "tfserving" / "docker-compose.yml").read_text())
        period = compose["services"]["tfserving"]["healthcheck"]["start_period"]
    else:
        dockerfile = (rules.REPOSITORY_DIR / rules.DOCKERFILES[server]).read_text()
        (period,) = re.findall(r"^HEALTHCHECK .*--start-period=(\w+)", dockerfile, re.MULTILINE)
    return int(period.removesuffix("s"))


def size_all() -> dict[str, str]:
    """Return the files of base/ as they should be, by server; raise ManifestError if that cannot be computed."""
    pods = {pod.server: pod for pod in rules.find_pods(render("base"))}
    return {
        server: size(
            (FOLDER / "base" / f"{server}.yaml").read_text(),
            server,
            plan,
            sum(pods[server].volumes_in_memory().values()),
        )
        for server, plan in read_plans().items()
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        for server, text in size_all().items():
            path = FOLDER / "base" / f"{server}.yaml"
            changed = text != path.read_text()
            path.write_text(text)
            print(f"{server}: {'written' if changed else 'as it was'}")
    except ManifestError as error:
        sys.exit(f"size: {error}")


if __name__ == "__main__":
    main()
