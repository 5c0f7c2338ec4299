"""Rules for the manifests that no schema checks. Each complaint names the place, the mistake and the remedy.

A rule takes the rendered manifests and the facts with which they must agree, and yields complaints. Its name precedes
each complaint; REFERENCE.md gives the reason for each rule.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from manifests import Manifest

REPOSITORY_DIR = Path(__file__).resolve().parent.parent
COSTS_PATH = REPOSITORY_DIR / "benchmarks" / "results" / "containers.json"
DOCKERFILES = {
    "torchserve": "torchserve/Dockerfile",
    "bentoml": "bentoml/Dockerfile.template",
    "onnx": "onnx/Dockerfile",
}
STARTS_S = 3  # a start may take this many times the slowest measured cold start
STOPS = 2  # a stop may take this many times the measured stop,
SPARE_S = 5  # and this much longer
LIVENESS_S = 60  # the least time without an answer before a process is ended
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
UNREACHABLE = {8081: "TorchServe's management", 7071: "TorchServe's management over gRPC"}
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
MAY_ASK = {"model-serving/client": "true"}
NAME = "app.kubernetes.io/name"
OWN_NAME = "serving.kserve.io/inferenceservice"  # the label that KServe gives its pods


@dataclass(frozen=True)
class Facts:
    """The facts with which the manifests must agree."""

    costs: dict[str, dict[str, Any]]  # benchmarks/results/containers.json, by server
    predictions: dict[str, list[str]]  # the command of each image's HEALTHCHECK, by server
    in_production: bool  # more than one node, images by digest

    @property
    def servers(self) -> set[str]:
        return set(self.predictions)


def read_facts(in_production: bool) -> Facts:
    """Read the measured costs and the images' health checks."""
    costs = json.loads(COSTS_PATH.read_text())["containers"]
    predictions = {name: read_healthcheck((REPOSITORY_DIR / path).read_text()) for name, path in DOCKERFILES.items()}
    compose = yaml.safe_load((REPOSITORY_DIR / "tfserving" / "docker-compose.yml").read_text())
    predictions["tfserving"] = compose["services"]["tfserving"]["healthcheck"]["test"][1:]
    return Facts(costs, predictions, in_production)


def read_healthcheck(dockerfile: str) -> list[str]:
    """Return the command of a Dockerfile's HEALTHCHECK, written there as a list."""
    (instruction,) = re.findall(r"^HEALTHCHECK .*?CMD (\[.*?\])$", dockerfile.replace("\\\n", ""), re.MULTILINE)
    return list(json.loads(instruction))


@dataclass(frozen=True)
class Pod:
    """The pods of one Deployment, or of one predictor of an InferenceService."""

    where: str  # its name in complaints
    server: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def main(self) -> dict[str, Any]:
        return dict(self.spec["containers"][0])

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def volumes_in_memory(self) -> dict[str, int]:
        """Return the size limit in bytes of each volume in memory, 0 if it has none."""
        found = {volume["name"]: volume.get("emptyDir") for volume in self.spec.get("volumes", [])}
        return {
            name: read_bytes(volume.get("sizeLimit", "0"))
            for name, volume in found.items()
            if volume is not None and volume.get("medium") == "Memory"
        }


def find_pods(manifests: list[Manifest]) -> list[Pod]:
    """Return the pods that the manifests make."""
    pods = []
    for deployment in of_kind(manifests, "Deployment"):
        template, name = deployment["spec"]["template"], name_of(deployment)
        pods.append(Pod(f"Deployment/{name}", name, template["metadata"]["labels"], template["spec"]))
    for service in of_kind(manifests, "InferenceService"):
        name, spec = name_of(service), service["spec"]
        labels = {**service["metadata"].get("labels", {}), OWN_NAME: name}
        pods.append(Pod(f"InferenceService/{name}", name, labels, spec["predictor"]))
        for number, canary in enumerate(spec.get("canary", [])):
            pods.append(Pod(f"InferenceService/{name} canary[{number}]", name, labels, canary["predictor"]))
    return pods


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def name_of(manifest: Manifest) -> str:
    return str(manifest["metadata"]["name"])


def read_bytes(text: str) -> int:
    """Return the bytes of a quantity, "512Mi"; a number without a unit is bytes."""
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]*)", str(text)).groups()
    return int(number) * UNITS.get(unit, 1)


