"""Every (A, B) comes back out of the pages; a damaged file is noticed."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jlorax.adapters.pack import (
    PackCorrupt,
    PackedAdapter,
    from_bytes,
    is_intact,
    layout_fingerprint,
    pack,
    to_bytes,
)
from jlorax.adapters.peft import Adapter, read_adapter
from jlorax.errors import AdapterInvalid
from jlorax.layout import RANK_PAGE, BankLayout
from tests.adapters import helpers

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def load(folder: Path, layout: BankLayout, ranks: dict[str, int], dtype: object) -> Adapter:
    tensors = helpers.tensors_for(ranks, layout.projections, dtype)
    values = helpers.config(r=1, target_modules=list(ranks), rank_pattern=ranks)
    helpers.write(folder, values, helpers.safetensors_bytes(tensors))
    return read_adapter(folder, "a", layout.projections, layout.max_rank)


def check_unpacks(adapter: Adapter, packed: PackedAdapter, layout: BankLayout) -> None:
    """Reads every page the slow way and accounts for every value, zeros too."""
    dtype = DTYPES[layout.dtype]
    rest = {pool: pages.copy() for pool, pages in packed.pages.items()}
    for p in layout.projections:
        for layer in range(layout.max_layers):
            weights = adapter.weights.get(p.name, {}).get(layer)
            expected = weights.scaling if weights else 0
            assert packed.scaling[layout.index[p.name], layer] == expected
            if weights is None:
                continue
            entry = packed.entries[p.name]
            for r in range(weights.rank):
                a = rest[layout.pool_a(p)][entry.a_start + r // RANK_PAGE, layer, r % RANK_PAGE]
                np.testing.assert_array_equal(a, weights.a[r].astype(dtype))
                a[:] = 0
                b = rest[layout.pool_b(p)][entry.b_start + r // RANK_PAGE, layer, r % RANK_PAGE]
                np.testing.assert_array_equal(b, weights.b[:, r].astype(dtype))
                b[:] = 0
    assert not any(pages.any() for pages in rest.values())
    assert {pool: len(pages) for pool, pages in packed.pages.items()} == packed.need(layout)


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 24, 256])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_matrix_comes_back(tmp_path: Path, rank: int, dtype: str) -> None:
    layout = helpers.layout(dtype)
    names = tuple(p.name for p in layout.projections)
    ranks = helpers.modules_of(layout.projections, names, rank)
    adapter = load(tmp_path, layout, ranks, np.float32)
    check_unpacks(adapter, pack(adapter, layout), layout)


@pytest.mark.parametrize("source", [np.float32, np.float16, helpers.BF16])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_ranks_and_layers_differ(tmp_path: Path, source: object, dtype: str) -> None:
    layout = helpers.layout(dtype, num_layers=3)
    ranks = {
        "model.layers.0.self_attn.q_proj": 3,
        "model.layers.2.self_attn.q_proj": 17,  # layer 1 has none
        "model.layers.1.self_attn.o_proj": 8,  # shares q_proj's pool
        "model.layers.1.mlp.down_proj": 9,
        "lm_head": 5,
    }
    adapter = load(tmp_path, layout, ranks, source)
    packed = pack(adapter, layout)
    assert packed.ranks == {"q_proj": 17, "o_proj": 8, "down_proj": 9, "lm_head": 5}
    assert packed.size_bytes == packed.buffer.nbytes + packed.scaling.nbytes
    check_unpacks(adapter, packed, layout)


def test_bytes_round_trip(tmp_path: Path) -> None:
    layout = helpers.layout("bfloat16", d=256, ffn=512)
    ranks = helpers.modules_of(layout.projections, ("q_proj", "up_proj", "lm_head"), 256)
    adapter = load(tmp_path, layout, ranks, np.float32)
    data = to_bytes(pack(adapter, layout), layout)
    assert len(data) > 2**20 and is_intact(data)  # more than one chunk
    again = from_bytes(data, layout)
    check_unpacks(adapter, again, layout)
    assert not again.buffer.flags.writeable  # a view: nothing was copied


@pytest.mark.parametrize("where", [0, 9, 13, 40, 700, -1, -(2**20)])
def test_a_flipped_byte_is_noticed(tmp_path: Path, where: int) -> None:
    layout = helpers.layout(d=256, ffn=512)
    ranks = helpers.modules_of(layout.projections, ("q_proj", "up_proj"), 256)
    data = bytearray(to_bytes(pack(load(tmp_path, layout, ranks, np.float32), layout), layout))
    data[where] ^= 1
    assert not is_intact(bytes(data))
    with pytest.raises(PackCorrupt):
        from_bytes(bytes(data), layout)


def test_other_length_or_layout_is_refused(tmp_path: Path) -> None:
    layout = helpers.layout()
    adapter = load(tmp_path, layout, {"lm_head": 8}, np.float32)
    data = to_bytes(pack(adapter, layout), layout)
    others = [helpers.layout("bfloat16"), helpers.layout(max_rank=8), helpers.layout(d=32)]
    assert len({layout_fingerprint(x) for x in [layout, *others]}) == 4
    for other in others:
        with pytest.raises(PackCorrupt, match="another base model"):
            from_bytes(data, other)
    for broken in (b"", data[:10], data[:-1], data + b"x"):
        assert not is_intact(broken)


def test_a_value_beyond_bfloat16_is_refused(tmp_path: Path) -> None:
    layout = helpers.layout("bfloat16")
    tensors = helpers.tensors_for({"lm_head": 2}, layout.projections)
    tensors["base_model.model.lm_head.lora_A.weight"][0, 0] = np.finfo(np.float32).max
    values = helpers.config(r=2, target_modules=["lm_head"])
    helpers.write(tmp_path, values, helpers.safetensors_bytes(tensors))
    with pytest.raises(AdapterInvalid, match="too large for bfloat16"):
        pack(read_adapter(tmp_path, "a", layout.projections, 8), layout)
