"""A GGUF file of the Llama family as a Hugging Face folder: float32 weights, config, tokenizer.

What cannot be carried over exactly is refused by name, never left out. Sources: the GGUF
specification (ggml, docs/gguf.md) and llama.cpp's convert_hf_to_gguf.py, whose steps are undone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from jlorax.errors import ModelInvalid, UnsupportedModel
from jlorax.models.atomic import new_folder, only_one
from jlorax.models.gguf_config import ModelShape, model_config, read_shape
from jlorax.models.gguf_tokenizer import build_tokenizer, special_id, tokenizer_config
from jlorax.types import Progress, no_progress

PREPARED_FORMAT = 1  # part of every cached folder's name: raise it when what is written changes
MAX_SHARD_BYTES = 4_000_000_000
_BLOCK_VALUES = 1 << 24  # dequantised at a time: 64 MiB of float32

Floats = npt.NDArray[np.float32]

# GGUF name -> (Hugging Face name, which heads llama.cpp interleaved)
_LAYER_TENSORS: dict[str, tuple[str, str | None]] = {
    "attn_norm.weight": ("input_layernorm.weight", None),
    "attn_q.weight": ("self_attn.q_proj.weight", "q"),
    "attn_k.weight": ("self_attn.k_proj.weight", "kv"),
    "attn_v.weight": ("self_attn.v_proj.weight", None),
    "attn_output.weight": ("self_attn.o_proj.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
    "ffn_gate.weight": ("mlp.gate_proj.weight", None),
    "ffn_up.weight": ("mlp.up_proj.weight", None),
    "ffn_down.weight": ("mlp.down_proj.weight", None),
}


def prepare(gguf_path: Path, out_dir: Path, progress: Progress = no_progress) -> Path:
    """Writes ``out_dir`` from the file; it appears whole or not at all, whoever else writes it.

    Raises ModelInvalid with the file and the reason, UnsupportedModel for other architectures.
    """
    with new_folder(out_dir) as folder:
        write_model(gguf_path, folder, progress)
    return out_dir


def prepared_folder(gguf_path: Path, cache_dir: Path, progress: Progress = no_progress) -> Path:
    """``prepare`` into the cache, once per content; later calls only look at the file's stat."""
    digest = _content_digest(gguf_path, cache_dir / "models" / "gguf-digests", progress)
    name = f"{gguf_path.stem.lower()}-{digest[:12]}-v{PREPARED_FORMAT}"
    out_dir = cache_dir / "models" / name
    if not out_dir.is_dir():
        with only_one(out_dir, progress):
            if not out_dir.is_dir():
                prepare(gguf_path, out_dir, progress)
    return out_dir


