"""llama.cpp, by its C interface from llama-cpp-python: f32 GGUF, adapters as GGUF.

One adapter holds for a whole batch there. So rows of different adapters run one group after the
other, as llama-server does it: it batches only slots whose adapters are equal.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found, unused-ignore]
import numpy as np

from benchmarks.contestants.protocol import Setup, serve


class LlamaCpp:
    def __init__(self, setup: Setup) -> None:
        assert setup.model_gguf is not None
        self._setup = setup
        self._silence = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama.llama_backend_init()
        model = llama.llama_model_load_from_file(
            setup.model_gguf.encode(), llama.llama_model_default_params()
        )
        self._model = _made(model, "the model")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._adapters = {
            name: _made(llama.llama_adapter_lora_init(self._model, path.encode()), name)
            for name, path in setup.adapter_ggufs.items()
        }
        self._contexts = {size: self._context(size) for size in {1, len(setup.prompts)}}

    def run(self, adapters: Sequence[str | None], num_out: int) -> list[list[int]]:
        rows = sorted(range(len(adapters)), key=lambda row: adapters[row] or "")
        tokens: list[list[int]] = [[] for _ in adapters]
        for adapter, group in itertools.groupby(rows, key=lambda row: adapters[row]):
            members = list(group)
            prompts = [self._setup.prompts[row] for row in members]
            for row, answer in zip(members, self._group(prompts, adapter, num_out), strict=True):
                tokens[row] = answer
        return tokens

    def notes(self) -> dict[str, str]:
        return {
            "build": llama.llama_print_system_info().decode(),
            "different adapters": "one after the other; a batch has one adapter in llama.cpp",
        }

    def _group(
        self, prompts: list[list[int]], adapter: str | None, num_out: int
    ) -> list[list[int]]:
        """One static batch under one adapter, greedy."""
        context = self._contexts[len(prompts)]
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        self._select(context, adapter)
        out: list[list[int]] = [[] for _ in prompts]
        fed, start = prompts, 0
        for _ in range(num_out):
            newest = self._decode(context, fed, start)
            start += len(fed[0])
            fed = [[token] for token in newest]
            for answer, token in zip(out, newest, strict=True):
                answer.append(token)
        return out

    def _decode(self, context: Any, fed: list[list[int]], start: int) -> list[int]:
        """Feeds every sequence its tokens from position ``start``; the best next token of each."""
        length = len(fed[0])
        batch = llama.llama_batch_init(len(fed) * length, 0, 1)
        batch.n_tokens = len(fed) * length
        for i, (sequence, place) in enumerate(itertools.product(range(len(fed)), range(length))):
            batch.token[i] = fed[sequence][place]
            batch.pos[i] = start + place
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = place == length - 1
        status = llama.llama_decode(context, batch)
        llama.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: status {status}")
        return [self._best(context, length * (i + 1) - 1) for i in range(len(fed))]

    def _best(self, context: Any, index: int) -> int:
        logits = llama.llama_get_logits_ith(context, index)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def _select(self, context: Any, adapter: str | None) -> None:
        chosen = [] if adapter is None else [self._adapters[adapter]]
        handles = (llama.llama_adapter_lora_p_ctypes * len(chosen))(*chosen)
        scales = (ctypes.c_float * len(chosen))(*(1.0 for _ in chosen))
        if llama.llama_set_adapters_lora(context, handles, len(chosen), scales) != 0:
            raise RuntimeError(f"llama.cpp refuses adapter {adapter}")

    def _context(self, batch: int) -> Any:
        """Room for ``batch`` sequences, and for all their prompts in one call."""
        longest = len(self._setup.prompts[0])
        params = llama.llama_context_default_params()
        params.n_seq_max = batch
        params.n_ctx = batch * -(-(longest + self._setup.num_out) // 256) * 256
        params.n_batch = params.n_ubatch = batch * longest
        params.n_threads = params.n_threads_batch = self._setup.num_threads
        return _made(llama.llama_init_from_model(self._model, params), "the context")


def _made(handle: Any, what: str) -> Any:
    if not handle:
        raise RuntimeError(f"llama.cpp cannot load {what}")
    return handle


if __name__ == "__main__":
    serve(LlamaCpp)
