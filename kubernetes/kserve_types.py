"""Check InferenceServices with the types of KServe's SDK; runs in an environment that has it.

    .venv-peers/kserve/bin/python kubernetes/kserve_types.py < manifests.yaml

Prints a line for each field that is unknown to the SDK, has another type there,
or is missing. Exits with 1 if there is one.
"""

import re
import sys
from collections.abc import Iterator
from typing import Any

import kserve
import kubernetes.client
import yaml

PLAIN = {"str": str, "int": int, "float": (int, float), "bool": bool, "object": object}


def find_mistakes(value: Any, type_name: str, where: str) -> Iterator[str]:
    """Yield the mistakes in `value`, parsed YAML that should be of the SDK's type `type_name`."""
    if inner := re.fullmatch(r"list\[(.+)\]", type_name):
        if not isinstance(value, list):
            yield f"{where}: must be a list"
            return
        for number, item in enumerate(value):
            yield from find_mistakes(item, inner[1], f"{where}[{number}]")
    elif inner := re.fullmatch(r"dict\((.+), (.+)\)|dict\[(.+), (.+)\]", type_name):
        if not isinstance(value, dict):
            yield f"{where}: must be a mapping"
            return
        for key, item in value.items():
            yield from find_mistakes(item, inner[2] or inner[4], f"{where}.{key}")
    elif type_name in PLAIN:
        wanted = PLAIN[type_name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and type_name in ("int", "float")):
            yield f"{where}: must be {type_name}, and is {value!r}"
    elif (model := getattr(kserve, type_name, None) or getattr(kubernetes.client, type_name, None)) is not None:
        yield from find_mistakes_in_model(value, model, where)
    # The rest are times, and types that can be written in several ways, such as quantities.


def find_mistakes_in_model(value: Any, model: type, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: must be a mapping"
        return
    names = {written: name for name, written in model.attribute_map.items()}
    for key, item in value.items():
        if key not in names:
            yield f"{where}.{key}: {model.__name__} has no such field"
        else:
            yield from find_mistakes(item, model.openapi_types[names[key]], f"{where}.{key}")
    try:  # the SDK's constructors check for required fields
        model(**{names[key]: item for key, item in value.items() if key in names})
    except ValueError as error:
        yield f"{where}: {error}"


def main() -> int:
    mistakes = [
        mistake
        for manifest in yaml.safe_load_all(sys.stdin)
        if manifest and manifest["kind"] == "InferenceService"
        for mistake in find_mistakes(manifest, "V1beta1InferenceService", manifest["metadata"]["name"])
    ]
    for mistake in mistakes:
        print(mistake)
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
