"""The bounded matcher says what re says, and never takes long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlorax.adapters.patterns import PatternRefused, matches_suffix, matches_whole

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "transformer.h.3.self_attention.query_key_value",
    "lm_head",
]
PATTERNS = [
    r".*\.(q|v)_proj",
    "proj",
    "q_proj",
    "self_attn.q_proj",
    r".*",
    r"model\.layers\.\d+\.self_attn\.q_proj",
    r"model\.layers\.[0-5]\..*",
    r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\blm_head\b)",
    r"^model\.layers\.(?!0\.).*_proj$",
    r".*(?<=q_)proj",
    r".*(?<!q_)proj",
    r"[^.]+\.layers\.\d{1,2}\.\w+\.[a-z_]{4,9}",
    r"lm_head|transformer\..*",
    r"(.*\.)?q_proj",
    r"\S+\D+\W?.+",
    r"(a?){3,}lm_head",
    r"(?:model|transformer)(?:\.\w+)+",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODULES)
def test_as_re(pattern: str, name: str) -> None:
    assert matches_whole(pattern, name) == bool(re.fullmatch(pattern, name))
    assert matches_suffix(pattern, name) == bool(re.match(rf"(.*\.)?({pattern})$", name))


atoms = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$", r"\b"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(%s|%s)".__mod__),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map("(?={})".format),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(expressions, st.text("ab.", max_size=7))
def test_as_re_on_random_patterns(pattern: str, name: str) -> None:
    try:
        found = matches_whole(pattern, name)
    except PatternRefused:
        return  # nested too deep
    assert found == bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "(a|ab?)+c", "a*" * 40 + "b", "(a*){9,}b"]
)
def test_no_pattern_takes_long(pattern: str) -> None:
    start = time.perf_counter()
    assert not matches_whole(pattern, "a" * 60 + "!")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "pattern",
    ["(", "[", "*", r"(a)\1", "(?i)a", "(?i:a)", "(?>a)", "a++", "(((a*)*)*)*", "a" * 20_000],
)
def test_refused(pattern: str) -> None:
    with pytest.raises(PatternRefused):
        matches_whole(pattern, "a")
