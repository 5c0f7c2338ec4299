"""Read models.config and the version folders. Needs no TensorFlow, so it reports mistakes at once."""

import errno
import os
from pathlib import Path

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2


class ConfigError(Exception):
    """The config cannot be served; the message is one line."""


def read_config(path: Path, allow_labels: bool) -> model_server_config_pb2.ModelServerConfig:
    """Return the models.config in `path`. Raises ConfigError.

    TensorFlow Serving reads the labels before it has loaded anything, and a label may name only a loaded
    version. So at the start it accepts labels only with the flag that sets `allow_labels`.
    """
    try:
        config = text_format.Parse(path.read_text(), model_server_config_pb2.ModelServerConfig())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; check --model_config_file") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Error parsing text-format tensorflow.serving.ModelServerConfig: {path}:{reason}") from None
    if not config.model_config_list.config:
        raise ConfigError(f"{path}: names no model; add a config block to model_config_list")
    for model in config.model_config_list.config:
        for version in model.version_labels.values():
            if not allow_labels:
                raise ConfigError(
                    f"Request to assign label to version {version} of model {model.name}, which is not currently "
                    "available for inference; add --allow_version_labels_for_unavailable_models"
                )
    return config


def single_model_config(name: str, base_path: str) -> model_server_config_pb2.ModelServerConfig:
    """Return the config for --model_name and --model_base_path."""
    config = model_server_config_pb2.ModelServerConfig()
    config.model_config_list.config.add(name=name, base_path=base_path, model_platform="tensorflow")
    return config


def list_versions(base_path: str) -> dict[int, Path]:
    """Return the version folders under `base_path`; OSError if they cannot be listed.

    Names are read as integers of 64 bits (007 is 7); others are ignored.
    """
    try:
        # The kind of an entry comes with its name: the folder may be renamed before each is asked by its path.
        with os.scandir(base_path) as entries:
            folders = [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False) or Path(e.path).is_dir()]
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error)) from None
    numbered = {int(path.name): path for path in folders if path.name.isascii() and path.name.isdecimal()}
    return {version: path for version, path in numbered.items() if version < 2**63}


def choose_versions(model: model_server_config_pb2.ModelConfig) -> dict[int, Path]:
    """Return the version folders that the model's version policy selects. Default: the newest one.

    OSError if the folders cannot be listed.
    """
    found = list_versions(model.base_path)
    policy = model.model_version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            return found
        case "specific":
            return {version: found[version] for version in policy.specific.versions if version in found}
        case _:
            newest = sorted(found, reverse=True)[: policy.latest.num_versions or 1]
            return {version: found[version] for version in newest}
