from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jlorax.models import gguf
from jlorax.structured.grammar import GrammarCompiler
from jlorax.tokenizer import Tokenizer
from tests.models.gguf_files import spm_metadata, tiny_gguf


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> Tokenizer:
    """A byte-level vocabulary of 49152 tokens."""
    return Tokenizer.load(smollm2_dir)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """From a GGUF: bytes as tokens of their own, spaces as U+2581."""
    folder = tmp_path_factory.mktemp("spm")
    return Tokenizer.load(gguf.prepare(tiny_gguf(folder / "m.gguf", spm_metadata()), folder / "hf"))


@pytest.fixture(scope="session")
def compiler(smollm2: Tokenizer) -> Iterator[GrammarCompiler]:
    """Its logits are wider than its tokenizer, as padded models' are."""
    compiler = GrammarCompiler(smollm2, smollm2.vocab_size + 40)
    yield compiler
    compiler.close()
