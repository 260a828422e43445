"""The bytes that each token adds to an answer, as a trie that automata walk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from jlorax.structured.automaton import trie_of
from jlorax.tokenizer import Tokenizer

Words = NDArray[np.int32]
"""i32[ceil(vocab_size / 32)]: bit i of word i // 32 stands for token i."""

_WITHOUT_TEXT = b"\xff"  # llguidance's mark: no text matches it, a grammar may name the token
_SPACE = "\u2581"  # SentencePiece's


class Vocabulary:
    """``tokens[i]``: the bytes of token i, empty where there is none; ``width``: of the logits."""

    def __init__(self, tokens: Sequence[bytes], eos_token_ids: Sequence[int], width: int) -> None:
        self.tokens = list(tokens)
        self.eos_token_ids = tuple(i for i in eos_token_ids if i < min(width, len(tokens)))
        self._width = width
        self.trie: llguidance.LLTokenizer = trie_of(self.tokens, self.eos_token_ids)
        self.eos = self._words(self.eos_token_ids)
        known = [i for i, token in enumerate(self.tokens[:width]) if token]
        self._known = self._words(known) & ~self.eos

    @classmethod
    def of(cls, tokenizer: Tokenizer, width: int) -> Vocabulary | None:
        """None when its tokens are not pieces of a text (numbers, or words parted by spaces)."""
        backend = tokenizer.backend
        reading = _reading(json.loads(backend.to_str())["decoder"])
        if reading is None:
            return None
        names = {i: name for name, i in backend.get_vocab(with_added_tokens=True).items()}
        ends = frozenset(tokenizer.eos_token_ids)

        def token(i: int) -> bytes:
            name = names.get(i, "")
            if i in ends or tokenizer.is_special(i):
                return _WITHOUT_TEXT + (name or f"<eos {i}>").encode()
            return reading(name)

        tokens = [token(i) for i in range(1 + max(*names, *ends))]
        return cls(tokens, tokenizer.eos_token_ids, width)

    def mask_of(self, automaton: llguidance.LLMatcher) -> Words:
        """What may follow, an end where it accepts; zeros when it is in error."""
        words = np.empty(-(-self.trie.vocab_size // 32), np.int32)
        automaton.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if automaton.is_error():
            return np.zeros_like(self._known)
        mask = self._known.copy()
        num_words = min(len(mask), len(words))
        mask[:num_words] &= words[:num_words]
        return mask | self.eos if automaton.is_accepting() else mask

    def _words(self, ids: Sequence[int]) -> Words:
        bits = np.zeros(32 * -(-self._width // 32), np.bool_)
        bits[list(ids)] = True
        return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def _reading(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes] | None:
    """How the decoder turns a token's name into bytes."""
    kinds = {step["type"] for step in _steps(decoder)}
    if "ByteLevel" in kinds:
        return _byte_level
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return _sentencepiece
    return None


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _byte_level(name: str) -> bytes:
    if not all(c in _BYTE_OF_CHARACTER for c in name):  # an added token, with a space perhaps
        return name.encode()
    return bytes(_BYTE_OF_CHARACTER[c] for c in name)


def _sentencepiece(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes.fromhex(name[3:5])
    return name.replace(_SPACE, " ").encode()


def _gpt2_bytes() -> dict[str, int]:
    """Printable bytes are their own characters; the others follow each other from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    own = {chr(byte): byte for byte in printable}
    return own | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _gpt2_bytes()
