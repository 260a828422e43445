"""Every (A, B) comes back out of the pages; a damaged file is noticed."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jlorax.adapters.pack import PackedAdapter, pack, page_views
from jlorax.adapters.packed_file import PackCorrupt, digest_of, layout_fingerprint
from jlorax.adapters.peft import Adapter, read_adapter
from jlorax.errors import AdapterInvalid
from jlorax.layout import ALIGN_BYTES, RANK_PAGE, BankLayout, PlainMemory
from tests.adapters import helpers

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def check_unpacks(adapter: Adapter, packed: PackedAdapter, layout: BankLayout) -> None:
    """Reads every page the slow way and accounts for every value, zeros too."""
    dtype = DTYPES[layout.dtype]
    need = packed.need(layout)
    rest = {p: v.copy() for p, v in page_views(packed.buffer, need, layout).items()}
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
    assert not np.asarray(packed.buffer)[layout.units(need) :].any()  # the padding
    assert len(packed.buffer) in layout.buffer_sizes


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 24, 256])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_matrix_comes_back(tmp_path: Path, rank: int, dtype: str) -> None:
    layout = helpers.layout(dtype)
    names = tuple(p.name for p in layout.projections)
    ranks = helpers.modules_of(layout.projections, names, rank)
    adapter = helpers.adapter(tmp_path, layout, ranks, np.float32)
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
    adapter = helpers.adapter(tmp_path, layout, ranks, source)
    packed = pack(adapter, layout)
    assert packed.ranks == {"q_proj": 17, "o_proj": 8, "down_proj": 9, "lm_head": 5}
    assert packed.size_bytes == packed.buffer.nbytes + packed.scaling.nbytes
    check_unpacks(adapter, packed, layout)


def test_bytes_round_trip(tmp_path: Path) -> None:
    layout = helpers.layout("bfloat16", d=256, ffn=512)
    ranks = helpers.modules_of(layout.projections, ("q_proj", "up_proj", "lm_head"), 256)
    adapter = helpers.adapter(tmp_path, layout, ranks, np.float32)
    data = helpers.packed_bytes(pack(adapter, layout), layout)
    assert len(data) > 2**20  # more than one chunk
    check_unpacks(adapter, helpers.read_bytes(data, layout), layout)


def test_padding_stays_out_of_the_file(tmp_path: Path) -> None:
    layout = helpers.layout("bfloat16", d=256, ffn=512)
    ranks = helpers.modules_of(layout.projections, ("q_proj",), 40)
    packed = pack(helpers.adapter(tmp_path, layout, ranks), layout)
    page_bytes = layout.units(packed.need(layout)) * layout.unit * 2
    assert packed.buffer.nbytes > 1.2 * page_bytes
    assert page_bytes < len(helpers.packed_bytes(packed, layout)) < 1.1 * page_bytes


def test_what_waits_in_ram_is_used_in_place_and_never_changes(tmp_path: Path) -> None:
    """A CPU device reads the very bytes: they must lie as it likes them, and stay."""
    layout = helpers.layout()
    adapter = helpers.adapter(tmp_path, layout, {"lm_head": 8})
    packed = pack(adapter, layout)
    for buffer in (
        packed.buffer,
        helpers.read_bytes(helpers.packed_bytes(packed, layout), layout).buffer,
    ):
        assert isinstance(buffer, np.ndarray) and buffer.flags.c_contiguous
        assert buffer.ctypes.data % ALIGN_BYTES == 0
        kept = PlainMemory().keep(buffer)
        assert kept is buffer and not buffer.flags.writeable


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LLAMA_2_7B = BankLayout(
    helpers.llama_projections(4096, 4096, 11008, 32000, num_layers=32), "bfloat16", 64
)


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ATTENTION, (*ATTENTION, *MLP)])
def test_usual_adapters_travel_without_padding(names: tuple[str, ...], rank: int) -> None:
    need = LLAMA_2_7B.pages_needed(dict.fromkeys(names, rank))
    assert LLAMA_2_7B.buffer_size(need) < 1.02 * LLAMA_2_7B.units(need)


@pytest.mark.parametrize("names", [ATTENTION[:1], ATTENTION[:2], ATTENTION, MLP, ATTENTION + MLP])
def test_no_adapter_of_rank_8_or_more_is_padded_beyond_twice_its_size(
    names: tuple[str, ...],
) -> None:
    for rank in range(8, 65):
        need = LLAMA_2_7B.pages_needed(dict.fromkeys(names, rank))
        assert LLAMA_2_7B.buffer_size(need) <= 2 * LLAMA_2_7B.units(need)


def test_buffers_come_in_few_sizes() -> None:
    for max_rank in (1, 16, 64, 256):
        layout = BankLayout(LLAMA_2_7B.projections, "bfloat16", max_rank)
        assert len(layout.buffer_sizes) <= 13
        assert layout.buffer_sizes[-1] == layout.units(layout.most_pages)


@pytest.mark.parametrize("where", [0, 9, 13, 40, 700, -1, -(2**20)])
def test_a_flipped_byte_is_noticed(tmp_path: Path, where: int) -> None:
    layout = helpers.layout(d=256, ffn=512)
    ranks = helpers.modules_of(layout.projections, ("q_proj", "up_proj"), 256)
    data = bytearray(
        helpers.packed_bytes(
            pack(helpers.adapter(tmp_path, layout, ranks, np.float32), layout), layout
        )
    )
    data[where] ^= 1
    with pytest.raises(PackCorrupt):
        helpers.read_bytes(bytes(data), layout)


def test_other_length_or_layout_is_refused(tmp_path: Path) -> None:
    layout = helpers.layout()
    adapter = helpers.adapter(tmp_path, layout, {"lm_head": 8})
    data = helpers.packed_bytes(pack(adapter, layout), layout)
    others = [helpers.layout("bfloat16"), helpers.layout(max_rank=8), helpers.layout(d=32)]
    assert len({layout_fingerprint(x) for x in [layout, *others]}) == 4
    for other in others:
        with pytest.raises(PackCorrupt, match="another base model"):
            helpers.read_bytes(data, other)
    for broken in (b"", data[:10], data[:-1], data + b"x"):
        with pytest.raises(PackCorrupt):
            helpers.read_bytes(broken, layout)


def test_a_digest_names_the_content(tmp_path: Path) -> None:
    layout = helpers.layout()

    def digest(seed: int, rank: int = 4, layout: BankLayout = layout) -> str:
        ranks = {"lm_head": rank}
        adapter = helpers.adapter(tmp_path / f"{seed}-{rank}", layout, ranks, seed=seed)
        return digest_of(pack(adapter, layout), layout)

    assert digest(0) == digest(0)
    assert len({digest(0), digest(1), digest(0, 3), digest(0, layout=helpers.layout(d=32))}) == 4


def test_a_value_beyond_bfloat16_is_refused(tmp_path: Path) -> None:
    layout = helpers.layout("bfloat16")
    tensors = helpers.tensors_for({"lm_head": 2}, layout.projections)
    tensors["base_model.model.lm_head.lora_A.weight"][0, 0] = np.finfo(np.float32).max
    values = helpers.config(r=2, target_modules=["lm_head"])
    helpers.write(tmp_path, values, helpers.safetensors_bytes(tensors))
    with pytest.raises(AdapterInvalid, match="too large for bfloat16"):
        pack(read_adapter(tmp_path, "a", layout.projections, 8), layout)
