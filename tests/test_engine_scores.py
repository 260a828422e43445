"""Log-probabilities of prompts, and embeddings, against transformers and PEFT, in any company.

Tolerance, both in float32: 1e-3 of the largest logit, or of the largest hidden value.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from jlorax.config import (  # noqa: E402
    AdapterConfig,
    EngineConfig,
    KVConfig,
    ModelSource,
    SchedulerConfig,
    StepConfig,
)
from jlorax.engine import Engine  # noqa: E402
from jlorax.errors import AdapterNotFound, InvalidParameter, PromptTooLong  # noqa: E402
from jlorax.models.config import read_config  # noqa: E402
from jlorax.types import EmbedRequest, GenerateRequest, PromptToken  # noqa: E402
from tests.engine_home import Home, answer  # noqa: E402
from tests.lora.cases import FAMILIES  # noqa: E402
from tests.lora.oracle import logits_of, write_adapter  # noqa: E402
from tests.models.tiny import load_truth, prompt  # noqa: E402

_TOLERANCE = 1e-3
_MAX_SEQ_LEN, _PAGE_SIZE = 96, 8
_LENGTHS = (1, 2, 19, 32, 33, 75)  # a chunk is at most 32 tokens
_ADAPTERS = {"llama": ("rank 24", "rank 64"), "falcon": ("all-linear", "only lm_head")}


@dataclass
class Rig(Home):
    base: Any
    folders: dict[str | None, Path | None]  # of adapters, and None for the base

    def logits(self, adapter: str | None, ids: tuple[int, ...]) -> np.ndarray:
        return logits_of(self.base, self.folders[adapter], [ids])[0]

    def hidden(self, adapter: str | None, ids: tuple[int, ...]) -> np.ndarray:
        """f32[tokens, D], after the final norm."""
        folder = self.folders[adapter]
        model = self.base if folder is None else peft.PeftModel.from_pretrained(self.base, folder)
        try:
            with torch.inference_mode():
                made = model.eval()(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        finally:
            if folder is not None:
                model.unload()
        return np.asarray(made.hidden_states[-1][0].numpy())


@pytest.fixture(scope="module", params=["llama", pytest.param("falcon", marks=pytest.mark.slow)])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    adapters = _ADAPTERS[request.param]
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("scores")
    model = family.model.save(folder / "model")
    base = load_truth(model)
    folders = {adapter: folder / f"adapter-{i}" for i, adapter in enumerate(adapters)}
    for i, (adapter, path) in enumerate(folders.items()):
        write_adapter(base, path, family.cases[adapter].changes, "float32", seed=i)
    config = _config(model, folder, folders)
    with asyncio.Runner() as runner:
        engine = runner.run(Engine.start(config))
        yield Rig(engine, runner, base, {None: None, **folders})
        compiled = engine.stats().executables_compiled_after_ready
        runner.run(engine.stop())
        assert compiled == 0


def _config(model: Path, folder: Path, adapters: dict[str, Path]) -> EngineConfig:
    """Pages for one and a half of the longest sequences: of several, some are preempted."""
    shape = read_config(model).shape
    page_bytes = 2 * shape.num_layers * shape.num_kv_heads * _PAGE_SIZE * shape.head_dim * 4
    return EngineConfig(
        cache_dir=folder / "cache",
        model=ModelSource(str(model)),
        steps=StepConfig((4,), (32,), tile=8),
        scheduler=SchedulerConfig(max_batch=4),
        kv=KVConfig(_MAX_SEQ_LEN, cache_bytes=20 * page_bytes, page_size=_PAGE_SIZE),
        adapters=AdapterConfig(
            named=tuple(adapters.items()), bank_bytes=4 << 20, max_slots=2, max_rank=64
        ),
    )


def scoring(
    ids: tuple[int, ...], adapter: str | None = None, max_new_tokens: int = 1, **changes: Any
) -> GenerateRequest:
    return GenerateRequest(
        ids,
        adapter_id=adapter,
        max_new_tokens=max_new_tokens,
        ignore_eos=True,
        prompt_logprobs=True,
        **changes,
    )


def check_scores(rig: Rig, request: GenerateRequest, found: tuple[PromptToken, ...]) -> None:
    ids = cast("tuple[int, ...]", request.prompt)
    assert [token.id for token in found] == list(ids)
    assert [token.text.strip() for token in found] == [f"w{i}" for i in ids]
    assert found[0].logprob is None
    assert found[0].alternatives == ()
    logits = rig.logits(request.adapter_id, ids)
    wanted = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    tolerance = _TOLERANCE * float(np.abs(logits).max())
    for i, token in enumerate(found[1:]):
        assert token.logprob == pytest.approx(wanted[i, token.id], abs=tolerance)
        best = np.sort(wanted[i])[::-1][: request.num_top_logprobs]
        assert [a.logprob for a in token.alternatives] == pytest.approx(best, abs=tolerance)
        for alternative in token.alternatives:
            assert alternative.logprob == pytest.approx(wanted[i, alternative.id], abs=tolerance)


def check_embedding(rig: Rig, ids: tuple[int, ...], adapter: str | None, found: Any) -> None:
    hidden = rig.hidden(adapter, ids)
    assert found.num_tokens == len(ids)
    np.testing.assert_allclose(
        found.embedding, hidden.mean(0), rtol=0, atol=_TOLERANCE * np.abs(hidden).max()
    )


def test_prompts_of_every_length_base_and_adapters(rig: Rig) -> None:
    """One at a time, so that every chunk is the only one of its step."""

    async def test() -> None:
        for adapter in rig.folders:
            for length in _LENGTHS:
                request = scoring(prompt(length), adapter, num_top_logprobs=20)
                check_scores(rig, request, (await answer(rig.engine, request)).prompt_tokens)

    rig.run(test())


def test_adapters_move_scores_and_embeddings(rig: Rig) -> None:
    """Or one that is ignored would pass; an adapter of the head alone moves no hidden state."""
    ids = prompt(19)
    for adapter in list(rig.folders)[1:]:
        logits, base = rig.logits(adapter, ids), rig.logits(None, ids)
        assert np.abs(logits - base).max() > 100 * _TOLERANCE * np.abs(logits).max()
    moved = np.abs(rig.hidden(list(rig.folders)[1], ids) - rig.hidden(None, ids)).max()
    assert moved > 100 * _TOLERANCE


def test_mixed_company_and_preemption_change_nothing(rig: Rig) -> None:
    """Scored prompts, embeddings and ordinary requests at once, over few pages."""

    async def test() -> None:
        engine, adapters = rig.engine, list(rig.folders)
        before = engine._policy.num_preemptions
        scored = [
            scoring(prompt(20 + 9 * i, seed=i), adapters[i % 3], 12, num_top_logprobs=i % 4)
            for i in range(7)
        ]
        plain = [
            GenerateRequest(prompt(5 + i, seed=i), adapter_id=adapters[i % 3], max_new_tokens=30)
            for i in range(5)
        ]
        asked = [
            EmbedRequest(prompt(3 + 15 * i, seed=i), adapter_id=adapters[i % 3]) for i in range(6)
        ]
        results = await asyncio.gather(*(answer(engine, r) for r in (*scored, *plain)))
        embeddings = asyncio.gather(*(engine.embed(request) for request in asked))
        again = await asyncio.gather(*(answer(engine, r) for r in (*scored, *plain)))
        assert engine._policy.num_preemptions > before
        for request, result, other in zip([*scored, *plain], results, again, strict=True):
            assert [t.id for t in result.tokens] == [t.id for t in other.tokens]
            for made in (result, other):
                if request.prompt_logprobs:
                    check_scores(rig, request, made.prompt_tokens)
                else:
                    assert made.prompt_tokens == ()
        for embed, found in zip(asked, await embeddings, strict=True):
            ids = cast("tuple[int, ...]", embed.prompt)
            check_embedding(rig, ids, embed.adapter_id, found)

    rig.run(test())


def test_embeddings_of_every_length_base_and_adapters(rig: Rig) -> None:
    async def test() -> None:
        for adapter in rig.folders:
            for length in (*_LENGTHS, _MAX_SEQ_LEN):
                ids = prompt(length)
                found = await rig.engine.embed(EmbedRequest(ids, adapter_id=adapter))
                check_embedding(rig, ids, adapter, found)

    rig.run(test())


def test_a_scored_answer_is_the_answer_that_is_not_scored(rig: Rig) -> None:
    async def test() -> None:
        request = scoring(prompt(40), None, 9)
        result = await answer(rig.engine, request)
        plain = GenerateRequest(request.prompt, max_new_tokens=9, ignore_eos=True)
        unscored = await answer(rig.engine, plain)
        assert [t.id for t in result.tokens] == [t.id for t in unscored.tokens]
        assert unscored.prompt_tokens == ()

    rig.run(test())


def test_text_is_tokenized_and_truncated_like_a_prompts(rig: Rig) -> None:
    async def test() -> None:
        text = " ".join(f"w{i}" for i in prompt(12))
        found = await rig.engine.embed(EmbedRequest(text, truncate=5))
        check_embedding(rig, prompt(12)[-5:], None, found)

    rig.run(test())


def test_what_cannot_be_is_refused(rig: Rig) -> None:
    async def test() -> None:
        with pytest.raises(PromptTooLong):
            await rig.engine.embed(EmbedRequest(prompt(_MAX_SEQ_LEN + 1)))
        with pytest.raises(AdapterNotFound):
            await rig.engine.embed(EmbedRequest(prompt(5), adapter_id="nobody"))
        with pytest.raises(InvalidParameter, match="max_new_tokens"):
            await answer(rig.engine, scoring(prompt(5), max_new_tokens=0))

    rig.run(test())


def test_whoever_goes_away_leaves_nothing_behind(rig: Rig) -> None:
    async def test() -> None:
        embedding = asyncio.create_task(rig.engine.embed(EmbedRequest(prompt(90))))
        async with aclosing(cast(Any, rig.engine.generate(scoring(prompt(80), None, 9)))) as events:
            await anext(events)
        embedding.cancel()
        await asyncio.wait([embedding])

    rig.run(test())
