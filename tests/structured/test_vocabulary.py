"""The bytes of a token are what it adds to an answer's text."""

from __future__ import annotations

from copy import copy

import pytest

from jlorax.models import gguf
from jlorax.structured.vocabulary import Vocabulary
from jlorax.tokenizer import Tokenizer
from tests.models.gguf_files import bpe_metadata, tiny_gguf
from tests.structured.walks import text_of


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """From a GGUF, with added tokens: a special one, and two that are text, one with a space."""
    folder = tmp_path_factory.mktemp("bpe")
    metadata = bpe_metadata()
    metadata["tokenizer.ggml.tokens"] += ["[CALL]", "<think>", "two words"]
    metadata["tokenizer.ggml.token_type"] += [3, 4, 4]
    return Tokenizer.load(gguf.prepare(tiny_gguf(folder / "m.gguf", metadata), folder / "hf"))


@pytest.mark.parametrize("kind", ["smollm2", "sentencepiece", "byte_level"])
def test_every_token_adds_its_bytes(request: pytest.FixtureRequest, kind: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size)
    assert vocabulary is not None and len(vocabulary.tokens) == tokenizer.vocab_size
    ids = {*range(300), *range(300, tokenizer.vocab_size, max(1, tokenizer.vocab_size // 2000))}
    num_checked = 0
    for token_id in sorted(i for i in ids if i < tokenizer.vocab_size):
        token = vocabulary.tokens[token_id]
        if tokenizer.is_special(token_id):
            assert token.startswith(b"\xff")
        elif is_text(token):
            assert text_of(tokenizer, [token_id]) == token.decode(), token_id
            num_checked += 1
    assert num_checked > tokenizer.vocab_size / 50


def is_text(token: bytes) -> bool:
    """Some hold a part of a character."""
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


def test_every_end_is_one_even_where_the_tokenizer_calls_it_text(
    smollm2: Tokenizer,
) -> None:
    (own,) = smollm2.eos_token_ids
    word = smollm2.encode("hello")[0]
    several = copy(smollm2)
    several.eos_token_ids = (own, word, 60_000)
    vocabulary = Vocabulary.of(several, 50_000)
    assert vocabulary is not None
    assert vocabulary.eos_token_ids == (own, word)  # there are no logits for the third
    assert vocabulary.tokens[word].startswith(b"\xff")
