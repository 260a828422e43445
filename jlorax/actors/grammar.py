"""Grammars: owns the compiler and, of every constrained sequence, where it is in its grammar.

Both are work for threads, which the automata's library lets run beside the interpreter. Compiling
has threads of its own: one grammar may take a second, a mask takes tens of microseconds. A hop to a
thread and back takes longer than that, so a thread is given the tokens of several rows at once;
those of rows whose last mask took long go to other threads, one by one.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from jlorax.actors.mailbox import Mailbox
from jlorax.actors.messages import (
    AcceptToken,
    AcceptTokens,
    CompileGrammar,
    GrammarAnswers,
    GrammarEnded,
    GrammarFailed,
    GrammarMessage,
    GrammarStart,
    MaskReady,
    SchedulerMessage,
)
from jlorax.errors import GrammarDeadEnd, InvalidRequest, JLoraxError
from jlorax.scheduling.sequence import Sequence
from jlorax.types import Constraint

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("jlorax.grammars")
_COMPILING_THREADS = 4
_MASK_THREADS = 4
_ROWS_A_THREAD = 8  # at least, if there are so many


class Matcher(Protocol):
    """Where one sequence is in its grammar. One thread at a time."""

    def mask(self) -> np.ndarray:
        """i32[ceil(V / 32)]: what may come next, a bit a token."""

    def accept(self, token_id: int) -> None: ...

    @property
    def is_finished(self) -> bool: ...

    @property
    def is_dead(self) -> bool: ...

    @property
    def is_slow(self) -> bool:
        """Its last mask took so long that others had better not stand behind it."""


class Grammar(Protocol):
    def matcher(self) -> Matcher: ...


class Compiler(Protocol):
    """Used by several threads."""

    def compile(self, constraint: Constraint) -> Grammar:
        """Raises a JLoraxError that says what is wrong with it."""

    def close(self) -> None:
        """Ends what it has of processes."""


class Grammars:
    """A sequence draws nothing while one of its tokens is here, so its matcher has one caller."""

    def __init__(
        self,
        inbox: Mailbox[GrammarMessage],
        scheduler: Mailbox[SchedulerMessage],
        compiler: Compiler,
    ) -> None:
        self._inbox = inbox
        self._scheduler = scheduler
        self._compiler = compiler
        self._compiling = ThreadPoolExecutor(_COMPILING_THREADS, "grammar-compile")
        self._masks = ThreadPoolExecutor(_MASK_THREADS, "grammar-mask")
        self._slow_masks = ThreadPoolExecutor(_MASK_THREADS, "grammar-slow-mask")

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                async for message in self._inbox:
                    match message:
                        case CompileGrammar():
                            tasks.create_task(self._compile(message))
                        case AcceptTokens(tokens):
                            self._hand_out(tokens)
        finally:
            for threads in (self._compiling, self._masks, self._slow_masks):
                threads.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self._compiler.close)

    async def _compile(self, message: CompileGrammar) -> None:
        """Always answers."""
        loop = asyncio.get_running_loop()
        try:
            start = await loop.run_in_executor(self._compiling, self._start, message.constraint)
        except JLoraxError as error:
            _settle(message.reply, error)
        except Exception as error:  # ours or the library's, but one request's: the others go on
            log.error("a grammar cannot be compiled: %s", type(error).__name__)
            reason = f"the grammar cannot be compiled: {type(error).__name__}"
            _settle(message.reply, JLoraxError(reason))
        else:
            _settle(message.reply, start)

    def _start(self, constraint: Constraint) -> GrammarStart:
        matcher = self._compiler.compile(constraint).matcher()
        mask = matcher.mask()
        if matcher.is_finished or matcher.is_dead:
            raise InvalidRequest("the grammar admits no answer but the empty one")
        return GrammarStart(matcher, mask)

    def _hand_out(self, tokens: tuple[AcceptToken, ...]) -> None:
        quick = [drawn for drawn in tokens if not drawn.sequence.matcher.is_slow]
        size = max(_ROWS_A_THREAD, -(-len(quick) // _MASK_THREADS))
        for first in range(0, len(quick), size):
            self._masks.submit(self._accept, quick[first : first + size])
        for drawn in tokens:
            if drawn.sequence.matcher.is_slow:
                self._slow_masks.submit(self._accept, [drawn])

    def _accept(self, tokens: list[AcceptToken]) -> None:
        answers = tuple(_answer(drawn.sequence, drawn.token) for drawn in tokens)
        self._scheduler.post_from_thread(GrammarAnswers(answers))


def _answer(sequence: Sequence, token: int) -> MaskReady | GrammarEnded | GrammarFailed:
    try:
        return _after(sequence, token)
    except Exception as error:
        log.error("a grammar broke down: %s", type(error).__name__)
        reason = f"the grammar broke down: {type(error).__name__}"
        return GrammarFailed(sequence, JLoraxError(reason))


def _after(sequence: Sequence, token: int) -> MaskReady | GrammarEnded | GrammarFailed:
    matcher: Matcher = sequence.matcher
    matcher.accept(token)
    if matcher.is_finished:
        return GrammarEnded(sequence)
    mask = matcher.mask()
    if matcher.is_dead:
        num_tokens = len(sequence.tokens) - len(sequence.prompt)
        return GrammarFailed(sequence, GrammarDeadEnd(num_tokens))
    return GrammarEnded(sequence) if matcher.is_finished else MaskReady(sequence, mask)


def _settle(reply: asyncio.Future[GrammarStart], answer: GrammarStart | JLoraxError) -> None:
    """Unless nobody waits for it any more."""
    if reply.done():
        return
    if isinstance(answer, JLoraxError):
        reply.set_exception(answer)
    else:
        reply.set_result(answer)
