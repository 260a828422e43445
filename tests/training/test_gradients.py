"""Loss and every gradient against peft's, for each architecture and what differs within it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

from jlorax.training import losses
from jlorax.training.losses import cross_entropy
from jlorax.training.step import Forward
from tests.models.tiny import TinyModel
from tests.training.peft_models import Pair, make_pair, packed_row, sequences, their_loss

TWO = {"num_hidden_layers": 2}
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FALCON = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
CASES: dict[str, tuple[TinyModel, tuple[str, ...], dict[str, Any]]] = {
    "llama": (TinyModel("llama", TWO), LLAMA, {}),
    "llama, head": (TinyModel("llama", {"tie_word_embeddings": False}), ("lm_head", "q_proj"), {}),
    "llama, patterns": (
        TinyModel("llama", TWO),
        ("q_proj", "down_proj"),
        {
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "mistral": (TinyModel("mistral", TWO | {"sliding_window": 16, "head_dim": 24}), LLAMA, {}),
    "falcon": (TinyModel("falcon", TWO), FALCON, {}),
    "falcon, alibi": (TinyModel("falcon", RW | {"num_attention_heads": 12}), FALCON[:2], {}),
}
TOLERANCE = 1e-4  # of the largest value of each matrix


def loss_and_gradients(pair: Pair, recompute: bool) -> tuple[float, Any]:
    forward = Forward(pair.base, pair.shape, cross_entropy, recompute, "xla")

    def mean(adapter: Any, leaves: Any, rows: Any) -> jax.Array:
        summed = forward.loss(adapter, leaves, rows, None)
        return summed.total / summed.weight

    rows = packed_row(sequences((20, 33)))
    loss, gradients = jax.jit(jax.value_and_grad(mean))(pair.adapter, pair.base.leaves, rows)
    return float(loss), gradients


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model, targets, lora = CASES[request.param]
    pair = make_pair(model, tmp_path_factory.mktemp("pair") / "model", targets, **lora)
    loss = their_loss(pair.theirs, sequences((20, 33)))
    loss.backward()
    pair.theirs.loss = float(loss)
    return pair


@pytest.mark.parametrize(
    ("recompute", "chunk"), [(True, 8), pytest.param(False, 2048, marks=pytest.mark.slow)]
)
def test_equal_peft_s(
    pair: Pair, recompute: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences in a row give what each gives alone; logits in chunks, what they give whole."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
    loss, gradients = loss_and_gradients(pair, recompute)
    assert loss == pytest.approx(pair.theirs.loss, rel=1e-5)
    for module, weights in gradients.items():
        for side in ("a", "b"):
            theirs = pair.gradient(module, side)
            away = np.abs(np.asarray(getattr(weights, side)) - theirs).max()
            assert away <= TOLERANCE * np.abs(theirs).max(), (module, side)


@pytest.mark.parametrize(("form", "bytes_each"), [("int8", 2), ("bfloat16", 3)])
def test_a_narrow_base_is_nearly_the_same(form: Any, bytes_each: int, tmp_path: Path) -> None:
    pair = make_pair(TinyModel("llama", TWO), tmp_path / "model", LLAMA, form=form)
    _, gradients = loss_and_gradients(pair, recompute=True)
    their_loss(pair.theirs, sequences((20, 33))).backward()
    whole = np.concatenate([np.asarray(g).ravel() for g in jax.tree.leaves(gradients)])
    sides = [(m, side) for m in gradients for side in ("a", "b")]
    theirs = np.concatenate([pair.gradient(*side).ravel() for side in sides])
    likeness = whole @ theirs / np.linalg.norm(whole) / np.linalg.norm(theirs)
    assert 0.99 < likeness < 0.99999  # another base, but hardly
    assert pair.base.size_bytes < bytes_each * pair.base.num_parameters


def test_dropout_is_drawn_anew_each_step(tmp_path: Path) -> None:
    pair = make_pair(TinyModel("llama"), tmp_path / "model", ("q_proj", "v_proj"))
    shape = replace(pair.shape, dropout=0.5)
    forward = Forward(pair.base, shape, cross_entropy, True, "xla")
    rows = packed_row(sequences((20, 33)))
    loss = jax.jit(lambda key: forward.loss(pair.adapter, pair.base.leaves, rows, key).total)
    drawn = [float(loss(jax.random.key(seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    whole = Forward(pair.base, pair.shape, cross_entropy, True, "xla")
    plain = float(whole.loss(pair.adapter, pair.base.leaves, rows, None).total)
    assert float(forward.loss(pair.adapter, pair.base.leaves, rows, None).total) == pytest.approx(
        plain
    )
    many = np.mean([float(loss(jax.random.key(seed))) for seed in range(40)])
    assert many == pytest.approx(plain, rel=0.02)  # what is kept makes up for what is dropped
