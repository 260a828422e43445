"""Ingress: checks limits, resolves the adapter, makes tokens, and hands a sequence on."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass

from jlorax.actors.mailbox import Mailbox
from jlorax.actors.messages import (
    Admit,
    CacheMessage,
    CompileGrammar,
    Derive,
    GrammarMessage,
    GrammarStart,
    IngressMessage,
    Resolve,
    SchedulerMessage,
    Submit,
)
from jlorax.actors.stream import Opened, TokenStream
from jlorax.adapters.merge import merge_of
from jlorax.errors import InvalidParameter, InvalidRequest, JLoraxError, PromptTooLong
from jlorax.scheduling.sequence import Sequence
from jlorax.tokenizer import Tokenizer
from jlorax.types import MAX_LOGIT_BIASES, AdapterMerge, AdapterVersion, GenerateRequest

log = logging.getLogger("jlorax.ingress")
_INLINE_CHARACTERS = 2_000  # longer prompts are tokenized off the loop: 1 MB takes 300 ms


@dataclass(frozen=True)
class Limits:
    """``max_seq_len`` tokens, prompt and answer together."""

    max_seq_len: int
    vocab_size: int


class Ingress:
    """A task a request, so that a name that a remote has to be asked for, or a long prompt, holds
    up nobody else. The engine bounds how many requests are open."""

    def __init__(
        self,
        inbox: Mailbox[IngressMessage],
        cache: Mailbox[CacheMessage],
        scheduler: Mailbox[SchedulerMessage],
        grammars: Mailbox[GrammarMessage],
        tokenizer: Tokenizer,
        limits: Limits,
    ) -> None:
        self._inbox = inbox
        self._cache = cache
        self._scheduler = scheduler
        self._grammars = grammars
        self._tokenizer = tokenizer
        self._limits = limits

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            async for message in self._inbox:
                tasks.create_task(self._submit(message))

    async def _submit(self, message: Submit) -> None:
        """Always answers: a sequence for the scheduler, or an error on the stream."""
        stream = message.stream
        if stream.is_cancelled:
            return
        try:
            sequence = await self._prepare(message.request, stream, message.wants_embedding)
        except JLoraxError as error:
            stream.fail(error)
            return
        except Exception as error:  # ours or a library's, but one request's: the others go on
            log.error("a request cannot be prepared: %s", type(error).__name__)  # no prompt's text
            stream.fail(JLoraxError(f"the request cannot be prepared: {type(error).__name__}"))
            return
        if stream.is_cancelled:
            return
        stream.put(Opened(sequence.prompt, sequence.seed, sequence.arrival_s))
        await self._scheduler.put(Admit(sequence))

    async def _prepare(
        self, request: GenerateRequest, stream: TokenStream, wants_embedding: bool
    ) -> Sequence:
        arrival_s = time.monotonic()
        version = await self._resolve(request)
        prompt = await self._tokens(request)
        max_new_tokens = 0 if wants_embedding else request.max_new_tokens
        max_new_tokens = self._fit(prompt, max_new_tokens)
        if max_new_tokens < 1 and not wants_embedding:
            raise InvalidParameter("max_new_tokens", f"is {max_new_tokens}; it must be at least 1")
        self._check_rules(request, max_new_tokens)
        start = await self._compiled(request)
        seed = request.sampling.seed
        eos = () if request.ignore_eos else self._tokenizer.eos_token_ids
        return Sequence(
            prompt=prompt,
            sampling=request.sampling,
            seed=secrets.randbits(63) if seed is None else seed,
            max_new_tokens=max_new_tokens,
            stop_token_ids=frozenset((*request.stop_token_ids, *eos)),
            version=version,
            tenant=request.tenant,
            num_alternatives=request.num_top_logprobs,
            logit_bias=request.logit_bias,
            min_new_tokens=request.min_new_tokens,
            matcher=None if start is None else start.matcher,
            mask=None if start is None else start.mask,
            wants_prompt_logprobs=request.prompt_logprobs,
            wants_embedding=wants_embedding,
            stream=stream,
            arrival_s=arrival_s,
        )

    async def _resolve(self, request: GenerateRequest) -> AdapterVersion | None:
        merge = merge_of(request)
        if merge is not None:
            return await self._derive(request, merge)
        if request.adapter_id is None:
            return None
        return await (await self._asked_for(request, request.adapter_id))

    async def _derive(self, request: GenerateRequest, merge: AdapterMerge) -> AdapterVersion:
        """All its parts are looked up at once, for those that remotes have to be asked for."""
        replies = [await self._asked_for(request, name) for name in merge.adapter_ids]
        versions = []
        for answer in await asyncio.gather(*replies, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer
            versions.append(answer)
        reply: asyncio.Future[AdapterVersion] = asyncio.get_running_loop().create_future()
        await self._cache.put(Derive(merge, tuple(versions), reply))
        return await reply

    async def _asked_for(
        self, request: GenerateRequest, adapter_id: str
    ) -> asyncio.Future[AdapterVersion]:
        reply: asyncio.Future[AdapterVersion] = asyncio.get_running_loop().create_future()
        await self._cache.put(Resolve(request.tenant, adapter_id, request.adapter_source, reply))
        return reply

    async def _tokens(self, request: GenerateRequest) -> tuple[int, ...]:
        if isinstance(request.prompt, tuple):
            ids = list(request.prompt)
            self._check_ids(ids)
        elif len(request.prompt) <= _INLINE_CHARACTERS:
            ids = self._tokenizer.encode(request.prompt, request.add_special_tokens)
        else:
            ids = await asyncio.to_thread(
                self._tokenizer.encode, request.prompt, request.add_special_tokens
            )
        if not ids:
            raise InvalidRequest("the prompt is empty")
        return tuple(ids if request.truncate is None else ids[-request.truncate :])

    def _check_rules(self, request: GenerateRequest, max_new_tokens: int) -> None:
        if request.min_new_tokens > max_new_tokens:
            raise InvalidParameter(
                "min_new_tokens",
                f"is {request.min_new_tokens}, but there is room for {max_new_tokens} new tokens",
            )
        biased = [token for token, _ in request.logit_bias]
        if len(biased) > MAX_LOGIT_BIASES or len(biased) > len(set(biased)):
            raise InvalidParameter(
                "logit_bias",
                f"has {len(biased)} entries for {len(set(biased))} tokens; allowed are "
                f"{MAX_LOGIT_BIASES}, each for another token",
            )
        self._check_ids(biased)

    async def _compiled(self, request: GenerateRequest) -> GrammarStart | None:
        if request.constraint is None:
            return None
        reply: asyncio.Future[GrammarStart] = asyncio.get_running_loop().create_future()
        await self._grammars.put(CompileGrammar(request.constraint, reply))
        return await reply

    def _check_ids(self, ids: list[int]) -> None:
        vocab_size = self._limits.vocab_size
        wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise InvalidRequest(f"token id {wrong} is outside the vocabulary of {vocab_size}")

    def _fit(self, prompt: tuple[int, ...], max_new_tokens: int | None) -> int:
        room = self._limits.max_seq_len - len(prompt)
        wanted = max(1, room) if max_new_tokens is None else max_new_tokens
        if wanted > room:
            raise PromptTooLong(len(prompt), wanted, self._limits.max_seq_len)
        return wanted
