"""Base weights: a Hugging Face folder of safetensors -> the leaves of a Flax model. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from jlorax.errors import ModelInvalid
from jlorax.models import falcon, llama
from jlorax.models.causal import CausalModel
from jlorax.models.config import LlamaConfig, ModelConfig
from jlorax.types import Progress, no_progress

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_FILE_DTYPES = ("float32", "float16", "bfloat16", "float64")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class BaseModel:
    """A model split once: ``merge(leaves)`` inside a trace gives the module back.

    Flat leaves go to ``jax.jit``: ``nnx.jit`` costs 8 ms a dispatch, a flat list 0.3 ms.
    """

    config: ModelConfig
    dtype: str
    leaves: list[jax.Array]
    merge: Callable[[list[jax.Array]], Any]

    @property
    def size_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves)


def load_model(
    folder: Path, config: ModelConfig, dtype: str, progress: Progress = no_progress
) -> BaseModel:
    """Reads every weight the config asks for; ModelInvalid lists what is missing or left over."""
    paths, treedef, graphdef, shapes = _outline(config, dtype)
    names = _tensor_names(config)
    with ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _check_complete(folder, names, tensors.keys(), config)
        wanted = _file_shapes(config)
        leaves = []
        for i, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
            parts = [tensors[name]() for name in names[path]]
            for name, part in zip(names[path], parts, strict=True):
                _check_tensor(folder, name, part, wanted.get(name, shape))
            leaf = _assemble(path, parts)
            leaves.append(jnp.asarray(leaf.astype(_DTYPES[dtype], copy=False)))
            progress("loading weights", (i + 1) / len(paths))
    return BaseModel(config, dtype, leaves, _merger(treedef, graphdef))


def dummy_model(
    config: ModelConfig, dtype: str, seed: int = 0, progress: Progress = no_progress
) -> BaseModel:
    """Random weights of the config's shape, made on the device: for benchmarks of speed alone.

    One compilation a shape, and nothing crosses the bus: a 7B takes seconds.
    """
    paths, treedef, graphdef, shapes = _outline(config, dtype)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    leaves = []
    for i, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
        leaves.append(_dummy_leaf(keys[i], path, shape, dtype))
        progress("making random weights", (i + 1) / len(paths))
    return BaseModel(config, dtype, leaves, _merger(treedef, graphdef))


def outline(config: ModelConfig, dtype: str) -> BaseModel:
    """The model without its weights: leaves are shapes, enough to compile for any device."""
    _, treedef, graphdef, shapes = _outline(config, dtype)
    leaves: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]
    return BaseModel(config, dtype, leaves, _merger(treedef, graphdef))


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """What the leaves will take, without loading any."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in outline(config, dtype).leaves)


def _dummy_leaf(key: jax.Array, path: str, shape: tuple[int, ...], dtype: str) -> jax.Array:
    if len(shape) == 1:
        return jnp.ones(shape, dtype) if "norm.weight" in path else jnp.zeros(shape, dtype)
    return _random_matrix(key, shape, dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _random_matrix(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Normal, of the deviation that these architectures are initialised with before training.

    Each layer adds 1 to 3 to the residual stream's deviation, so it stays far from overflow.
    """
    return jax.random.normal(key, shape, dtype) * 0.02


def _outline(config: ModelConfig, dtype: str) -> tuple[list[str], Any, Any, list[tuple[int, ...]]]:
    """Paths, tree, graph and shapes of the model's parameters, without allocating them."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: _build(config, dtype)))
    flat, treedef = jax.tree_util.tree_flatten_with_path(state)
    paths = [".".join(_key(k) for k in path if _key(k) != "value") for path, _ in flat]
    return paths, treedef, graphdef, [leaf.shape for _, leaf in flat]


def _build(config: ModelConfig, dtype: str) -> CausalModel:
    if isinstance(config, LlamaConfig):
        return llama.build(config, dtype)
    return falcon.build(config, dtype)


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(entry)


def _merger(treedef: Any, graphdef: Any) -> Callable[[list[jax.Array]], Any]:
    return lambda leaves: nnx.merge(graphdef, jax.tree_util.tree_unflatten(treedef, leaves))


def _tensor_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    if isinstance(config, LlamaConfig):
        return llama.tensor_names(config)
    return falcon.tensor_names(config)


def _assemble(path: str, tensors: list[np.ndarray]) -> np.ndarray:
    """Sites are [d_in, d_out] here and [d_out, d_in] in files; several are joined along d_out."""
    if path.startswith(("embedding.", "head.")) or tensors[0].ndim == 1:
        return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
    return np.ascontiguousarray(np.concatenate(tensors).T)


def _file_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Projections as files have them, [d_out, d_in]; every other tensor is shaped as its leaf."""
    shapes: dict[str, tuple[int, ...]] = {}
    for p in config.projections():
        for layer in range(p.num_layers):
            shapes[f"{p.module(layer)}.weight"] = (p.d_out, p.d_in)
            shapes[f"{p.module(layer)}.bias"] = (p.d_out,)
    return shapes


def _check_tensor(folder: Path, name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> None:
    if tensor.dtype.name not in _FILE_DTYPES:
        known = ", ".join(_FILE_DTYPES)
        raise ModelInvalid(f"{folder}: {name}: holds {tensor.dtype.name}; allowed are: {known}")
    if tensor.shape != shape:
        raise ModelInvalid(
            f"{folder}: {name}: shape {tensor.shape} does not fit the config, which asks for "
            f"{shape}"
        )


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Callable[[], np.ndarray]]:
    """Tensor name -> a function that reads it."""
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for shard in _shards(folder):
        try:
            file = stack.enter_context(safe_open(shard, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ModelInvalid(f"{shard}: {error}") from error
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensors[name] = partial(file.get_tensor, name)
    return tensors


def _shards(folder: Path) -> Iterator[Path]:
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        yield folder / _SINGLE
        return
    if not index.is_file():
        raise ModelInvalid(f"{folder}: holds neither {_SINGLE} nor {_INDEX}")
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelInvalid(f"{index}: is not an index of shards: {error!r}") from error
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ModelInvalid(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {_some(missing)}"
        )
    yield from (folder / name for name in shards)


def _check_complete(
    folder: Path,
    names: Mapping[str, tuple[str, ...]],
    present: Any,
    config: ModelConfig,
) -> None:
    wanted = {name for parts in names.values() for name in parts}
    missing = sorted(wanted - set(present))
    left_over = sorted(name for name in set(present) - wanted if not _harmless(name, config))
    if missing or left_over:
        parts = []
        if missing:
            parts.append(f"{len(missing)} tensors are missing: {_some(missing)}")
        if left_over:
            parts.append(f"{len(left_over)} tensors have no place: {_some(left_over)}")
        raise ModelInvalid(f"{folder}: {'; '.join(parts)}")


def _harmless(name: str, config: ModelConfig) -> bool:
    """Tensors that old files carry and transformers ignores too."""
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_embeddings and name == "lm_head.weight"
    )


def _some(names: list[str], limit: int = 5) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
