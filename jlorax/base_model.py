"""Where a base model's folder is: one that is given, a GGUF file's, the hub's, the embedded one."""

from __future__ import annotations

from pathlib import Path

from jlorax.config import ModelSource
from jlorax.errors import ModelInvalid
from jlorax.models.embedded import EMBEDDED_MODEL_ID, ensure_embedded_model
from jlorax.models.gguf import prepared_folder
from jlorax.types import Progress, no_progress


def find_base(
    source: ModelSource, cache_dir: Path, progress: Progress = no_progress
) -> tuple[Path, str]:
    """(folder in Hugging Face's layout, a name). What is not on this machine yet is fetched or
    prepared. ModelInvalid when there is no such model."""
    model = source.model
    if model is None:
        return ensure_embedded_model(cache_dir, progress), EMBEDDED_MODEL_ID
    path = Path(model).expanduser()
    if path.is_dir():
        return path, path.name
    if path.is_file():
        if source.is_dummy:
            raise ModelInvalid(
                f"{model}: dummy weights need a folder with a config.json, or a hub id"
            )
        name = path.stem if path.suffix == ".gguf" else path.name
        return prepared_folder(path, cache_dir, progress), name
    if _looks_like_hub_id(model):
        return _from_hub(model, progress, with_weights=not source.is_dummy), model
    raise ModelInvalid(f"{model}: no such folder or GGUF file, and not a hub id (org/name)")


def _looks_like_hub_id(model: str) -> bool:
    parts = model.split("/")
    return len(parts) == 2 and all(parts) and not model.startswith((".", "~", "/"))


def _from_hub(model: str, progress: Progress, *, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model"] + (["*.safetensors"] if with_weights else [])
    progress(f"fetching {model}", 0.0)
    try:
        found = snapshot_download(model, allow_patterns=patterns)
    except Exception as error:  # the hub's client raises many kinds; all mean: not to be had
        raise ModelInvalid(f"{model}: cannot be fetched from the hub: {error}") from error
    return Path(found)
