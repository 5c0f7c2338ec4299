"""Write overlays/production/images/kustomization.yaml: each image's digest.

    python pin_images.py registry.example:5000
        after the images were pushed there

Asks the Docker engine for the digest that the registry gave each image when it
was pushed; TensorFlow Serving's may also be that of the registry it came from.
"""

import argparse
import json
import subprocess
import sys

import yaml
from manifests import FOLDER

PATH = FOLDER / "overlays" / "production" / "images" / "kustomization.yaml"
HEADER = "# Written by pin_images.py.\n"
OTHERS = ("tensorflow/serving",)  # not built here


def find_digest(image: str) -> str:
    """Return an image's digest in the registry; raise SystemExit if it was never pushed there."""
    command = ["docker", "image", "inspect", image]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        sys.exit("pin_images: no docker command; install Docker")
    if done.returncode != 0:
        sys.exit(f"pin_images: no image {image}: docker tag it with this name and docker push it")
    name = image.rpartition(":")[0]
    digests = dict(digest.split("@") for digest in json.loads(done.stdout)[0]["RepoDigests"])
    if name not in digests:
        sys.exit(f"pin_images: {image} has no digest yet: docker push {image}")
    return digests[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("registry", help="registry to which the images were pushed, as registry.example:5000")
    parser.add_argument("--tag", default="latest", help="tag of the images (default: latest)")
    arguments = parser.parse_args()
    component = yaml.safe_load(PATH.read_text())
    for image in component["images"]:
        image["newName"] = f"{arguments.registry}/{image['name']}"
        image["digest"] = find_digest(f"{image['newName']}:{arguments.tag}")
    PATH.write_text(HEADER + yaml.safe_dump(component, sort_keys=False))
    print(f"wrote {PATH.relative_to(FOLDER)}: {len(component['images'])} images")


if __name__ == "__main__":
    main()
