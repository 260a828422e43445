"""Compiles a grammar once where it may fail: in a process that only it can end.

What a grammar costs cannot be told from its text: 42 bytes (a multipleOf) took 6 s, 60 KB of a
regex 1.6 GB, a chain of 2000 references ended the process. llguidance's own limits catch most of
it, not all. So every new grammar is compiled, and a few tokens of it walked, in a fork that has so
much processor time, memory and stack.

    Trials, on a worker's thread          its process             a fork of that
      grammar          --- pickle --->    forks          --->     compiles, walks, ends
      Verdict          <--------------    how it ended   <---     what it said
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import LifoQueue
from typing import IO

import llguidance

from jlorax.errors import Unavailable
from jlorax.structured.automaton import automaton_of, trie_of

MAX_PROCESSES = 2
_STACK_BYTES = 1 << 20  # a worker's thread has 2 to 8 MiB
_NUM_STEPS = 16
_END_DEADLINE_S = 5.0


@dataclass(frozen=True)
class Bounds:
    """``compile_s``: of processor time; then it is compiled again where it is used: 2 s for both.
    ``step_s``: a mask and its token, for which every sequence of a batch waits."""

    compile_s: float = 0.5
    step_s: float = 0.03
    grammar_bytes: int = 256 << 20


@dataclass(frozen=True)
class Verdict:
    """``refusal``: why the grammar cannot be used, in words; None: it can. ``num_bytes``: what it
    took of memory."""

    refusal: str | None
    num_bytes: int = 0


class Trials:
    """For several threads at once; more than ``MAX_PROCESSES`` wait for each other."""

    def __init__(
        self, tokens: Sequence[bytes], eos_token_ids: Sequence[int], bounds: Bounds | None = None
    ) -> None:
        self._setup = _Setup(list(tokens), tuple(eos_token_ids), bounds or Bounds())
        self._idle: LifoQueue[_TrialProcess | None] = LifoQueue()  # None: it is yet to begin
        for _ in range(MAX_PROCESSES):
            self._idle.put(None)

    def verdict(self, grammar: str) -> Verdict:
        """Raises Unavailable when the process that tries has itself been ended."""
        process = self._idle.get()
        try:
            if process is None:
                process = _TrialProcess(self._setup)
            return process.verdict(grammar)
        except (OSError, EOFError, pickle.UnpicklingError):
            status = None if process is None else process.close()
            process = None
            raise Unavailable(
                f"the process that tries constraints ended with status {status}; try again"
            ) from None
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """Ends the processes; one that works ends first."""
        for _ in range(MAX_PROCESSES):
            process = self._idle.get()
            if process is not None:
                process.close()
        for _ in range(MAX_PROCESSES):
            self._idle.put(None)


@dataclass(frozen=True)
class _Setup:
    tokens: list[bytes]
    eos_token_ids: tuple[int, ...]
    bounds: Bounds


class _TrialProcess:
    """Ends with this process, which holds the other end of its pipe."""

    def __init__(self, setup: _Setup) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C at the terminal is for the server alone
            env=_environment(),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._verdicts = self._process.stdin, self._process.stdout
        self._send(setup)

    def verdict(self, grammar: str) -> Verdict:
        self._send(grammar)
        verdict: Verdict = pickle.load(self._verdicts)
        return verdict

    def close(self) -> int:
        """Its exit status."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._process.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._verdicts.close()
        return self._process.wait()

    def _send(self, message: object) -> None:
        pickle.dump(message, self._requests)
        self._requests.flush()


def _environment() -> dict[str, str]:
    """The child finds what this process finds, wherever it was found."""
    path = os.pathsep.join(part or os.getcwd() for part in sys.path)
    return {**os.environ, "PYTHONPATH": path}


def main() -> None:
    """Answers until the other side closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, verdicts = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not end up between the verdicts
    setup: _Setup = pickle.load(requests)
    trial = _Trial(trie_of(setup.tokens, setup.eos_token_ids), setup.bounds)
    while True:
        try:
            grammar = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(trial.of(grammar), verdicts)
        verdicts.flush()


@dataclass(frozen=True)
class _Trial:
    trie: llguidance.LLTokenizer
    bounds: Bounds

    def of(self, grammar: str) -> Verdict:
        """In a fork: the trie is there already, and what goes wrong ends with it."""
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(here)
            with os.fdopen(there, "wb") as out:
                self._within_bounds(grammar, out)
            os._exit(0)
        os.close(there)
        with os.fdopen(here, "rb") as answer:
            words = answer.read()
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and words:
            verdict: Verdict = pickle.loads(words)
            return verdict
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
            return Verdict(f"is too complex: it takes over {self.bounds.compile_s} s to compile")
        return Verdict(
            "is too complex: nested too deep, or compiled it takes over "
            f"{self.bounds.grammar_bytes} bytes"
        )

    def _within_bounds(self, grammar: str, out: IO[bytes]) -> None:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)  # what a library says of a stack that overflows
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit_memory(self.bounds.grammar_bytes + _STACK_BYTES)
        signal.setitimer(signal.ITIMER_PROF, self.bounds.compile_s)  # SIGPROF ends the process
        threading.stack_size(_STACK_BYTES)
        thread = threading.Thread(target=lambda: pickle.dump(self._verdict(grammar), out))
        thread.start()
        thread.join()

    def _verdict(self, grammar: str) -> Verdict:
        before = _peak_bytes()
        automaton = automaton_of(self.trie, grammar)
        if automaton.is_error():
            return Verdict(automaton.get_error())
        return Verdict(self._walked(automaton), _peak_bytes() - before)

    def _walked(self, automaton: llguidance.LLMatcher) -> str | None:
        """Some text of the grammar, any: what is wrong with it after a few tokens, or slow."""
        chance = random.Random(0)
        for num_steps in range(_NUM_STEPS):
            begin_s = time.thread_time()
            allowed = automaton.compute_bitmask()
            if automaton.is_error():
                return automaton.get_error()
            automaton.consume_token(_drawn(allowed, chance))
            if automaton.is_error():
                return automaton.get_error()
            step_s = time.thread_time() - begin_s
            if step_s > self.bounds.step_s:
                return f"is too complex: token {num_steps} of an answer took {step_s:.3f} s"
            if automaton.is_stopped():
                break
        return None


def _limit_memory(more_bytes: int) -> None:
    with contextlib.suppress(OSError):  # where there is no /proc, memory has no limit
        with open("/proc/self/statm") as statm:
            in_use = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + more_bytes, in_use + more_bytes))


def _drawn(allowed: bytes, chance: random.Random) -> int:
    bits = int.from_bytes(allowed, "little")
    start = chance.randrange(bits.bit_length())
    rest = bits >> start
    return start + (rest & -rest).bit_length() - 1


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