def seconds_of(probe: dict[str, Any]) -> int:
    """Return how long a probe must fail before Kubernetes acts."""
    return int(probe["failureThreshold"]) * int(probe["periodSeconds"])


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def describe_pods(servers: set[str]) -> str:
    return f"the pods of {', '.join(sorted(servers))}" if servers else "no pods"


# The rules


def selectors(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """A selector that matches no pod, or another server's, is accepted by every schema and protects nothing."""
    pods = find_pods(manifests)
    for deployment in of_kind(manifests, "Deployment"):
        wanted = deployment["spec"]["selector"]["matchLabels"]
        if not selects(wanted, deployment["spec"]["template"]["metadata"]["labels"]):
            yield f"Deployment/{name_of(deployment)} selects {wanted}, which its own pods do not have"
    for manifest in manifests:
        kind, spec = manifest["kind"], manifest.get("spec", {})
        if kind == "Service":
            selector = spec["selector"]
        elif kind == "PodDisruptionBudget":
            selector = spec["selector"]["matchLabels"]
        elif kind == "NetworkPolicy" and spec["podSelector"]:
            selector = spec["podSelector"]["matchLabels"]
        else:
            continue
        servers = {pod.server for pod in pods if selects(selector, pod.labels)}
        if servers != {name_of(manifest)}:
            yield (
                f"{kind}/{name_of(manifest)} selects {selector}, which matches {describe_pods(servers)} "
                f"instead of those of {name_of(manifest)}"
            )
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        named = {name_of(manifest) for manifest in of_kind(manifests, kind)}
        for server in sorted({pod.server for pod in pods} - named):
            yield f"no {kind} is called {server}"


def liveness(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """A server under load answers late. Killed for that, it leaves its load to the others, which are killed next."""
    for pod in find_pods(manifests):
        probe, ready = pod.main.get("livenessProbe", {}), pod.main.get("readinessProbe", {})
        if "httpGet" not in probe:
            yield f"{pod.where}: livenessProbe must be an httpGet that needs no model, not a prediction"
        elif probe["httpGet"] == ready.get("httpGet"):
            yield f"{pod.where}: livenessProbe asks what readinessProbe asks; it must need no model"
        elif seconds_of(probe) < LIVENESS_S:
            yield f"{pod.where}: livenessProbe ends a process after {seconds_of(probe)} s, not {LIVENESS_S} or more"


def readiness(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """A server is ready when it predicts, by its image's own check. It gets the time of three of its slowest starts."""
    for pod in find_pods(manifests):
        startup = pod.main.get("startupProbe", {})
        if pod.server in facts.servers:
            for kind in ("startupProbe", "readinessProbe"):
                if pod.main.get(kind, {}).get("exec", {}).get("command") != facts.predictions[pod.server]:
                    yield f"{pod.where}: {kind} is not the HEALTHCHECK of the image, a real prediction"
            needed_s = STARTS_S * max(facts.costs[pod.server]["starts_s"])
            if startup and seconds_of(startup) < needed_s:
                yield f"{pod.where}: startupProbe gives {seconds_of(startup)} s, but three starts took {needed_s:.0f} s"
        elif not startup or "readinessProbe" not in pod.main:
            yield f"{pod.where}: startupProbe and readinessProbe are missing"


def stopping(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """Requests come until the gateway has asked the DNS again, and a killed server loses its requests."""
    for pod in find_pods(manifests):
        before_s = pod.main.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if before_s < 10:
            yield f"{pod.where}: preStop must sleep 10 s, until requests stop, and sleeps {before_s}"
        cost = facts.costs.get(pod.server)
        needed_s = before_s + math.ceil(STOPS * cost["stop_s"] + SPARE_S if cost else 2 * SPARE_S)
        given_s = pod.spec.get("terminationGracePeriodSeconds", 30)
        if given_s != needed_s:
            yield (
                f"{pod.where}: terminationGracePeriodSeconds is {given_s} and should be {needed_s}: "
                f"preStop {before_s}, {STOPS} measured stops, {SPARE_S}"
            )
        if pod.server == "tfserving" and not pod.spec.get("shareProcessNamespace"):
            yield f"{pod.where}: shareProcessNamespace must be true: as process 1 it ignores the stop signal"


def rollout(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """A new pod must answer before an old one goes."""
    for deployment in of_kind(manifests, "Deployment"):
        spec, where = deployment["spec"], f"Deployment/{name_of(deployment)}"
        steps = spec.get("strategy", {}).get("rollingUpdate", {})
        if steps.get("maxUnavailable") != 0 or not steps.get("maxSurge"):
            yield f"{where}: rollingUpdate must have maxUnavailable 0 and maxSurge 1"
        if spec.get("minReadySeconds", 0) < 5:
            yield f"{where}: minReadySeconds must be 5: a pod that dies at once is not a success"
        startup = spec["template"]["spec"]["containers"][0].get("startupProbe")
        if startup and spec.get("progressDeadlineSeconds", 600) < seconds_of(startup) + spec.get("minReadySeconds", 0):
            yield f"{where}: progressDeadlineSeconds ends before the startupProbe does"


def spread(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """Two replicas on one node die with it."""
    for pod in find_pods(manifests):
        found = {one["topologyKey"]: one for one in pod.spec.get("topologySpreadConstraints", [])}
        for key, otherwise in (
            ("kubernetes.io/hostname", "DoNotSchedule"),
            ("topology.kubernetes.io/zone", "ScheduleAnyway"),
        ):
            one = found.get(key, {})
            if one.get("whenUnsatisfiable") != otherwise or "pod-template-hash" not in one.get("matchLabelKeys", []):
                yield f"{pod.where}: no topologySpreadConstraint over {key} with {otherwise}, by pod-template-hash"
            elif not selects(one["labelSelector"]["matchLabels"], pod.labels):
                yield f"{pod.where}: the topologySpreadConstraint over {key} does not select its own pods"


def disruption(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """Emptying a node must take one replica at a time, and a broken pod must not block it."""
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        spec = budget["spec"]
        if spec.get("maxUnavailable") != 1 or "minAvailable" in spec:
            yield f"PodDisruptionBudget/{name_of(budget)}: maxUnavailable must be 1, and minAvailable absent"
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"PodDisruptionBudget/{name_of(budget)}: unhealthyPodEvictionPolicy must be AlwaysAllow"


def scaling(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """A single replica is none while it moves. A fixed number would undo the autoscaler's at every apply."""
    if not facts.in_production:
        return
    scaled = {}
    for autoscaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        spec, where = autoscaler["spec"], f"HorizontalPodAutoscaler/{name_of(autoscaler)}"
        scaled[spec["scaleTargetRef"]["name"]] = spec
        if spec.get("minReplicas", 1) < 2:
            yield f"{where}: minReplicas must be 2 or more: a node may die"
        (metric,) = spec["metrics"]
        if metric.get("containerResource", {}).get("container") != "server":
            yield f"{where}: must use the CPU of the container server only (ContainerResource)"
        down = spec.get("behavior", {}).get("scaleDown", {})
        if down.get("stabilizationWindowSeconds", 0) < 300:
            yield f"{where}: scaleDown must look back 300 s, or the number of replicas flaps"
    for deployment in of_kind(manifests, "Deployment"):
        name, replicas = name_of(deployment), deployment["spec"].get("replicas")
        if name in scaled and replicas is not None:
            yield f"Deployment/{name}: replicas must be left to its autoscaler"
        if name not in scaled and (replicas or 1) < 2:
            yield f"Deployment/{name}: replicas must be 2 or more, or an autoscaler there"
    for name in scaled.keys() - {name_of(deployment) for deployment in of_kind(manifests, "Deployment")}:
        yield f"HorizontalPodAutoscaler of {name}: there is no such Deployment"
    for service in of_kind(manifests, "InferenceService"):
        if service["spec"]["predictor"].get("minReplicas", 1) < 2:
            yield f"InferenceService/{name_of(service)}: minReplicas must be 2 or more: a node may die"


def resources(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """The scheduler counts requests. Memory is limited, with the volumes in it; CPU is not: throttling raises p99."""
    for pod in find_pods(manifests):
        sizes = pod.volumes_in_memory()
        for name in (name for name, size in sizes.items() if not size):
            yield f"{pod.where}: volume {name} lies in memory and has no sizeLimit"
        for container in pod.containers:
            where, given = f"{pod.where} {container['name']}", container.get("resources", {})
            requests, limits = given.get("requests", {}), given.get("limits", {})
            if "cpu" not in requests or "memory" not in requests:
                yield f"{where}: requests of cpu and memory are missing"
            if "cpu" in limits:
                yield f"{where}: a limit of cpu makes the slowest requests slower; leave it out"
            if "memory" not in limits:
                yield f"{where}: the limit of memory is missing"
                continue
            mounted = {mount["name"] for mount in container.get("volumeMounts", []) if not mount.get("readOnly")}
            needed = sum(size for name, size in sizes.items() if name in mounted)
            if container is pod.spec["containers"][0] and pod.server in facts.costs:
                needed += facts.costs[pod.server]["memory_bytes"]
            if read_bytes(limits["memory"]) < needed:
                yield f"{where}: the limit of memory is below {needed >> 20}Mi: measured, plus the volumes in memory"


def security(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """No container is root, writes to its image, or has a token of the cluster."""
    for pod in find_pods(manifests):
        context = pod.spec.get("securityContext", {})
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.where}: automountServiceAccountToken must be false"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.where}: seccompProfile must be RuntimeDefault"
        for container in pod.containers:
            own, where = container.get("securityContext", {}), f"{pod.where} {container['name']}"
            if not {**context, **own}.get("runAsNonRoot") or not {**context, **own}.get("runAsUser"):
                yield f"{where}: must run as a numbered user that is not root"
            if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
                yield f"{where}: must drop ALL capabilities and forbid privilege escalation"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{where}: readOnlyRootFilesystem must be true"


def images(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """An image without a version is another one tomorrow, and perhaps on the next node."""
    for pod in find_pods(manifests):
        for container in pod.containers:
            image = container["image"]
            where, last = f"{pod.where} {container['name']}", image.rpartition("/")[2]
            if "@sha256:" in image:
                continue
            if ":" not in last or last.endswith(":latest"):
                yield f"{where}: image {image} has no version; name one, never latest"
            elif facts.in_production:
                yield f"{where}: image {image} must be named by its digest: python pin_images.py"


def network(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """Only the needed connections are allowed: a model is code, and cannot leak data to what it cannot reach."""
    policies = {name_of(policy): policy["spec"] for policy in of_kind(manifests, "NetworkPolicy")}
    deny = policies.get("default-deny", {})
    if deny.get("podSelector") != {} or set(deny.get("policyTypes", [])) != {"Ingress", "Egress"} or len(deny) != 2:
        yield "NetworkPolicy/default-deny must select every pod and deny both directions"
    for pod in find_pods(manifests):
        policy, where = policies.get(pod.server, {}), f"NetworkPolicy/{pod.server}"
        if set(policy.get("policyTypes", [])) != {"Ingress", "Egress"}:
            yield f"{where}: policyTypes must be Ingress and Egress"
        if pod.server in facts.servers and policy.get("egress"):
            yield f"{where}: a model server must open no connections; egress must be absent"
        listening = {port["containerPort"] for port in pod.main["ports"]}
        for entry in policy.get("ingress", []):
            if not entry.get("from") or not entry.get("ports"):
                yield f"{where}: an ingress without from or ports admits all clients, or all ports"
            for peer in entry.get("from", []):
                if not is_known(peer):
                    yield f"{where}: {peer} is neither the gateway, the monitoring nor a client's namespace"
            for port in entry.get("ports", []):
                if port["port"] in UNREACHABLE:
                    yield f"{where}: port {port['port']} is {UNREACHABLE[port['port']]}, which gives code to run"
                elif port["port"] not in listening:
                    yield f"{where}: no container listens on port {port['port']}"
    for service in of_kind(manifests, "Service"):
        for port in service["spec"]["ports"]:
            if port["port"] in UNREACHABLE or port.get("targetPort") in UNREACHABLE:
                yield f"Service/{name_of(service)}: port {port['port']} is management, which gives code to run"
        if name_of(service) in facts.servers and service["spec"].get("clusterIP") != "None":
            yield f"Service/{name_of(service)}: must be headless (clusterIP: None): a connection stays on one replica"
    yield from check_gateway(policies, facts)


def is_known(peer: dict[str, Any]) -> bool:
    namespace = peer.get("namespaceSelector", {}).get("matchLabels")
    pods = peer.get("podSelector", {}).get("matchLabels")
    if peer.keys() - {"namespaceSelector", "podSelector"}:
        return False
    return (namespace is None and pods == {NAME: "gateway"}) or (namespace == MONITORING and bool(pods)) or (
        namespace == MAY_ASK
    )  # fmt: skip


def check_gateway(policies: dict[str, Any], facts: Facts) -> Iterator[str]:
    """The gateway's egress must agree with each server's ingress."""
    if "gateway" not in policies:
        return
    asked = {}
    for entry in policies["gateway"]["egress"]:
        for peer in entry["to"]:
            name = peer["podSelector"]["matchLabels"].get(NAME)
            if name:
                asked[name] = {port["port"] for port in entry["ports"]}
    for server in sorted(facts.servers):
        admitted = {
            port["port"]
            for entry in policies.get(server, {}).get("ingress", [])
            if {"podSelector": {"matchLabels": {NAME: "gateway"}}} in entry["from"]
            for port in entry["ports"]
        }
        if asked.get(server) != admitted:
            yield f"NetworkPolicy/gateway: asks {server} at {asked.get(server)}, which admits it at {admitted}"


def models(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """Models come sealed and are opened into memory by a sidecar; the server cannot read their key."""
    for pod in find_pods(manifests):
        if pod.server not in facts.servers:
            continue
        unseal = next((one for one in pod.spec.get("initContainers", []) if one["name"] == "unseal"), None)
        if unseal is None or unseal.get("restartPolicy") != "Always" or "startupProbe" not in unseal:
            yield f"{pod.where}: unseal must be an initContainer with restartPolicy Always and a startupProbe"
            continue
        if pod.server not in unseal.get("args", []):
            yield f"{pod.where}: unseal opens the models of another server"
        if not pod.volumes_in_memory().get("models"):
            yield f"{pod.where}: the volume models must lie in memory (emptyDir, medium: Memory, sizeLimit)"
        mounts = [mount for mount in pod.main.get("volumeMounts", []) if mount["name"] == "models"]
        if not mounts or not all(mount.get("readOnly") for mount in mounts):
            yield f"{pod.where}: the server must mount the volume models, read-only"
        if any(mount["name"] == "identity" for mount in pod.main.get("volumeMounts", [])):
            yield f"{pod.where}: the key to the models must be mounted only in unseal"
        users = {one.get("securityContext", {}).get("runAsUser") for one in (unseal, pod.main)}
        if len(users) == 1:
            yield f"{pod.where}: unseal must run as another user than the server, which could read the key otherwise"


def kserve(manifests: list[Manifest], facts: Facts) -> Iterator[str]:
    """Values that KServe's types accept and its controller ignores or refuses."""
    for service in of_kind(manifests, "InferenceService"):
        where, spec = f"InferenceService/{name_of(service)}", service["spec"]
        if service["metadata"].get("annotations", {}).get("serving.kserve.io/deploymentMode") != "Standard":
            yield f"{where}: the annotation serving.kserve.io/deploymentMode must be Standard"
        if "canaryTrafficPercent" in spec["predictor"]:
            yield f"{where}: canaryTrafficPercent is ignored in Standard mode; write canary[].trafficPercent"
        for number, canary in enumerate(spec.get("canary", [])):
            if not canary["predictor"].get("name"):
                yield f"{where}: canary[{number}].predictor.name is missing: its Deployment is named after it"
        for predictor in (spec["predictor"], *(canary["predictor"] for canary in spec.get("canary", []))):
            if predictor["containers"][0]["name"] != "kserve-container":
                yield f"{where}: the first container must be called kserve-container"


RULES: tuple[Callable[[list[Manifest], Facts], Iterator[str]], ...] = (
    selectors, liveness, readiness, stopping, rollout, spread, disruption, scaling, resources, security, images,
    network, models, kserve,
)  # fmt: skip


def find_mistakes(manifests: list[Manifest], facts: Facts) -> list[str]:
    """Return the complaints of all rules, each after its rule's name."""
    return [f"{rule.__name__}: {complaint}" for rule in RULES for complaint in rule(manifests, facts)]
