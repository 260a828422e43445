"""Whatever a grammar allows is what its constraint says, and an end is allowed where it may be."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Sequence

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from jlorax.structured.grammar import GrammarCompiler
from jlorax.structured.vocabulary import Words
from jlorax.tokenizer import Tokenizer
from tests.structured.random_regexes import random_regex
from tests.structured.random_schemas import random_schema
from tests.structured.walks import allows, answer, regex, schema, text_of, walk

NUM_SCHEMAS = 200
NUM_SCHEMAS_BY_DEFAULT = 20
NUM_REGEXES = 50
BROKEN = "\ufffd"


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=[] if seed < NUM_SCHEMAS_BY_DEFAULT else [pytest.mark.slow])
        for seed in range(NUM_SCHEMAS)
    ],
)
def test_a_random_answer_is_valid_json_of_its_schema(
    compiler: GrammarCompiler, smollm2: Tokenizer, seed: int
) -> None:
    chosen = random_schema(random.Random(seed))
    Draft202012Validator.check_schema(chosen)
    validator = Draft202012Validator(chosen, format_checker=FormatChecker())
    for attempt in range(3):
        text = answer(compiler, smollm2, schema(json.dumps(chosen)), 10 * seed + attempt)
        validator.validate(json.loads(text))


@pytest.mark.parametrize("seed", range(NUM_REGEXES))
def test_a_random_answer_matches_its_regex_wherever_it_may_end(
    compiler: GrammarCompiler, smollm2: Tokenizer, seed: int
) -> None:
    pattern = random_regex(random.Random(seed))
    (end,) = smollm2.eos_token_ids

    def watch(ids: Sequence[int], mask: Words) -> None:
        text = smollm2.decode(ids)
        if text.endswith(BROKEN):
            assert not allows(mask, end), (pattern, text)
        elif is_known(text):
            assert allows(mask, end) == matches(pattern, text), (pattern, text)

    grammar = compiler.compile(regex(pattern))
    for attempt in range(2):
        ids = walk(grammar, smollm2, random.Random(10 * seed + attempt), watch, eagerness=0.1)
        text = text_of(smollm2, ids)
        assert matches(pattern, text) or not is_known(text), (pattern, text)


@pytest.mark.parametrize(
    "pattern", [r"[a-h ]{3,9}", r"(hello|world )+", r"[a-zé日]{1,4} \d+é", "日本?"]
)
def test_a_sentencepiece_vocabulary_spells_bytes_and_spaces(
    sentencepiece: Tokenizer, pattern: str
) -> None:
    compiler = GrammarCompiler(sentencepiece, sentencepiece.vocab_size)
    try:
        for attempt in range(5):
            text = answer(compiler, sentencepiece, regex(pattern), attempt)
            assert matches(pattern, text) or not is_known(text), (pattern, text)
    finally:
        compiler.close()


def matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None


def is_known(text: str) -> bool:
    """To this Python, whose Unicode is older than llguidance's."""
    return all(unicodedata.category(character) != "Cn" for character in text)
