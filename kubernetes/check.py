"""Check the manifests as far as possible without a cluster.

    python check.py
        the three renderings, through five checks: under a minute
    python check.py --quick
        without checkov and KServe's types, which need separate environments

Renders overlays/production, overlays/local and kserve, and checks each with the
strict schemas of four Kubernetes versions, the rules of rules.py, checkov, and
the types of KServe's SDK. Prints a line for each check and each mistake. Exits
with 1 if there is a mistake. Writes nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import kubernetes_validate
    import rules
    import to_kserve
    from manifests import FOLDER, Manifest, ManifestError, kustomize, render
except ModuleNotFoundError as error:
    sys.exit(f"check: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

RENDERINGS = ("overlays/production", "overlays/local", "kserve")
VERSIONS = ("1.34", "1.35", "1.36", "1.37")
NOT_OF_KUBERNETES = ("InferenceService",)  # kserve_types.py has those
CHECKOV = FOLDER.parent / ".venv-checks" / "checkov" / "bin" / "checkov"
CHECKOV_SETTINGS = FOLDER / "checkov.yaml"
KSERVE_PYTHON = FOLDER.parent / ".venv-peers" / "kserve" / "bin" / "python"
TIMEOUT_S = 300.0


def check_schemas(manifests: list[Manifest], version: str) -> Iterator[str]:
    """Yield what the strict schema of a Kubernetes version refuses, unknown fields included."""
    for manifest in manifests:
        if manifest["kind"] in NOT_OF_KUBERNETES:
            continue
        where = f"{manifest['kind']}/{manifest['metadata']['name']}"
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(map(str, error.path))
            yield f"{where}: {path}: {error.message.partition(chr(10))[0][:300]}"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield f"{where}: {error}"


def check_written(folder: str) -> Iterator[str]:
    """Yield a line if the file that is made from base/ is older than base/."""
    if folder == "kserve" and to_kserve.PATH.read_text() != to_kserve.format_services(render("base")):
        yield f"{to_kserve.PATH.relative_to(FOLDER)} is older than base/: python to_kserve.py"


def run_checkov(folder: str) -> list[str]:
    """Return what checkov refuses in a rendering; raise ManifestError if it cannot run."""
    if not CHECKOV.exists():
        raise ManifestError("no checkov: run make k8s-check, which installs it")
    with tempfile.TemporaryDirectory(prefix="checkov-") as rendered:
        Path(rendered, "manifests.yaml").write_text(kustomize(folder))
        command = [str(CHECKOV), "--config-file", str(CHECKOV_SETTINGS), "--directory", rendered, "--output", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    try:
        result = json.loads(done.stdout)
    except ValueError:
        words = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ManifestError(f"checkov did not run: {words}") from None
    if not result["summary"]["passed"]:
        raise ManifestError("checkov found nothing to look at")
    return [
        f"{found['check_id']}: {found['check_name']}: {found['resource']}"
        for found in result["results"]["failed_checks"]
    ]


def run_kserve_types(text: str) -> list[str]:
    """Return what KServe's SDK does not know in a rendering; raise ManifestError if there is no SDK."""
    if not KSERVE_PYTHON.exists():
        raise ManifestError("no KServe SDK: run make k8s-check, which installs it")
    command = [str(KSERVE_PYTHON), str(FOLDER / "kserve_types.py")]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode not in (0, 1) or (done.returncode == 1 and not done.stdout):
        raise ManifestError(f"kserve_types.py: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout.splitlines()


def check(folder: str, quick: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each check of a rendering, and its mistakes."""
    manifests = render(folder)
    yield "written", list(check_written(folder))
    for version in VERSIONS:
        yield f"schema {version}", list(check_schemas(manifests, version))
    yield "rules", rules.find_mistakes(manifests, rules.read_facts(in_production=folder != "overlays/local"))
    if quick:
        return
    if folder == "kserve":
        yield "KServe's types", run_kserve_types(kustomize(folder))
    elif folder == "overlays/production":
        yield "checkov", run_checkov(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without checkov and KServe's types (default: with them)")
    arguments = parser.parse_args()
    count = 0
    for folder in RENDERINGS:
        for name, mistakes in check(folder, arguments.quick):
            print(f"{folder}, {name}: {'ok' if not mistakes else f'{len(mistakes)} wrong'}", flush=True)
            for mistake in mistakes:
                print(f"  {mistake}")
            count += len(mistakes)
    print(
        f"{count} mistakes" if count else "no mistake found; only a cluster can show the rest: see kubernetes/README.md"
    )
    return 1 if count else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ManifestError as error:
        sys.exit(f"check: {error}")
    except KeyboardInterrupt:
        sys.exit("check: interrupted")
