"""Write kserve/inferenceservices.yaml: the pods of base/ in KServe's form.

    python to_kserve.py

KServe makes the Deployment, the Service and the autoscaler itself, so a server
needs only its pod, the least and largest number of replicas and the target of
the autoscaler. A test fails if the file is older than base/.
"""

import argparse
import re
from typing import Any

import yaml
from manifests import FOLDER, Manifest, ManifestError, render

PATH = FOLDER / "kserve" / "inferenceservices.yaml"
HEADER = """\
# Made by `python to_kserve.py` from base/: do not edit.
#
# The four servers for KServe, each with its own container. Of KServe's runtimes TensorFlow Serving's is release 2.6.2,
# TorchServe's is about to be removed, ONNX's is Triton or OpenVINO, and BentoML has none.
"""
INFERENCE_SERVICE = "serving.kserve.io/inferenceservice"
HASH = re.compile(r"-[a-z0-9]{10}$")  # of a generated ConfigMap's content, after its name
CANARY_PERCENT = 10  # of the requests of onnx, which shows how a canary is written


def make_service(deployment: Manifest, autoscaler: Manifest) -> Manifest:
    """Return the InferenceService with the pods of `deployment` and the limits of `autoscaler`."""
    name = deployment["metadata"]["name"]
    scale = autoscaler["spec"]
    (metric,) = scale["metrics"]
    predictor = {
        "minReplicas": scale["minReplicas"],
        "maxReplicas": scale["maxReplicas"],
        "scaleMetric": "cpu",  # of the pod: KServe cannot count one container
        "scaleTarget": metric["containerResource"]["target"]["averageUtilization"],
        "deploymentStrategy": deployment["spec"]["strategy"],
        **make_pod(deployment),
    }
    spec: Manifest = {"predictor": predictor}
    if name == "onnx":
        predictor["containers"][0]["args"] += ["--only-version", "1"]
        canary = make_pod(deployment)
        canary["containers"][0]["args"] += ["--only-version", "2"]
        spec["canary"] = [{"trafficPercent": CANARY_PERCENT, "predictor": {"name": "v2", **canary}}]
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "labels": deployment["spec"]["template"]["metadata"]["labels"],
            # Standard: a Deployment and a HorizontalPodAutoscaler, without Knative and without a service mesh.
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",
                "serving.kserve.io/autoscalerClass": "hpa",
                **deployment["spec"]["template"]["metadata"]["annotations"],
            },
        },
        "spec": spec,
    }


def make_pod(deployment: Manifest) -> Manifest:
    """Return the pod, with the container name that KServe looks for."""
    pod: Manifest = yaml.safe_load(yaml.safe_dump(deployment["spec"]["template"]["spec"]))
    pod["containers"][0]["name"] = "kserve-container"
    for container in pod["containers"]:  # KServe uses the first port
        container["ports"] = [{**port, "protocol": "TCP"} for port in container["ports"]]
        container["ports"].sort(key=lambda port: port["name"] != "http")
    for constraint in pod["topologySpreadConstraints"]:  # by the label that KServe sets
        constraint["labelSelector"]["matchLabels"] = {INFERENCE_SERVICE: deployment["metadata"]["name"]}
        constraint["matchLabelKeys"] = ["pod-template-hash"]
    for volume in pod["volumes"]:  # kustomize names a ConfigMap after its content, but not inside KServe's objects
        if "configMap" in volume:
            volume["configMap"]["name"] = HASH.sub("", volume["configMap"]["name"])
    return pod


class Dumper(yaml.SafeDumper):
    """Dumps without aliases, which a reader would have to look up."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def format_services(manifests: list[Manifest]) -> str:
    """Return the text of the file made from `manifests`, the rendered base/."""
    by_kind = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}
    services = [
        make_service(by_kind["Deployment", name], autoscaler)
        for (kind, name), autoscaler in sorted(by_kind.items())
        if kind == "HorizontalPodAutoscaler"
    ]
    return HEADER + "---\n".join(yaml.dump(service, Dumper=Dumper, sort_keys=False, width=1000) for service in services)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        PATH.write_text(format_services(render("base")))
    except ManifestError as error:
        raise SystemExit(f"to_kserve: {error}") from None
    print(f"wrote {PATH.relative_to(FOLDER)}")


if __name__ == "__main__":
    main()
