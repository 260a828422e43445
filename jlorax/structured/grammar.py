"""A constraint becomes a grammar, and a grammar says after every token which may follow."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future

import llguidance

from jlorax.errors import InvalidParameter, InvalidRequest
from jlorax.structured.automaton import automaton_of
from jlorax.structured.refusals import in_words, plain
from jlorax.structured.sources import grammar_of
from jlorax.structured.trial import Trials
from jlorax.structured.vocabulary import Vocabulary, Words
from jlorax.tokenizer import Tokenizer
from jlorax.types import Constraint

MAX_KEPT_GRAMMARS = 256
MAX_KEPT_BYTES = 512 << 20
MAX_STEP_S = 0.25  # of processor time
SLOW_STEP_S = 0.002  # likewise; masks take a fortieth of it, hard ones a quarter


class GrammarCompiler:
    """Compiles constraints for one tokenizer, for several threads at once; keeps the latest.

    ``vocab_size`` is the width of the model's logits, which may exceed the tokenizer's. Nothing is
    built before the first constraint comes. ``close`` ends the processes that try grammars.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._bench: tuple[Vocabulary, Trials] | None = None
        self._bench_lock = threading.Lock()
        self._kept = _Kept()

    def compile(self, constraint: Constraint) -> Grammar:
        """Takes milliseconds, and never more than 2 s of work; for a worker's thread.

        Raises InvalidParameter, named as the constraint's kind, when the source is malformed, too
        large, too complex, or admits no answer; InvalidRequest when the model has no text.
        """
        grammar, is_mine = self._kept.get_or_reserve(constraint)
        if is_mine:
            try:
                grammar.set_result(self._compiled(constraint))
            except BaseException as error:
                grammar.set_exception(error)
            self._kept.settle(constraint, grammar)
        return grammar.result()

    def close(self) -> None:
        with self._bench_lock:
            if self._bench is not None:
                self._bench[1].close()

    def _compiled(self, constraint: Constraint) -> Grammar:
        vocabulary, trials = self._workbench()
        text = grammar_of(constraint)
        verdict = trials.verdict(text)
        if verdict.refusal is not None:
            raise InvalidParameter(constraint.kind.value, in_words(constraint, verdict.refusal))
        return Grammar(vocabulary, text, verdict.num_bytes)

    def _workbench(self) -> tuple[Vocabulary, Trials]:
        with self._bench_lock:
            if self._bench is None:
                vocabulary = Vocabulary.of(self._tokenizer, self._vocab_size)
                if vocabulary is None:
                    raise InvalidRequest(
                        "this model's tokens are not pieces of a text, "
                        "so that its answers cannot be constrained"
                    )
                self._bench = vocabulary, Trials(vocabulary.tokens, vocabulary.eos_token_ids)
            return self._bench


class Grammar:
    """A compiled constraint. Its matchers share one automaton, and so what it has learned.

    They take turns at it: masks of one grammar in several threads wait for each other.
    ``is_worn``: the automaton reached a limit and is of no use to further sequences.
    ``num_bytes``: of memory, when it was new.
    """

    def __init__(self, vocabulary: Vocabulary, text: str, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.is_worn = False
        self._vocabulary = vocabulary
        self._automaton = automaton_of(vocabulary.trie, text)

    def matcher(self) -> Matcher:
        """For one sequence, at the beginning of its answer."""
        return Matcher(self, self._vocabulary, self._automaton.deep_copy())


class Matcher:
    """Where one sequence is in its grammar; used by one thread at a time.

        while not matcher.is_finished:
            mask = matcher.mask()
            if matcher.is_dead: ...               # an error, that answer's own
            matcher.accept(a token that mask allows)

    An answer ends when its grammar is complete, whatever ``ignore_eos`` says, for nothing may
    follow. Where it may end or go on, a token that ends it is the model's choice.
    """

    def __init__(
        self, grammar: Grammar, vocabulary: Vocabulary, automaton: llguidance.LLMatcher
    ) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._automaton = automaton
        self._is_finished = False
        self._step_s = 0.0  # that the last mask took
        self.dead_end: str | None = None  # why no token may follow

    @property
    def is_finished(self) -> bool:
        """Nothing may follow but the end: the grammar is complete, or an end was accepted."""
        return self._is_finished

    @property
    def is_dead(self) -> bool:
        """No token may follow, and the grammar is not complete; known after ``mask``."""
        return self.dead_end is not None

    @property
    def is_slow(self) -> bool:
        """Its last mask took so long that others had better not stand behind it."""
        return self._step_s > SLOW_STEP_S

    def mask(self) -> Words:
        """Which token may follow: i32[ceil(vocab_size / 32)], the caller's own.

        Bit i of word i // 32 is set when token i may. Tokens beyond the tokenizer's never may;
        those that end an answer may exactly when the grammar may stop here.
        """
        if self._is_finished:
            return self._vocabulary.eos.copy()
        begin_s = time.thread_time()
        mask = self._vocabulary.mask_of(self._automaton)
        self._step_s = time.thread_time() - begin_s
        if self._automaton.is_error():
            self._die(self._automaton.get_error())
        elif self._step_s > MAX_STEP_S:
            self._die(f"one token took {self._step_s:.2f} s, over {MAX_STEP_S}")
        elif not mask.any():
            self._end_without_a_token()
        return mask

    def accept(self, token_id: int) -> None:
        """The answer's next token, one that the mask allowed; any other is a dead end."""
        self._automaton.consume_token(token_id)
        if self._automaton.is_error():
            self._die(self._automaton.get_error())
        else:
            self._is_finished = self._automaton.is_stopped()

    def _end_without_a_token(self) -> None:
        if self._automaton.is_accepting():  # and the tokenizer has no token for the end
            self._is_finished = True
        else:
            self._die("what may follow is beyond the model's vocabulary")

    def _die(self, reason: str) -> None:
        self.dead_end = plain(reason)
        self._grammar.is_worn = True  # an automaton in error stays so, for all that share it


class _Kept:
    """Grammars by their constraint, the latest used last; those in the making are there too."""

    def __init__(self) -> None:
        self._grammars: OrderedDict[Constraint, Future[Grammar]] = OrderedDict()
        self._lock = threading.Lock()

    def get_or_reserve(self, constraint: Constraint) -> tuple[Future[Grammar], bool]:
        """With True, the caller has to make it and to settle it; with False, another does."""
        with self._lock:
            grammar = self._grammars.get(constraint)
            if grammar is not None and not (_is_made(grammar) and grammar.result().is_worn):
                self._grammars.move_to_end(constraint)
                return grammar, False
            reserved = self._grammars[constraint] = Future()
            self._grammars.move_to_end(constraint)
            return reserved, True

    def settle(self, constraint: Constraint, grammar: Future[Grammar]) -> None:
        """Forgets what failed, and the oldest where there are too many."""
        with self._lock:
            if not _is_made(grammar) and self._grammars.get(constraint) is grammar:
                del self._grammars[constraint]
            while len(self._grammars) > MAX_KEPT_GRAMMARS or self._num_bytes() > MAX_KEPT_BYTES:
                self._grammars.popitem(last=False)

    def _num_bytes(self) -> int:
        return sum(
            len(constraint.source) + grammar.result().num_bytes
            for constraint, grammar in self._grammars.items()
            if _is_made(grammar)
        )


def _is_made(grammar: Future[Grammar]) -> bool:
    return grammar.done() and grammar.exception() is None
