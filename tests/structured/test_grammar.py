"""Masks, ends and dead ends; what is kept; several threads."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from jlorax.errors import InvalidParameter, InvalidRequest, Unavailable
from jlorax.structured import grammar as grammar_module
from jlorax.structured.grammar import Grammar, GrammarCompiler, Matcher
from jlorax.structured.sources import grammar_of
from jlorax.structured.trial import Trials, Verdict
from jlorax.structured.vocabulary import Vocabulary
from jlorax.tokenizer import Tokenizer
from jlorax.types import Constraint
from tests.golden.test_golden import DATA, FAMILIES
from tests.structured.walks import allowed, choice, lark, regex, schema, spelled, text_of, walk

EOS, A, B, AB, SPECIAL, NONE, C, END = range(8)
TOKENS = (b"\xff<eos>", b"a", b"b", b"ab", b"\xff<x>", b"", b"c", b"\xff<end>")
WIDTH = 40


def matcher_of(
    constraint: Constraint,
    tokens: Sequence[bytes] = TOKENS,
    eos: Sequence[int] = (EOS, END),
    width: int = WIDTH,
) -> Matcher:
    return Grammar(Vocabulary(tokens, eos, width), grammar_of(constraint), 0).matcher()


def may(matcher: Matcher) -> list[int]:
    return [int(i) for i in allowed(matcher.mask())]


# --- masks


def test_a_mask_holds_what_may_follow_and_every_end_where_it_may_stop() -> None:
    matcher = matcher_of(choice('["a", "abc"]'))
    assert may(matcher) == [A, AB]
    matcher.accept(A)
    assert may(matcher) == [EOS, B, END]
    matcher.accept(B)
    assert may(matcher) == [C]
    assert not matcher.is_finished
    matcher.accept(C)
    assert matcher.is_finished and not matcher.is_dead
    matcher.mask()[:] = 0  # the caller's own, here too
    assert may(matcher) == [EOS, END]


@pytest.mark.parametrize("end", [EOS, END])
def test_any_end_ends_an_answer_that_might_go_on(end: int) -> None:
    matcher = matcher_of(regex("a*"))
    matcher.accept(A)
    assert not matcher.is_finished
    matcher.accept(end)
    assert matcher.is_finished and not matcher.is_dead


def test_a_mask_has_the_width_of_the_logits_and_is_the_callers_own() -> None:
    matcher = matcher_of(regex("[abc]*"), width=65)
    mask = matcher.mask()
    assert (mask.shape, mask.dtype) == ((3,), np.int32)
    mask[:] = 0
    assert may(matcher) == [EOS, A, B, AB, C, END]


def test_logits_narrower_than_the_tokenizer_allow_no_token_beyond_them() -> None:
    matcher = matcher_of(regex("[abc]*"), width=C)
    assert may(matcher) == [EOS, A, B, AB]


def test_tokens_without_text_and_beyond_the_tokenizer_are_never_allowed() -> None:
    matcher = matcher_of(lark("start: <[*]>"))
    assert may(matcher) == [A, B, AB, SPECIAL, C]  # a grammar may name the special one


def test_a_special_token_is_no_text() -> None:
    matcher = matcher_of(regex("(<x>|c)"), (*TOKENS, b"<", b"<x>"))
    assert may(matcher) == [C, 8, 9]


def test_without_an_end_token_an_answer_ends_by_itself() -> None:
    matcher = matcher_of(regex("a|ad"), eos=())
    assert may(matcher) == [A]
    matcher.accept(A)
    assert not matcher.is_finished
    assert may(matcher) == []  # no token has a "d"
    assert matcher.is_finished and not matcher.is_dead


# --- dead ends


@pytest.mark.parametrize(
    ("pattern", "width", "reason"),
    [("ad", WIDTH, "no token may follow"), ("ac", C, "beyond the model's vocabulary")],
)
def test_a_dead_end_is_told_from_an_end(pattern: str, width: int, reason: str) -> None:
    matcher = matcher_of(regex(pattern), width=width)
    matcher.accept(A)
    assert not matcher.is_dead
    assert may(matcher) == []
    assert matcher.is_dead and not matcher.is_finished
    assert matcher.dead_end is not None and reason in matcher.dead_end


def test_a_token_that_no_mask_allowed_is_a_dead_end() -> None:
    matcher = matcher_of(regex("a"))
    matcher.accept(B)
    assert matcher.is_dead and not matcher.is_finished
    assert matcher.dead_end is not None and "\n" not in matcher.dead_end


def test_a_token_that_takes_too_long_is_a_dead_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_STEP_S", 0.0)
    matcher = matcher_of(regex("a"))
    matcher.mask()
    assert matcher.is_dead
    assert matcher.dead_end is not None and "took" in matcher.dead_end


def test_a_mask_that_took_long_makes_its_matcher_a_slow_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matcher = matcher_of(regex("a"))
    assert not matcher.is_slow
    monkeypatch.setattr(grammar_module, "SLOW_STEP_S", 0.0)
    matcher.mask()
    assert matcher.is_slow


# --- what the kinds mean


def test_any_json_is_an_object_or_an_array(compiler: GrammarCompiler, smollm2: Tokenizer) -> None:
    grammar = compiler.compile(schema("{}"))
    for text in ('{"a": {"b": [1]}}', "[]", '[1,"x"]'):
        assert spelled(smollm2, grammar, text) == (True, True), text
    for text in ("1", '"x"', "null"):
        assert not spelled(smollm2, grammar, text)[0], text


def test_json_has_at_most_one_space_and_only_after_a_separator(
    compiler: GrammarCompiler, smollm2: Tokenizer
) -> None:
    grammar = compiler.compile(schema('{"type": "object"}'))
    for text in ('{"a": 1, "b": [1, 2]}', '{"a":1,"b":[1,2]}', '{"a": 1,"b":[1, 2]}'):
        assert spelled(smollm2, grammar, text) == (True, True), text
    for text in ('{"a":  1}', '{ "a": 1}', '{"a" : 1}', '{"a": 1\n}', ' {"a": 1}', '{"a":\n1}'):
        assert not spelled(smollm2, grammar, text)[0], text


@pytest.mark.parametrize("option", ['"', "\\", "\n", "\x04", "/", "Grüße", "日本 😀", " a "])
def test_a_choice_is_spelled_as_it_is(
    compiler: GrammarCompiler, smollm2: Tokenizer, option: str
) -> None:
    grammar = compiler.compile(choice(json.dumps([option, "other"])))
    token_ids = walk(grammar, smollm2, random.Random(1))
    assert text_of(smollm2, token_ids) in (option, "other")
    if option != "\x04":  # SmolLM2 has no token for that byte
        assert spelled(smollm2, grammar, option) == (True, True)
    assert not spelled(smollm2, grammar, "others")[0]


def test_a_regex_is_of_the_whole_answer(compiler: GrammarCompiler, smollm2: Tokenizer) -> None:
    grammar = compiler.compile(regex("^a/b+$"))
    assert spelled(smollm2, grammar, "a/") == (True, False)
    assert spelled(smollm2, grammar, "a/bb") == (True, True)
    assert not spelled(smollm2, grammar, "xa/b")[0]
    assert not spelled(smollm2, grammar, "a/bx")[0]


def test_digits_of_a_regex_are_those_that_clients_read(
    compiler: GrammarCompiler, smollm2: Tokenizer
) -> None:
    grammar = compiler.compile(regex(r"\d+"))
    assert spelled(smollm2, grammar, "42") == (True, True)
    assert not spelled(smollm2, grammar, "४")[0]


def test_a_grammar_is_lark_with_json_in_it(compiler: GrammarCompiler, smollm2: Tokenizer) -> None:
    source = 'start: "answer: " json\njson: %json {"type": "boolean"}'
    grammar = compiler.compile(lark(source))
    assert spelled(smollm2, grammar, "answer: true") == (True, True)
    assert not spelled(smollm2, grammar, "answer: 1")[0]


def test_every_model_without_text_refuses_constraints() -> None:
    tokenizers = [Tokenizer.numbered(300)]
    tokenizers += [Tokenizer.load(DATA / family / "model") for family in FAMILIES]
    for tokenizer in tokenizers:
        with pytest.raises(InvalidRequest, match="cannot be constrained"):
            GrammarCompiler(tokenizer, 300).compile(regex("a"))


# --- what is kept


def test_a_constraint_is_compiled_once(compiler: GrammarCompiler) -> None:
    first = compiler.compile(regex("abc{1,7}"))
    assert compiler.compile(regex("abc{1,7}")) is first
    assert compiler.compile(choice('["abc{1,7}"]')) is not first


def test_the_least_used_go_when_there_are_many(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_KEPT_GRAMMARS", 2)
    one, two = compiler.compile(regex("one")), compiler.compile(regex("two"))
    assert compiler.compile(regex("one")) is one
    compiler.compile(regex("three"))
    assert compiler.compile(regex("one")) is one
    assert compiler.compile(regex("two")) is not two


def test_the_least_used_go_when_they_are_large(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = compiler.compile(regex("small"))
    many = {"type": "array", "prefixItems": [{}] * 999}
    large = compiler.compile(schema(json.dumps(many)))
    assert large.num_bytes > small.num_bytes > 0
    monkeypatch.setattr(grammar_module, "MAX_KEPT_BYTES", small.num_bytes * 3 // 2)
    kept = compiler.compile(regex("other"))
    assert compiler.compile(regex("other")) is kept
    assert compiler.compile(regex("small")) is not small


def test_a_worn_grammar_is_compiled_anew(compiler: GrammarCompiler, smollm2: Tokenizer) -> None:
    worn = compiler.compile(regex("worn"))
    worn.matcher().accept(smollm2.encode("x")[0])
    fresh = compiler.compile(regex("worn"))
    assert fresh is not worn
    assert spelled(smollm2, fresh, "worn") == (True, True)


def test_a_refused_constraint_is_refused_again_and_spoils_no_other(
    compiler: GrammarCompiler, smollm2: Tokenizer
) -> None:
    good, bad = schema('{"type": "boolean"}'), schema('{"type": "bogus"}')
    for _ in range(2):
        assert spelled(smollm2, compiler.compile(good), "true") == (True, True)
        with pytest.raises(InvalidParameter, match="`json_schema` cannot be used: Invalid type: b"):
            compiler.compile(bad)


def test_what_was_not_the_constraints_fault_is_not_kept(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(self: Trials, grammar: str) -> Verdict:
        raise Unavailable("ended")

    with monkeypatch.context() as broken, pytest.raises(Unavailable):
        broken.setattr(Trials, "verdict", end)
        compiler.compile(regex("unlucky"))
    assert compiler.compile(regex("unlucky")) is compiler.compile(regex("unlucky"))


# --- threads


def test_threads_that_ask_at_once_share_one_compilation(compiler: GrammarCompiler) -> None:
    barrier = Barrier(8)

    def ask(constraint: Constraint) -> Grammar | str:
        barrier.wait()
        try:
            return compiler.compile(constraint)
        except InvalidParameter as error:
            return str(error)

    with ThreadPoolExecutor(8) as threads:
        same = list(threads.map(ask, [regex("(at|once)+")] * 8))
        refused = list(threads.map(ask, [regex("(at once")] * 8))
    assert len(set(map(id, same))) == 1 and isinstance(same[0], Grammar)
    assert set(refused) == {"`regex` cannot be used: regex parse error: unclosed group"}


def test_matchers_of_one_grammar_walk_in_several_threads(
    compiler: GrammarCompiler, smollm2: Tokenizer
) -> None:
    constraint = schema('{"type": "object", "additionalProperties": {"type": "integer"}}')

    def answer(seed: int) -> list[int]:
        return walk(compiler.compile(constraint), smollm2, random.Random(seed))

    alone = [answer(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, range(8))) == alone


def test_closing_is_no_end(sentencepiece: Tokenizer) -> None:
    compiler = GrammarCompiler(sentencepiece, sentencepiece.vocab_size)
    compiler.close()
    for pattern in ("a", "b"):
        compiler.compile(regex(pattern))
        compiler.close()
