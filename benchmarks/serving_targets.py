"""Who is measured: the engine in this process, or a server that speaks OpenAI's completions."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import aiohttp

from jlorax.engine import Engine
from jlorax.errors import JLoraxError
from jlorax.types import GenerateRequest

_EVENT = b"data:"
_DONE = "[DONE]"
_METRICS_DEADLINE_S = 10.0


class AskFailed(Exception):
    """A request got an error instead of an answer. ``code``: a word that errors are counted by."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Target(Protocol):
    """``tokens`` yields once a token and raises AskFailed; ``rss_bytes`` None: not known."""

    vocab_size: int
    max_seq_len: int

    def tokens(
        self, adapter: str, tenant: str, prompt: tuple[int, ...], num_out: int
    ) -> AsyncIterator[None]: ...

    async def prefetch(self, adapter: str) -> None:
        """Returns when its weights are in RAM. Raises AskFailed."""

    async def metrics(self) -> str: ...

    async def rss_bytes(self) -> float | None: ...


class EngineTarget:
    """Greedy, end of text ignored, no detokenizing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.vocab_size = engine.model_info.vocab_size
        self.max_seq_len = engine.model_info.max_seq_len

    async def tokens(
        self, adapter: str, tenant: str, prompt: tuple[int, ...], num_out: int
    ) -> AsyncIterator[None]:
        request = GenerateRequest(
            prompt=prompt,
            adapter_id=adapter,
            tenant=tenant,
            max_new_tokens=num_out,
            ignore_eos=True,
            detokenize=False,
        )
        try:
            async for _ in self._engine.generate(request):
                yield
        except JLoraxError as error:
            raise AskFailed(error.code) from error

    async def prefetch(self, adapter: str) -> None:
        try:
            await self._engine.prefetch_adapter(adapter)
        except JLoraxError as error:
            raise AskFailed(error.code) from error

    async def metrics(self) -> str:
        return self._engine.metrics().decode()

    async def rss_bytes(self) -> float | None:
        return own_rss_bytes()


def own_rss_bytes() -> float | None:
    """Of this process; None where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


class UrlTarget:
    """``POST /v1/completions`` with token ids, streamed. Everybody is one tenant there.

    A server's event counts as one token: one that puts several into an event shows a longer ITL.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        vocab_size: int,
        max_seq_len: int,
    ) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len

    async def tokens(
        self, adapter: str, tenant: str, prompt: tuple[int, ...], num_out: int
    ) -> AsyncIterator[None]:
        body = {
            "model": adapter,
            "prompt": prompt,
            "max_tokens": num_out,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        num_tokens = 0
        try:
            async with self._session.post(self._url + "/v1/completions", json=body) as response:
                if response.status != 200:
                    raise AskFailed(f"http {response.status}")
                async for line in response.content:
                    if not _is_token(line) or num_tokens == num_out:
                        continue  # some end with one more event, which says why
                    num_tokens += 1
                    yield
        except (aiohttp.ClientError, TimeoutError) as error:
            raise AskFailed(type(error).__name__) from error

    async def prefetch(self, adapter: str) -> None:
        """By our own route: no other server has one."""
        try:
            path = f"/v1/adapters/{quote(adapter, safe='')}/prefetch"
            async with self._session.post(self._url + path) as response:
                if response.status != 200:
                    raise AskFailed(f"http {response.status}")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise AskFailed(type(error).__name__) from error

    async def metrics(self) -> str:
        """ "" where the server has none."""
        timeout = aiohttp.ClientTimeout(total=_METRICS_DEADLINE_S)
        try:
            async with self._session.get(self._url + "/metrics", timeout=timeout) as response:
                return await response.text() if response.status == 200 else ""
        except (aiohttp.ClientError, TimeoutError):
            return ""

    async def rss_bytes(self) -> float | None:
        """As Prometheus' own client reports it."""
        name = "process_resident_memory_bytes "
        lines = (await self.metrics()).splitlines()
        return next((float(line.split()[1]) for line in lines if line.startswith(name)), None)


def _is_token(line: bytes) -> bool:
    """Whether a line of the stream is an event with a choice. Raises AskFailed for an error."""
    text = line.removeprefix(_EVENT).strip().decode()
    if not line.startswith(_EVENT) or text == _DONE:
        return False
    event: Mapping[str, Any] = json.loads(text)
    if "error" in event:
        raise AskFailed("error in the stream")
    return bool(event.get("choices"))
