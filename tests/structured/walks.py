"""Random answers under a grammar: what a model without any sense would write."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from jlorax.structured.grammar import Grammar, GrammarCompiler
from jlorax.structured.vocabulary import Words
from jlorax.tokenizer import IncrementalDetokenizer, Tokenizer
from jlorax.types import Constraint, ConstraintKind

MAX_TOKENS = 2000
_CLOSERS = ('"', "}", "]", ",", ":", "n", "0")  # first to last, what ends JSON soonest

Watch = Callable[[Sequence[int], Words], None]
"""Is told the ids so far and what may follow."""


def allowed(mask: Words) -> np.ndarray:
    """i64[num_allowed]: the ids, in order."""
    bits = np.unpackbits(mask.astype("<i4").view(np.uint8), bitorder="little")
    return np.flatnonzero(bits)


def allows(mask: Words, token_id: int) -> bool:
    return bool(mask[token_id // 32] >> (token_id % 32) & 1)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """As the engine streams it after a prompt."""
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("a"))
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()


def walk(
    grammar: Grammar,
    tokenizer: Tokenizer,
    chance: random.Random,
    watch: Watch = lambda ids, mask: None,
    eagerness: float = 0.3,
    prefix: Sequence[int] = (),
) -> list[int]:
    """The ids of a whole answer, its end not among them; it ends the sooner the longer it is.

    ``prefix``: ids that it begins with, not among them either. ``eagerness``: how probable a
    token is that ends something, where there is one.
    """
    matcher = grammar.matcher()
    closers = [tokenizer.encode(c, add_special_tokens=False)[-1] for c in _CLOSERS]
    for token_id in prefix:
        assert allows(matcher.mask(), token_id)
        matcher.accept(token_id)
    ids: list[int] = []
    while not matcher.is_finished:
        mask = matcher.mask()
        assert not matcher.is_dead, matcher.dead_end
        watch(ids, mask)
        may = allowed(mask)
        endings = [i for i in (*tokenizer.eos_token_ids, *closers) if allows(mask, i)]
        if endings and chance.random() < eagerness + len(ids) / 300:
            drawn = endings[0]
        else:
            drawn = int(may[chance.randrange(len(may))])
        matcher.accept(drawn)
        assert not matcher.is_dead, matcher.dead_end
        if drawn in tokenizer.eos_token_ids:
            assert matcher.is_finished
            break
        ids.append(drawn)
        if len(ids) > MAX_TOKENS:
            pytest.fail(f"no end after {MAX_TOKENS} tokens: {text_of(tokenizer, ids)[:200]!r}")
    return ids


def answer(compiler: GrammarCompiler, tokenizer: Tokenizer, constraint: Constraint, n: int) -> str:
    """The text of random answer ``n``."""
    grammar = compiler.compile(constraint)
    return text_of(tokenizer, walk(grammar, tokenizer, random.Random(n)))


def schema(source: str) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, source)


def regex(source: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, source)


def choice(source: str) -> Constraint:
    return Constraint(ConstraintKind.CHOICE, source)


def lark(source: str) -> Constraint:
    return Constraint(ConstraintKind.GRAMMAR, source)


def spelled(tokenizer: Tokenizer, grammar: Grammar, text: str) -> tuple[bool, bool]:
    """Whether the grammar takes the text, and whether an answer may end after it."""
    matcher = grammar.matcher()
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        if matcher.is_finished or not allows(matcher.mask(), token_id):
            return False, False
        matcher.accept(token_id)
    if matcher.is_finished:
        return True, True
    return True, allows(matcher.mask(), tokenizer.eos_token_ids[0])
