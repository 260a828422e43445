"""llguidance's automata, with the bounds that we set: of memory, and of the time of a step."""

from __future__ import annotations

from collections.abc import Sequence

import llguidance

_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,  # some 15 ms
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=50_000,  # some 50 MB
    max_grammar_size=500_000,
    verbose_errors=False,
)


def trie_of(tokens: Sequence[bytes], eos_token_ids: Sequence[int]) -> llguidance.LLTokenizer:
    """Of ``tokens[i]``, the bytes of token i. Without an end, it has one of its own behind them."""
    return llguidance.LLTokenizer(
        _Tokens(tokens, eos_token_ids[0] if eos_token_ids else None),
        eos_token=list(eos_token_ids) or None,
    )


def automaton_of(trie: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """Never raises: ``is_error`` and ``get_error`` say what is wrong with the grammar."""
    return llguidance.LLMatcher(trie, grammar, log_level=0, limits=_LIMITS)


class _Tokens(llguidance.TokenizerWrapper):
    """What LLTokenizer reads. It never asks for a text's tokens: no grammar of ours forces them."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: Sequence[bytes], eos_token_id: int | None) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_token_id  # type: ignore[assignment]
        self.bos_token_id = None
        self.special_token_ids = ()
