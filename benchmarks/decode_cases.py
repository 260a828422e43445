"""What ``benchmarks decode`` asks the engine for, and how a figure follows from seconds. Plain.

decode, long, sampling   ms a step = (time for num_out tokens - time for 1) / (num_out - 1)
upload                   the same, while others come and go: ``upload`` says who
prefill                  s, the time for 1 token of every request
closed                   output tokens/s of all requests at once, more than run together
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import Spread, spread

GROUPS = ("decode", "long", "prefill", "closed", "sampling", "upload")
KINDS = ("base", "one", "distinct", "zipf")
BATCHES = (1, 8, 32, 64, 128, 256)
_SAMPLED_BATCHES = (64, 256)
_UPLOAD_BATCHES = (8, 64)


@dataclass(frozen=True)
class Sizes:
    """Numbers of requests and of tokens."""

    num_in: int = 128
    num_out: int = 256
    long_batch: int = 64
    long_in: int = 1024
    long_out: int = 128
    closed_requests: int = 512
    closed_in: int = 256
    closed_out: int = 128
    num_adapters: int = 64  # distinct ones, at most


QUICK = Sizes(16, 6, 2, 32, 4, 6, 16, 4, 3)


@dataclass(frozen=True)
class Case:
    """``adapters`` has one entry a request (None: the base model); all are submitted at once."""

    name: str
    group: str
    num_in: int
    num_out: int
    adapters: tuple[int | None, ...]

    @property
    def num_requests(self) -> int:
        return len(self.adapters)

    @property
    def kind(self) -> str:
        return self.name.rpartition(" ")[2]

    @property
    def needs_first(self) -> bool:
        """Whether the time for one token out is a part of the figure."""
        return self.group != "closed"

    @property
    def unit(self) -> str:
        return {"prefill": "s", "closed": "tok/s"}.get(self.group, "ms")

    def figure(self, sample: Sample) -> float:
        if self.group == "prefill":
            return sample.first_s
        if self.group == "closed":
            return self.tokens_per_s(sample)
        return 1e3 * (sample.whole_s - sample.first_s) / (self.num_out - 1)

    def tokens_per_s(self, sample: Sample) -> float:
        """Of output, first tokens' time included; of the prompts when nothing else is made."""
        if self.group == "prefill":
            return self.num_requests * self.num_in / sample.first_s
        return self.num_requests * self.num_out / sample.whole_s

    def figures(self, samples: Sequence[Sample]) -> Spread:
        return spread(self.figure(sample) for sample in samples)

    def share(self, ours: float, other: float) -> float:
        """Our time over another's, whichever way the unit points: below 1 we are ahead."""
        return other / ours if self.unit == "tok/s" else ours / other


@dataclass(frozen=True)
class Sample:
    """One round of a case. Seconds from the requests' start to the last token."""

    case: str
    round: int
    first_s: float  # with one token out; 0 where it is not needed
    whole_s: float


def cases(
    sizes: Sizes,
    groups: Sequence[str] = GROUPS,
    kinds: Sequence[str] = KINDS,
    batches: Sequence[int] = BATCHES,
    seed: int = 0,
) -> list[Case]:
    makers: Mapping[str, Callable[[], list[Case]]] = {
        "decode": lambda: _decode(sizes, batches),
        "long": lambda: _long(sizes),
        "prefill": lambda: _prefill(sizes),
        "closed": lambda: _closed(sizes, seed),
        "sampling": lambda: _sampling(sizes, batches),
        "upload": lambda: _upload(sizes, batches),
    }
    made = [case for group in groups for case in makers[group]()]
    return [case for case in made if case.kind in kinds]


def prompts(case: Case, vocab_size: int, seed: str) -> list[tuple[int, ...]]:
    """Random tokens, other ones for every seed: nothing could be reused."""
    draw = random.Random(f"{case.name} {seed}")
    ids = range(vocab_size // 100, vocab_size)
    return [tuple(draw.choices(ids, k=case.num_in)) for _ in range(case.num_requests)]


def _adapters(kind: str, num_requests: int, num_adapters: int) -> tuple[int | None, ...]:
    if kind == "distinct":
        return tuple(i % num_adapters for i in range(num_requests))
    return ((0 if kind == "one" else None),) * num_requests


def _decode(sizes: Sizes, batches: Sequence[int]) -> list[Case]:
    return [
        Case(
            f"decode B={b} {kind}",
            "decode",
            sizes.num_in,
            sizes.num_out,
            _adapters(kind, b, sizes.num_adapters),
        )
        for b in batches
        for kind in ("base", "one", "distinct")
    ]


def _long(sizes: Sizes) -> list[Case]:
    b = sizes.long_batch
    return [
        Case(
            f"long B={b} {kind}",
            "long",
            sizes.long_in,
            sizes.long_out,
            _adapters(kind, b, sizes.num_adapters),
        )
        for kind in ("base", "distinct")
    ]


def _prefill(sizes: Sizes) -> list[Case]:
    b = sizes.long_batch
    kinds = {sizes.num_in: ("base", "one", "distinct"), sizes.long_in: ("base", "distinct")}
    return [
        Case(
            f"prefill {b}x{num_in} {kind}",
            "prefill",
            num_in,
            1,
            _adapters(kind, b, sizes.num_adapters),
        )
        for num_in, of_length in kinds.items()
        for kind in of_length
    ]


def _closed(sizes: Sizes, seed: int) -> list[Case]:
    n = sizes.closed_requests
    popularity = [1 / (i + 1) for i in range(sizes.num_adapters)]  # Zipf, exponent 1
    zipf = tuple(random.Random(seed).choices(range(sizes.num_adapters), popularity, k=n))
    drawn = {
        "base": _adapters("base", n, 1),
        "one": _adapters("one", n, 1),
        "zipf": zipf,
    }
    return [
        Case(f"closed {kind}", "closed", sizes.closed_in, sizes.closed_out, adapters)
        for kind, adapters in drawn.items()
    ]


def _sampling(sizes: Sizes, batches: Sequence[int]) -> list[Case]:
    return [
        Case(f"sampling B={b} base", "sampling", sizes.num_in, sizes.num_out, (None,) * b)
        for b in batches
        if b in _SAMPLED_BATCHES
    ]


def _upload(sizes: Sizes, batches: Sequence[int]) -> list[Case]:
    """The batch is of the base model; the kind is the visitors'."""
    return [
        Case(f"upload B={b} {kind}", "upload", sizes.num_in, sizes.num_out, (None,) * b)
        for b in batches
        if b in _UPLOAD_BATCHES
        for kind in ("base", "one", "distinct")
    ]
