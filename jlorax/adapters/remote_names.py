"""What remotes said of names, and how long it is believed. Plain; the cache actor asks them.

known      resolved at once; asked again after ``recheck_s``, and believed on if the remote is
           down: what is resident goes on being served
unknown    a 404 at once for ``forget_s``, so that a flood of wrong names asks nobody
being asked   one question however many wait, and few at a time
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from jlorax.adapters.registry import AdapterRecord, Registry
from jlorax.adapters.remote import Described
from jlorax.errors import AdapterNotFound, InvalidParameter, JLoraxError, Overloaded

MAX_UNKNOWN = 10_000
MAX_QUESTIONS = 64

W = TypeVar("W")


@dataclass(frozen=True)
class Question:
    """Ask these remotes, one after the other, until one knows the name."""

    adapter_id: str
    remotes: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    remote: str
    described: Described


@dataclass
class RemoteNames(Generic[W]):
    """``W`` stands for whoever waits for an answer."""

    registry: Registry
    remotes: Sequence[str] = ()  # in the order in which they are asked
    recheck_s: float = 60.0
    forget_s: float = 10.0
    clock: Callable[[], float] = time.monotonic
    _checked_s: dict[tuple[str, str], float] = field(default_factory=dict)
    _unknown: OrderedDict[Question, float] = field(default_factory=OrderedDict)
    _waiting: dict[Question, list[W]] = field(default_factory=dict)

    def question(self, adapter_id: str, source: str | None) -> Question | None:
        """None: there is no remote to ask. InvalidParameter: none of this name."""
        if source is None:
            return Question(adapter_id, tuple(self.remotes)) if self.remotes else None
        if source not in self.remotes:
            known = ", ".join(["local", *self.remotes])
            raise InvalidParameter(
                "adapter_source", f"must be one of {known} or left out, not {source!r}"
            )
        return Question(adapter_id, (source,))

    def known(self, question: Question) -> AdapterRecord | None:
        """The answer, where a recent one is known. None: ask. AdapterNotFound: known not to be."""
        until_s = self._unknown.get(question)
        if until_s is not None and self.clock() < until_s:
            raise AdapterNotFound(question.adapter_id)
        for remote in question.remotes:
            checked_s = self._checked_s.get((remote, question.adapter_id))
            if checked_s is not None and self.clock() - checked_s < self.recheck_s:
                return self.registry.remote(remote, question.adapter_id)
        return None

    def wait(self, question: Question, who: W) -> bool:
        """Whether the question is to be asked now: nobody else waits for it yet."""
        if question in self._waiting:
            self._waiting[question].append(who)
            return False
        if len(self._waiting) >= MAX_QUESTIONS:
            raise Overloaded(f"{len(self._waiting)} adapters are being looked up at their remotes")
        self._waiting[question] = [who]
        return True

    def answered(
        self, question: Question, answer: Found | JLoraxError
    ) -> tuple[list[W], AdapterRecord | JLoraxError]:
        """(who waited, what they are told)."""
        waiting = self._waiting.pop(question, [])
        if isinstance(answer, Found):
            return waiting, self._learn(question, answer)
        if isinstance(answer, AdapterNotFound):
            self._note_unknown(question)
            return waiting, answer
        return waiting, self._last_known(question) or answer

    def _learn(self, question: Question, found: Found) -> AdapterRecord | JLoraxError:
        try:
            record = self.registry.learn(found.remote, question.adapter_id, found.described)
        except JLoraxError as error:  # what it found is no valid adapter
            return error
        self._checked_s[found.remote, question.adapter_id] = self.clock()
        return record

    def _note_unknown(self, question: Question) -> None:
        for remote in question.remotes:
            self._checked_s.pop((remote, question.adapter_id), None)
        self._unknown[question] = self.clock() + self.forget_s
        self._unknown.move_to_end(question)
        if len(self._unknown) > MAX_UNKNOWN:
            self._unknown.popitem(last=False)

    def _last_known(self, question: Question) -> AdapterRecord | None:
        """The remote is down: what it said last holds, for another while."""
        for remote in question.remotes:
            key = (remote, question.adapter_id)
            if key in self._checked_s:
                self._checked_s[key] = self.clock()
                return self.registry.remote(remote, question.adapter_id)
        return None