def write_model(gguf_path: Path, folder: Path, progress: Progress = no_progress) -> None:
    """Fills an existing folder; ``prepare`` makes it atomic."""
    file = gguf_path.name
    progress(f"reading {file}", 0.0)
    source = read_gguf(gguf_path)
    shape = read_shape(source.metadata, source.rope_divisors(), file)
    weights = _plan_weights(source, shape)
    tokenizer = build_tokenizer(source.metadata, file)
    _write_configs(source, shape, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_weights(weights, folder, progress)
    progress(f"prepared {file}", 1.0)


@dataclass(frozen=True)
class Tensor:
    """One stored tensor. ``data`` is mapped from the file: rows of values or of quantised bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # outermost first, as numpy and torch count
    data: npt.NDArray[Any]


@dataclass(frozen=True)
class GgufFile:
    file: str
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def rope_divisors(self) -> Floats | None:
        """f32[h / 2]: Llama 3's scaling of the rotary frequencies, baked by llama.cpp."""
        tensor = self.tensors.get("rope_freqs.weight")
        return None if tensor is None else _dequantized(tensor, tensor.data, self.file)


class _StrictReader(GGUFReader):  # type: ignore[misc, unused-ignore]
    """GGUFReader reads past the end as emptiness, and then loops for as long as a count says."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) != int(count):
            raise ValueError(f"it is truncated: {count} values are missing at byte {offset}")
        return values


def read_gguf(path: Path) -> GgufFile:
    """Metadata and mapped tensors; the weights are not read yet."""
    try:
        reader = _StrictReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            t.name: Tensor(t.name, t.tensor_type, tuple(map(int, reversed(t.shape))), t.data)
            for t in reader.tensors
        }
    except OSError as error:
        raise ModelInvalid(f"{path}: {error.strerror or error}") from None
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
        raise ModelInvalid(f"{path}: this is not a sound GGUF file: {error}") from None
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(
            f"{path.name}: general.architecture is {architecture!r}; known is 'llama'"
        )
    return GgufFile(path.name, metadata, tensors)


@dataclass(frozen=True)
class _Weight:
    """One tensor to write: its new name, and the heads whose rows are to be put back in order."""

    name: str
    source: Tensor
    num_heads: int | None
    file: str

    @property
    def num_bytes(self) -> int:
        return 4 * int(np.prod(self.source.shape))

    def blocks(self) -> Iterator[Floats]:
        """The rows as float32, a few at a time; whole where rows change places."""
        rows = self.source.data
        step = len(rows) if self.num_heads else max(1, _BLOCK_VALUES // self.source.shape[-1])
        for start in range(0, len(rows), step):
            block = _dequantized(self.source, rows[start : start + step], self.file)
            yield deinterleave(block, self.num_heads) if self.num_heads else block


def interleave(weight: Floats, num_heads: int) -> Floats:
    """What llama.cpp does to q and k: the two halves of each head's rows shuffled like cards."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def deinterleave(weight: Floats, num_heads: int) -> Floats:
    """The inverse of ``interleave``."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _dequantized(tensor: Tensor, rows: npt.NDArray[Any], file: str) -> Floats:
    try:
        values = dequantize(rows, tensor.kind).astype(np.float32, copy=False)
    except (NotImplementedError, ValueError) as error:
        raise ModelInvalid(f"{file}: {tensor.name} ({tensor.kind.name}): {error}") from None
    if not np.isfinite(values).all():
        raise ModelInvalid(f"{file}: {tensor.name} has values that are not finite")
    return values


def _plan_weights(source: GgufFile, shape: ModelShape) -> list[_Weight]:
    """Every tensor that the model needs, checked; a missing or surplus one is refused."""
    heads = {"q": shape.num_heads, "kv": shape.num_kv_heads}
    wanted: dict[str, tuple[str, str | None]] = {
        "token_embd.weight": ("model.embed_tokens.weight", None),
        "output_norm.weight": ("model.norm.weight", None),
    }
    if "output.weight" in source.tensors:
        wanted["output.weight"] = ("lm_head.weight", None)
    for layer in range(shape.num_layers):
        for old, (new, order) in _LAYER_TENSORS.items():
            wanted[f"blk.{layer}.{old}"] = (f"model.layers.{layer}.{new}", order)
    surplus = source.tensors.keys() - wanted.keys() - {"rope_freqs.weight"}
    if surplus:
        raise ModelInvalid(f"{source.file}: unknown tensors: {', '.join(sorted(surplus)[:5])}")
    weights = []
    for old, (new, order) in wanted.items():
        if old not in source.tensors:
            raise ModelInvalid(f"{source.file}: tensor {old} is missing")
        tensor = source.tensors[old]
        expected = shape.tensor_shape(new)
        if tensor.shape != expected:
            raise ModelInvalid(
                f"{source.file}: {old} has shape {tensor.shape}, expected {expected}"
            )
        weights.append(_Weight(new, tensor, heads[order] if order else None, source.file))
    return weights


def _write_configs(source: GgufFile, shape: ModelShape, folder: Path) -> None:
    metadata, file = source.metadata, source.file
    ids = {role: special_id(metadata, role, file) for role in ("bos", "eos", "eot", "padding")}
    ends = sorted({i for i in (ids["eos"], ids["eot"]) if i is not None})
    tokens = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else (ends or None),
        "pad_token_id": ids["padding"],
    }
    tied = "output.weight" not in source.tensors
    _write_json(folder / "config.json", {**model_config(shape, tied), **tokens})
    _write_json(folder / "generation_config.json", tokens)
    config = tokenizer_config(metadata, file) | {"model_max_length": shape.max_positions}
    _write_json(folder / "tokenizer_config.json", config)


def _write_weights(weights: list[_Weight], folder: Path, progress: Progress) -> None:
    total = sum(weight.num_bytes for weight in weights)
    shards = _shards(weights)
    names = [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) > 1
        else "model.safetensors"
        for i in range(len(shards))
    ]
    done = 0
    for name, shard in zip(names, shards, strict=True):
        for num_bytes in _write_safetensors(folder / name, shard):
            done += num_bytes
            progress("unpacking the weights", done / total)
    if len(shards) > 1:
        weight_map = {w.name: name for name, s in zip(names, shards, strict=True) for w in s}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _shards(weights: list[_Weight]) -> list[list[_Weight]]:
    shards: list[list[_Weight]] = [[]]
    room = MAX_SHARD_BYTES
    for weight in weights:
        if weight.num_bytes > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(weight)
        room -= weight.num_bytes
    return shards


def _write_safetensors(path: Path, weights: list[_Weight]) -> Iterator[int]:
    """Yields the bytes written so far, block by block.

    Written by hand, since safetensors.numpy.save_file wants all tensors in memory at once. The
    format: u64 header length, JSON header, the tensors' bytes one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for weight in weights:
        end = offset + weight.num_bytes
        header[weight.name] = {
            "dtype": "F32",
            "shape": weight.source.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            for block in weight.blocks():
                yield out.write(np.ascontiguousarray(block, dtype="<f4").data)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _content_digest(path: Path, digests: Path, progress: Progress) -> str:
    """SHA-256 of the file; remembered by (device, inode, size, mtime), since hashing 4 GB takes
    seconds and a second start has to be instant."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ModelInvalid(f"{path}: {error.strerror}") from None
    key = f"{stat.st_dev}-{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}"
    remembered = digests / key
    if remembered.is_file():
        return remembered.read_text()
    with only_one(remembered, progress):
        digest = hashlib.sha256()
        done = 0
        with path.open("rb") as source:
            while chunk := source.read(1 << 22):
                digest.update(chunk)
                done += len(chunk)
                progress(f"checking {path.name}", done / max(1, stat.st_size))
        partial = remembered.with_suffix(".part")
        partial.write_text(digest.hexdigest())
        partial.replace(remembered)
    return digest.hexdigest()
