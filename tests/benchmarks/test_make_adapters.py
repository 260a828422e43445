"""Made adapters are read by us and by PEFT, differ, move the model, and come out the same again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.__main__ import main
from benchmarks.make_adapters import ATTENTION, make_adapters
from jlorax.adapters.peft import read_adapter
from jlorax.models.config import read_config
from tests import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_model(tmp_path_factory.mktemp("base") / "model")


def test_our_reader_takes_them_with_their_ranks(model: Path, tmp_path: Path) -> None:
    folders = make_adapters(model, tmp_path, 3, ranks=(4, 8))
    projections = read_config(model).projections()
    ranks = [read_adapter(f, f.name, projections, max_rank=64).ranks for f in folders]
    assert ranks == [dict.fromkeys(ATTENTION, r) for r in (4, 8, 4)]
    assert len({f.name for f in folders}) == 3


def test_lora_b_is_not_zero_and_no_two_are_equal(model: Path, tmp_path: Path) -> None:
    first, second = (
        load_file(f / "adapter_model.safetensors") for f in make_adapters(model, tmp_path, 2)
    )
    for name, tensor in first.items():
        assert np.abs(tensor).max() > 0
        assert not np.array_equal(tensor, second[name])


def test_an_adapter_depends_on_seed_and_number_alone(model: Path, tmp_path: Path) -> None:
    def second(folder: str, num: int, seed: int) -> bytes:
        made = make_adapters(model, tmp_path / folder, num, seed=seed)[1]
        return (made / "adapter_model.safetensors").read_bytes()

    assert second("a", 2, 0) == second("b", 3, 0)
    assert second("a", 2, 0) != second("c", 2, 1)


def test_bfloat16_halves_the_file_and_reads_as_well(model: Path, tmp_path: Path) -> None:
    (wide,) = make_adapters(model, tmp_path / "wide", 1, ranks=(8,))
    (half,) = make_adapters(model, tmp_path / "half", 1, ranks=(8,), dtype="bfloat16")
    sizes = [(f / "adapter_model.safetensors").stat().st_size for f in (wide, half)]
    assert sizes[1] < 0.7 * sizes[0]
    read = read_adapter(half, "half", read_config(model).projections(), max_rank=64)
    b = read.weights["q_proj"][0].b.astype(np.float32)
    assert b.std() == pytest.approx(0.02, rel=0.2)


def test_hard_links_share_weights_in_turn_while_every_config_differs(
    model: Path, tmp_path: Path
) -> None:
    def made() -> list[Path]:
        return make_adapters(model, tmp_path, 7, ranks=(4, 8, 16), hard_link=2)

    folders = made()
    inodes = [(f / "adapter_model.safetensors").stat().st_ino for f in folders]
    assert len(set(inodes)) == 2
    assert inodes == [inodes[i % 2] for i in range(7)]
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in folders]
    assert len({config["lora_alpha"] for config in configs}) == 7
    projections = read_config(model).projections()
    read = [read_adapter(f, f.name, projections, max_rank=64) for f in folders]
    assert [adapter.ranks["q_proj"] for adapter in read] == [4, 8, 4, 8, 4, 8, 4]
    weights = [(f / "adapter_model.safetensors").read_bytes() for f in folders]
    made()  # over what is there
    assert [(f / "adapter_model.safetensors").read_bytes() for f in folders] == weights


def test_making_them_anew_never_writes_through_a_link(model: Path, tmp_path: Path) -> None:
    linked = make_adapters(model, tmp_path, 4, hard_link=2)
    separate = make_adapters(model, tmp_path, 4)
    assert linked == separate
    whole = [(f / "adapter_model.safetensors").read_bytes() for f in separate]
    assert len(set(whole)) == 4


def test_the_command_links_and_takes_a_shape_for_a_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        main(["make-adapters", "3", "--shape", "tiny", "--hard-link", "1", "--out", str(out)]) == 0
    )
    files = [out / f"adapter-000{i}" / "adapter_model.safetensors" for i in range(3)]
    assert len({file.stat().st_ino for file in files}) == 1


def test_the_command_writes_the_targets_asked_for(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["2", "--rank", "4", "--targets", "up_proj", "--model", str(model), "--out", str(out)]
    assert main(["make-adapters", *asked]) == 0
    tensors = load_file(out / "adapter-0001" / "adapter_model.safetensors")
    assert all(".mlp.up_proj.lora_" in name for name in tensors)


def test_an_unknown_target_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="queue_proj"):
        make_adapters(model, tmp_path, 1, targets=("queue_proj",))


def test_no_files_to_link_to_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="0 weight files"):
        make_adapters(model, tmp_path, 1, hard_link=0)


def test_peft_loads_them_and_they_move_the_logits(model: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folders = make_adapters(model, tmp_path, 1)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = base.eval()(tokens).logits
        after = peft.PeftModel.from_pretrained(base, folders[0]).eval()(tokens).logits
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
