"""From what a user calls a model to a folder: a path, or a repository on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from soloist.errors import CheckpointError, ConfigurationError

_CONFIGS = ["*.json"]
_EVERYTHING = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def locate(model: Path | str, weights: bool = True) -> Path:
    """The folder of a model; a repository is downloaded to the hub's cache first, without `weights` only its configs.

    Call it once, in one process, before ranks start. Raises ConfigurationError for a name that is neither a folder nor
    a repository, CheckpointError for a repository that cannot be had.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download  # type: ignore[reportUnknownVariableType]
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        remedy = "is no folder; a model of the hub needs, in a checkout: pip install '.[run]'"
        raise ConfigurationError.of("model", str(model), remedy) from None
    if isinstance(model, Path) or model.count("/") != 1:
        raise ConfigurationError.of("model", str(model), "is no folder, and no owner/name of the hub")
    try:
        patterns = _EVERYTHING if weights else _CONFIGS
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except HFValidationError:
        raise ConfigurationError.of("model", model, "is no folder, and no owner/name of the hub") from None
    except OSError as error:
        remedy = "check the name, the network and the access token, or give a local folder"
        raise CheckpointError(f"{model}: cannot be downloaded ({str(error).splitlines()[0]}): {remedy}") from error
