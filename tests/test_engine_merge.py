"""Merged and scaled adapters through the whole engine, beside PEFT's merged model."""

from __future__ import annotations

import asyncio
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from jlorax.adapters.merge import seeded_masks  # noqa: E402
from jlorax.config import AdapterConfig, StepConfig  # noqa: E402
from jlorax.errors import (  # noqa: E402
    AdapterInvalid,
    AdapterNotFound,
    InvalidAdapterId,
    InvalidParameter,
    InvalidRequest,
    JLoraxError,
)
from jlorax.types import (  # noqa: E402
    AdapterMerge,
    GenerateRequest,
    MajoritySign,
    MergeStrategy,
)
from tests import engine_home  # noqa: E402
from tests.lora.oracle import write_adapter  # noqa: E402
from tests.models.tiny import TinyModel, engine_for, load_truth, prompt  # noqa: E402

NUM_TOKENS = 24
TIE = 1e-4  # of the largest logit
PROMPT = prompt(11)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 6, "lora_alpha": 12, "target_modules": ALL},
    "b": {"r": 6, "lora_alpha": 3, "target_modules": ALL, "use_rslora": True},
    "c": {"r": 6, "lora_alpha": 9, "target_modules": [*ALL[:3], "lm_head"]},
    "x": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
    "y": {"r": 11, "lora_alpha": 9, "target_modules": ALL, "rank_pattern": {"q_proj": 5}},
}
MERGES = {
    "linear": AdapterMerge(("a", "c", "b"), (0.7, 1.3, -0.4)),
    "ties": AdapterMerge(("a", "c", "b"), (0.7, 1.3, 0.4), MergeStrategy.TIES, 0.5),
    "ties by frequency": AdapterMerge(
        ("a", "c", "b"), (1.0, 1.3, 0.8), MergeStrategy.TIES, 0.8, MajoritySign.FREQUENCY
    ),
    "dare_linear": AdapterMerge(("a", "b"), (0.7, 1.3), MergeStrategy.DARE_LINEAR, 0.6, seed=3),
    "dare_ties": AdapterMerge(("a", "b"), (0.7, 1.3), MergeStrategy.DARE_TIES, 0.6, seed=4),
    "cat": AdapterMerge(("a", "x", "y"), (0.7, -1.3, 0.5), MergeStrategy.CAT),
    "svd": AdapterMerge(("y", "x", "a"), (0.7, 1.3, 0.5), MergeStrategy.SVD),
    "svd of rank 3": AdapterMerge(("y", "a"), (0.7, 1.3), MergeStrategy.SVD, rank=3),
    "one": AdapterMerge(("y",), (-0.8,), MergeStrategy.TIES, density=0.2),
}
LINEAR = MERGES["linear"]


@dataclass
class Home(engine_home.Home):
    """And PEFT's model with the same adapters."""

    peft: Any
    root: Path

    async def tokens(self, **asked: Any) -> tuple[int, ...]:
        request = GenerateRequest(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True)
        events = [event async for event in self.engine.generate(replace(request, **asked))]
        return tuple(event.token.id for event in events)

    def num_loads(self) -> float:
        metrics = self.engine.metrics().decode()
        return sum(map(float, re.findall(r"jlorax_adapter_loads_total{.*} (\S+)", metrics)))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("merge")
    model = TinyModel("llama", {"tie_word_embeddings": False}).save(folder / "model")
    base, root = load_truth(model), folder / "adapters"
    for seed, (name, changes) in enumerate(ADAPTERS.items()):
        write_adapter(base, root / name, changes, "float32", seed)
    adapters = AdapterConfig(root=root, bank_bytes=8 << 20, max_slots=12, max_rank=24)
    opening = engine_for(
        model,
        folder / "cache",
        steps=StepConfig((16,), (64,), tile=8),
        max_batch=16,
        adapters=adapters,
    )
    theirs = None
    for name in ADAPTERS:
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(load_truth(model), root / name, name)
        else:
            theirs.load_adapter(root / name, name)
    with asyncio.Runner() as loop:
        engine = loop.run(opening.__aenter__())
        try:
            yield Home(engine, loop, theirs, root)
        finally:
            loop.run(engine.stop())


