"""Stand-ins at the seams. Scripted, deterministic, and they remember what they saw."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jlorax.errors import AdapterConflict, AdapterNotFound, InvalidRequest, JLoraxError, Unavailable
from jlorax.types import (
    AdapterInfo,
    EmbedRequest,
    EmbedResult,
    EngineStats,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    ModelInfo,
    PromptToken,
    Tier,
    Token,
    TokenAlternative,
    TokenEvent,
)

MODEL_INFO = ModelInfo(
    model_id="tiny/base",
    architecture="llama",
    dtype="float32",
    device="cpu",
    vocab_size=1000,
    max_seq_len=256,
    max_batch=8,
    max_rank=64,
    max_slots=4,
    eos_token_ids=(2,),
)


class FakeTokenizer:
    """One token a character: its code point, modulo the vocabulary."""

    has_template = True
    chat_template = ""

    def __init__(self, template_reads: Sequence[str] = ("tools",)) -> None:
        self.template_reads = template_reads
        self.rendered: list[dict[str, Any]] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(char) % 1000 for char in text]

    def chat_reads(self, name: str) -> bool:
        return name in self.template_reads

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        """``<role>content`` of each message; what else the template was given is remembered."""
        if not self.has_template:
            raise InvalidRequest("this model has no chat template")
        given = {"add_generation_prompt": add_generation_prompt, "tools": tools, **options}
        self.rendered.append({"messages": list(messages), **given})
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return self.encode(text, add_special_tokens=False)

    def tokenize_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> list[tuple[int, str, int, int]]:
        return [(ord(char) % 1000, char, i, i + 1) for i, char in enumerate(text)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if not (skip_special_tokens and self.is_special(i))]
        return "".join(self.token_text(id_) for id_ in kept)

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id < 3


@dataclass
class FakeEngine:
    """Answers every request with ``script``, a token a word, or raises ``error`` at ``fail_at``.

    With a ``gate`` each token waits for a permit, so that a test decides when time passes.
    """

    script: Sequence[str] = ("Hello", ",", " ", "world")
    error: JLoraxError | Exception | None = None
    fail_at: int = 0
    gate: asyncio.Semaphore | None = None
    finish: FinishReason = FinishReason.EOS_TOKEN
    state: str = "ready"
    model_info: ModelInfo = MODEL_INFO
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    seen: list[GenerateRequest] = field(default_factory=list)
    embedded: list[EmbedRequest] = field(default_factory=list)
    num_open: int = 0
    num_closed: int = 0
    num_events: int = 0
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    registered: dict[str, AdapterInfo] = field(default_factory=dict)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        self.seen.append(request)
        self.num_open += 1
        self.opened.set()
        try:
            async for event in self._events(request):
                self.num_events += 1
                yield event
        finally:
            self.num_open -= 1
            self.num_closed += 1
            self.closed.set()

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Two numbers: the prompt's length in tokens, and a half."""
        self.embedded.append(request)
        if self.error is not None:
            raise self.error
        if request.adapter_id is not None:
            self._visible(request.adapter_id, request.tenant)
        ids = request.prompt
        if isinstance(ids, str):
            ids = tuple(self.tokenizer.encode(ids, request.add_special_tokens))
        return EmbedResult((float(len(ids)), 0.5), len(ids))

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        if self.state != "ready":
            raise Unavailable(f"the engine is {self.state}")
        if request.adapter_id is not None:
            self._visible(request.adapter_id, request.tenant)
        tokens: list[Token] = []
        for index, text in enumerate(self.script):
            if self.error is not None and index == self.fail_at:
                raise self.error
            if self.gate is not None:
                await self.gate.acquire()
            tokens.append(_token(request, index, text))
            last = index + 1 == len(self.script)
            result = self._result(request, tuple(tokens)) if last else None
            yield TokenEvent(tokens[-1], index, result)

    def _result(self, request: GenerateRequest, tokens: tuple[Token, ...]) -> GenerateResult:
        ids = request.prompt
        if isinstance(ids, str):
            ids = tuple(self.tokenizer.encode(ids, request.add_special_tokens))
        prompt_tokens = [
            PromptToken(id_, chr(id_), -0.5, _alternatives(request))
            if i
            else PromptToken(id_, chr(id_), None)
            for i, id_ in enumerate(ids)
        ]
        return GenerateResult(
            text="".join(token.text for token in tokens),
            finish_reason=self.finish,
            tokens=tokens,
            prompt_token_ids=ids,
            seed=None if request.sampling.temperature == 0 else request.sampling.seed or 7,
            prompt_tokens=tuple(prompt_tokens) if request.prompt_logprobs else (),
            queue_s=0.25,
            time_to_first_token_s=0.5,
            total_s=1.5,
        )

    async def load_adapter(
        self, adapter_id: str, folder: str, tenant: str = "default", replace: bool = False
    ) -> AdapterInfo:
        if adapter_id in self.registered and not replace:
            raise AdapterConflict(f"adapter {adapter_id!r} exists already")
        if self.error is not None:
            raise self.error
        self.registered[adapter_id] = adapter_info(adapter_id, folder, tenant=tenant)
        return self.registered[adapter_id]

    async def unload_adapter(
        self, adapter_id: str, tenant: str = "default", force: bool = False
    ) -> None:
        info = self._visible(adapter_id, tenant)
        if info.num_requests and not force:
            raise AdapterConflict(f"{adapter_id!r} is used by {info.num_requests} requests")
        del self.registered[adapter_id]

    async def chat_tokenizer(self, request: GenerateRequest) -> FakeTokenizer:
        return self.tokenizer

    async def prefetch_adapter(self, adapter_id: str, tenant: str = "default") -> AdapterInfo:
        return replace(self._visible(adapter_id, tenant), tier=Tier.HOST)

    async def pin_adapter(
        self, adapter_id: str, tenant: str = "default", pinned: bool = True
    ) -> AdapterInfo:
        info = replace(self._visible(adapter_id, tenant), pinned=pinned)
        self.registered[adapter_id] = info
        return info

    async def adapters(self, tenant: str = "default") -> list[AdapterInfo]:
        return [i for i in self.registered.values() if i.tenant in (tenant, "default")]

    def _visible(self, adapter_id: str, tenant: str) -> AdapterInfo:
        info = self.registered.get(adapter_id)
        if info is None or info.tenant not in (tenant, "default"):
            raise AdapterNotFound(adapter_id)
        return info

    def stats(self) -> EngineStats:
        return EngineStats(self.state, 0, self.num_open, 8, 8, 0, 0, 0)

    def metrics(self) -> bytes:
        return b"# TYPE jlorax_up gauge\njlorax_up 1\n"

    async def drain(self) -> None:
        """Like the real one: refuses new requests, returns when the running ones have ended."""
        self.state = "draining"
        self.draining.set()
        while self.num_open:
            self.closed.clear()
            await self.closed.wait()


def adapter_info(adapter_id: str, folder: str = "folder", **changes: Any) -> AdapterInfo:
    info = AdapterInfo(
        adapter_id=adapter_id,
        tenant="default",
        generation=1,
        source=folder,
        tier=Tier.DEVICE,
        rank=8,
        target_modules=("q_proj", "v_proj"),
        size_bytes=4096,
        num_requests=0,
        last_used_s=None,
    )
    return replace(info, **changes)


def _token(request: GenerateRequest, index: int, text: str) -> Token:
    """Its id is 100 + its place; alternatives only as many as were asked for."""
    return Token(100 + index, text, -0.25 * (index + 1), False, _alternatives(request))


def _alternatives(request: GenerateRequest) -> tuple[TokenAlternative, ...]:
    return tuple(
        TokenAlternative(200 + k, chr(200 + k), -1.0 - k) for k in range(request.num_top_logprobs)
    )