def peft_logits(home: Home, merge: AdapterMerge, tokens: tuple[int, ...]) -> np.ndarray:
    """f32[n, V] before each of ``tokens``; the merge is PEFT's own."""
    model, masks = home.peft, seeded_masks(merge.seed)

    def bernoulli(probabilities: Any) -> Any:
        """Our masks: with one layer, PEFT takes them in our order."""
        mask = masks(tuple(probabilities.shape), merge.density)
        return torch.from_numpy(mask.astype(np.float32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", bernoulli)
        model.add_weighted_adapter(
            list(merge.adapter_ids),
            list(merge.weights),
            "merged",
            combination_type=merge.strategy.value,
            svd_rank=merge.rank,
            density=merge.density,
            majority_sign_method=merge.majority_sign.value,
        )
    model.set_adapter("merged")
    try:
        return _logits(model, tokens)
    finally:
        model.delete_adapter("merged")


def _logits(model: Any, tokens: tuple[int, ...]) -> np.ndarray:
    row = PROMPT + tokens[:-1]
    with torch.inference_mode():
        logits = model(torch.tensor([row]), use_cache=False).logits[0]
    return np.asarray(logits[len(PROMPT) - 1 :].numpy())


def check_greedy(tokens: tuple[int, ...], expected: np.ndarray) -> None:
    """Each is the argmax of the logits before it, or a tie."""
    assert len(tokens) == NUM_TOKENS
    for i in np.flatnonzero(expected.argmax(-1) != tokens):
        margin = expected[i].max() - expected[i, tokens[i]]
        assert margin < TIE * np.abs(expected).max(), (i, margin)


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_answers_as_peft_s_merged_model(home: Home, name: str) -> None:
    async def test() -> None:
        merge = MERGES[name]
        tokens = await home.tokens(merge=merge)
        check_greedy(tokens, peft_logits(home, merge, tokens))
        assert tokens != await home.tokens()

    home.run(test())


def test_merged_beside_unmerged_in_one_batch(home: Home) -> None:
    async def test() -> None:
        asked: list[dict[str, Any]] = [{"merge": merge} for merge in MERGES.values()]
        asked += [{"adapter_id": name} for name in ADAPTERS] + [{}]
        alone = [await home.tokens(**each) for each in asked]
        assert len(set(alone)) == len(asked)
        assert list(await asyncio.gather(*(home.tokens(**each) for each in asked))) == alone

    home.run(test())


def test_the_second_use_is_a_hit(home: Home) -> None:
    async def test() -> None:
        merge = replace(LINEAR, weights=(0.1, 0.2, 0.3))
        first = await home.tokens(merge=merge)
        num_loads = home.num_loads()
        again = await asyncio.gather(*(home.tokens(merge=merge) for _ in range(3)))
        assert set(again) == {first} and home.num_loads() == num_loads
        await home.tokens(merge=replace(merge, weights=(0.1, 0.2, 0.4)))
        assert home.num_loads() == num_loads + 1

    home.run(test())


def test_a_replaced_part_gives_new_tokens(home: Home) -> None:
    async def test() -> None:
        await home.engine.load_adapter("mine", "a")
        merge = AdapterMerge(("mine", "c"), (1.0, 1.0))
        old = await home.tokens(merge=merge)
        assert old == await home.tokens(merge=replace(merge, adapter_ids=("a", "c")))
        await home.engine.load_adapter("mine", "b", replace=True)
        new = await home.tokens(merge=merge)
        assert new != old
        assert new == await home.tokens(merge=replace(merge, adapter_ids=("b", "c")))
        await home.engine.unload_adapter("mine")
        with pytest.raises(AdapterNotFound, match="'mine'"):
            await home.tokens(merge=merge)

    home.run(test())


def test_a_folder_whose_files_became_others_gives_new_tokens(home: Home) -> None:
    async def test() -> None:
        shutil.copytree(home.root / "a", home.root / "changing")
        merge = AdapterMerge(("changing", "b"), (1.0, 1.0))
        old = await home.tokens(merge=merge)
        shutil.rmtree(home.root / "changing")
        shutil.copytree(home.root / "c", home.root / "changing")
        assert await home.tokens(merge=merge) != old
        shutil.rmtree(home.root / "changing")

    home.run(test())


@pytest.mark.parametrize("name", ["a", "y"])
def test_a_scale_of_0_is_the_base_and_of_1_the_adapter_itself(home: Home, name: str) -> None:
    async def test() -> None:
        base, itself = await home.tokens(), await home.tokens(adapter_id=name)
        assert base != itself
        assert await home.tokens(adapter_id=name, adapter_scale=0.0) == base
        assert await home.tokens(adapter_id=name, adapter_scale=1.0) == itself
        half = await home.tokens(adapter_id=name, adapter_scale=0.5)
        assert half not in (base, itself)
        check_greedy(half, peft_logits(home, AdapterMerge((name,), (0.5,)), half))
        merge = AdapterMerge((name,), (1.0,), MergeStrategy.CAT)
        assert await home.tokens(merge=merge) == itself
        assert await home.tokens(merge=merge, adapter_scale=0.5) == half

    home.run(test())


def test_a_scaled_merge_is_that_much_stronger(home: Home) -> None:
    async def test() -> None:
        doubled = replace(LINEAR, weights=tuple(2 * weight for weight in LINEAR.weights))
        tokens = await home.tokens(merge=LINEAR, adapter_scale=2.0)
        assert tokens == await home.tokens(merge=doubled)
        check_greedy(tokens, peft_logits(home, doubled, tokens))
        assert await home.tokens(merge=LINEAR, adapter_scale=0.0) == await home.tokens()

    home.run(test())


def test_merges_are_no_adapters_of_anybody_s(home: Home) -> None:
    async def test() -> None:
        await home.tokens(merge=LINEAR)
        names = {info.adapter_id for info in await home.engine.adapters()}
        assert names == set(ADAPTERS)
        resident = {v.adapter_id for v in home.engine._parts.tiers.slots.versions}
        (merged,) = [name for name in resident if name.startswith("merge:")][:1]
        for attempt in (
            home.tokens(adapter_id=merged),
            home.engine.pin_adapter(merged),
            home.engine.load_adapter(merged, "a"),
        ):
            with pytest.raises(InvalidAdapterId):
                await attempt
        with pytest.raises(AdapterNotFound):
            await home.engine.unload_adapter(merged)

    home.run(test())


def test_another_tenant_s_adapter_is_no_part(home: Home) -> None:
    async def test() -> None:
        await home.engine.load_adapter("own", "c", tenant="one")
        merge = AdapterMerge(("a", "own"), (1.0, 1.0))
        tokens = await home.tokens(merge=merge, tenant="one")
        assert tokens == await home.tokens(merge=replace(merge, adapter_ids=("a", "c")))
        for tenant in ("two", "default"):
            with pytest.raises(AdapterNotFound, match="'own'"):
                await home.tokens(merge=merge, tenant=tenant)
        await home.engine.unload_adapter("own", "one")

    home.run(test())


REFUSED: dict[str, tuple[type[JLoraxError], str, dict[str, Any]]] = {
    "unknown part": (
        AdapterNotFound,
        "'nobody'",
        {"merge": AdapterMerge(("a", "nobody"), (1.0, 1.0))},
    ),
    "two unknown parts": (
        AdapterNotFound,
        "'nobody'",
        {"merge": AdapterMerge(("nobody", "neither"), (1.0, 1.0))},
    ),
    "a name that is none": (
        InvalidAdapterId,
        "'../a'",
        {"merge": AdapterMerge(("a", "../a"), (1.0, 1.0))},
    ),
    "the base model": (
        AdapterNotFound,
        "__base_model__",
        {"merge": AdapterMerge(("a", "__base_model__"), (1.0, 1.0))},
    ),
    "a source that is none": (
        InvalidParameter,
        "adapter_source",
        {"merge": LINEAR, "adapter_source": "far"},
    ),
    "ranks": (
        AdapterInvalid,
        "'a \\+ x': merge: linear .* 6, 2; cat and svd",
        {"merge": AdapterMerge(("a", "x"), (1.0, 1.0))},
    ),
    "rank": (
        AdapterInvalid,
        "rank 28, above the limit of 24",
        {"merge": replace(MERGES["cat"], adapter_ids=("a", "y", "y"))},
    ),
    "a broken part": (
        AdapterInvalid,
        "'broken': adapter_model",
        {"merge": AdapterMerge(("a", "broken"), (1.0, 1.0))},
    ),
    "another model's": (
        AdapterInvalid,
        "'other': .*another base model",
        {"merge": AdapterMerge(("a", "other"), (1.0, 1.0))},
    ),
    "values": (
        AdapterInvalid,
        "too large for float32",
        {"merge": replace(LINEAR, weights=(1e308, 1.0, 1.0))},
    ),
    "scaled values": (
        AdapterInvalid,
        "too large for float32",
        {"adapter_id": "a", "adapter_scale": 1e300},
    ),
    "no weights": (InvalidParameter, "merge.weights", {"merge": AdapterMerge(("a",), ())}),
    "an adapter too": (InvalidRequest, "'a' and a merge", {"merge": LINEAR, "adapter_id": "a"}),
    "a scale of nothing": (InvalidParameter, "adapter_scale", {"adapter_scale": 2.0}),
    "a scale that is none": (
        InvalidParameter,
        "adapter_scale",
        {"adapter_id": "a", "adapter_scale": math.nan},
    ),
}


@pytest.fixture(scope="module")
def broken(home: Home) -> Iterator[None]:
    for name in ("broken", "other"):
        shutil.copytree(home.root / "a", home.root / name)
    (home.root / "broken" / "adapter_model.safetensors").write_bytes(b"no such thing")
    narrow = TinyModel("llama", {"hidden_size": 32}).save(home.root.parent / "narrow")
    write_adapter(load_truth(narrow), home.root / "other", ADAPTERS["a"], "float32")
    yield
    for name in ("broken", "other"):
        shutil.rmtree(home.root / name)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(home: Home, broken: None, case: str) -> None:
    kind, message, asked = REFUSED[case]

    async def test() -> None:
        with pytest.raises(kind, match=message):
            await home.tokens(**asked)
        assert await home.tokens(merge=LINEAR)  # the engine goes on

    home.run(test())
