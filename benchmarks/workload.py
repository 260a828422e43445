"""Seeded workloads as the field measures them: who asks when, for which adapter, how much. Plain.

A ``Recipe`` joins a traffic (when, and which tenant), a popularity (which adapter) and lengths.
Times, adapters, lengths and prompts are drawn from streams of their own: two recipes that differ in
their adapters alone share every arrival and every length.

  closed        all at once, or so many at a time            punica, closed
  gamma         gaps gamma(1/cv^2, cv^2/rate); cv 1: Poisson S-LoRA, arXiv:2311.03285
  per adapter   a Poisson stream each, rates dealt in turn, then shuffled
  hog           one tenant offers 20 times what each of nine others does
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

DEFAULT_TENANT, HOG = "default", "hog"
_MAX_QUICK_RATE = 20.0
_QUICK_SECONDS = 0.8
_QUICK_REQUESTS, _QUICK_ADAPTERS, _QUICK_IN, _QUICK_OUT = 16, 12, 16, 4


@dataclass(frozen=True)
class Arrival:
    """One request. ``at_s`` counts from the run's start; ``adapter`` is a number, 0 the first."""

    at_s: float
    adapter: int
    tenant: str
    prompt: tuple[int, ...]
    num_out: int


@dataclass(frozen=True)
class Workload:
    """``max_at_once`` None: an arrival waits for its time alone, never for another's answer."""

    description: str
    arrivals: tuple[Arrival, ...]
    max_at_once: int | None

    @property
    def adapters(self) -> list[int]:
        """The distinct ones, in the order of their first use."""
        return list(dict.fromkeys(arrival.adapter for arrival in self.arrivals))


@dataclass(frozen=True)
class Visit:
    """An arrival without its lengths. ``adapter`` None: the popularity decides."""

    at_s: float
    tenant: str = DEFAULT_TENANT
    adapter: int | None = None


# ---- traffic


class Traffic(Protocol):
    @property
    def max_at_once(self) -> int | None: ...

    def visits(self, draw: np.random.Generator, num_adapters: int) -> list[Visit]: ...

    def quick(self) -> Traffic: ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Closed:
    """``num_requests`` at once, or ``max_at_once`` of them at a time."""

    num_requests: int
    max_at_once: int | None = None

    def visits(self, draw: np.random.Generator, num_adapters: int) -> list[Visit]:
        return [Visit(0.0)] * self.num_requests

    def quick(self) -> Closed:
        return replace(self, num_requests=min(self.num_requests, _QUICK_REQUESTS))

    def describe(self) -> str:
        at_once = "at once" if self.max_at_once is None else f"{self.max_at_once} at a time"
        return f"closed, {self.num_requests} requests {at_once}"


@dataclass(frozen=True)
class Open:
    """Requests come whether or not the last is answered. ``rate``: requests/s in all."""

    rate: float
    duration_s: float

    @property
    def max_at_once(self) -> None:
        return None

    def with_load(self, rate: float | None, duration_s: float | None) -> Open:
        """The same kind of traffic; None: as it is."""
        return replace(self, rate=rate or self.rate, duration_s=duration_s or self.duration_s)

    def quick(self) -> Open:
        return self.with_load(min(self.rate, _MAX_QUICK_RATE), min(self.duration_s, _QUICK_SECONDS))

    def visits(self, draw: np.random.Generator, num_adapters: int) -> list[Visit]:
        raise NotImplementedError

    def describe(self) -> str:
        return f"open loop, {self.rate:.4g} requests/s for {self.duration_s:g} s"


@dataclass(frozen=True)
class Gamma(Open):
    cv: float = 1.0  # 1: Poisson

    def visits(self, draw: np.random.Generator, num_adapters: int) -> list[Visit]:
        return [Visit(at_s) for at_s in _times(draw, self.rate, self.duration_s, self.cv)]

    def describe(self) -> str:
        kind = "Poisson" if self.cv == 1 else f"gamma gaps, cv {self.cv:g}"
        return f"{super().describe()}, {kind}"


@dataclass(frozen=True)
class PerAdapter(Open):
    """``rates`` are dealt to the adapters in turn and scaled so that they sum to ``rate``."""

    rates: tuple[float, ...] = (0.1, 0.05, 0.025)

    def visits(self, draw: np.random.Generator, num_adapters: int) -> list[Visit]:
        rates = dealt_rates(draw, self.rates, num_adapters)
        scale = self.rate / rates.sum()
        found = [
            Visit(at_s, adapter=adapter)
            for adapter, rate in enumerate(rates)
            for at_s in _times(draw, rate * scale, self.duration_s)
        ]
        return sorted(found, key=lambda visit: visit.at_s)

    def describe(self) -> str:
        rates = "/".join(f"{rate:g}" for rate in self.rates)
        return f"{super().describe()}, a Poisson stream per adapter, rates as {rates}"


def dealt_rates(draw: np.random.Generator, rates: Sequence[float], num_adapters: int) -> np.ndarray:
    """[num_adapters] requests/s: each in turn, then shuffled."""
    return draw.permutation(np.resize(np.asarray(rates, np.float64), num_adapters))


@dataclass(frozen=True)
class Hog(Open):
    """``rate`` is what all offer together with the hog; without it the others offer the same."""

    times: float = 20.0
    num_others: int = 9
    with_hog: bool = True

    def visits(self, draw: np.random.Generator, num_adapters: int) -> list[Visit]:
        each = self.rate / (self.times + self.num_others)
        rates = {f"other-{i}": each for i in range(self.num_others)}
        if self.with_hog:  # drawn last: the others come when they would without it
            rates[HOG] = self.times * each
        found = [
            Visit(at_s, tenant)
            for tenant, rate in rates.items()
            for at_s in _times(draw, rate, self.duration_s)
        ]
        return sorted(found, key=lambda visit: visit.at_s)

    def describe(self) -> str:
        hog = f"one offers {self.times:g} x" if self.with_hog else "without the one that offers"
        return f"{super().describe()}, Poisson, {self.num_others} tenants, {hog} each"


def _times(
    draw: np.random.Generator, rate: float, duration_s: float, cv: float = 1.0
) -> list[float]:
    """Arrivals before ``duration_s``; gaps have mean 1/rate and coefficient of variation cv."""
    found: list[float] = []
    at_s = 0.0
    while (at_s := at_s + float(draw.gamma(1 / cv**2, cv**2 / rate))) < duration_s:
        found.append(at_s)
    return found


# ---- popularity


class Popularity(Protocol):
    def adapters(self, draw: np.random.Generator, num: int, num_adapters: int) -> np.ndarray:
        """i64[num], each in 0 .. num_adapters - 1."""
        ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Identical:
    def adapters(self, draw: np.random.Generator, num: int, num_adapters: int) -> np.ndarray:
        return np.zeros(num, np.int64)

    def describe(self) -> str:
        return "one for all"


@dataclass(frozen=True)
class Distinct:
    def adapters(self, draw: np.random.Generator, num: int, num_adapters: int) -> np.ndarray:
        return np.arange(num) % num_adapters

    def describe(self) -> str:
        return "each in turn"


@dataclass(frozen=True)
class Uniform:
    def adapters(self, draw: np.random.Generator, num: int, num_adapters: int) -> np.ndarray:
        return draw.integers(num_adapters, size=num)

    def describe(self) -> str:
        return "uniform"


@dataclass(frozen=True)
class Zipf:
    """P(the k-th) ~ 1 / k^s, k from 1."""

    s: float

    def adapters(self, draw: np.random.Generator, num: int, num_adapters: int) -> np.ndarray:
        weights = np.arange(1, num_adapters + 1, dtype=np.float64) ** -self.s
        return draw.choice(num_adapters, size=num, p=weights / weights.sum())

    def describe(self) -> str:
        return f"Zipf {self.s:g}"


@dataclass(frozen=True)
class PowerLaw:
    """S-LoRA's: (power(alpha) * N) as an integer, so P(index < k) = (k / N)^alpha."""

    alpha: float

    def adapters(self, draw: np.random.Generator, num: int, num_adapters: int) -> np.ndarray:
        return (draw.power(self.alpha, num) * num_adapters).astype(np.int64)

    def describe(self) -> str:
        return f"power law, alpha {self.alpha:g}"


@dataclass(frozen=True)
class Groups:
    """Punica's "zipf": the i-th adapter gets floor(base^i) requests; in random order."""

    base: float = 1.5

    def adapters(self, draw: np.random.Generator, num: int, num_adapters: int) -> np.ndarray:
        found: list[int] = []
        group = 0
        while len(found) < num:
            found += [group % num_adapters] * math.floor(self.base**group)
            group += 1
        return draw.permutation(np.asarray(found[:num], np.int64))

    def describe(self) -> str:
        return f"groups of floor({self.base:g}^i)"


# ---- lengths


class Lengths(Protocol):
    def draw(self, draw: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
        """(i64[num] tokens in, i64[num] tokens out), all at least 1."""
        ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Fixed:
    num_in: int
    num_out: int

    def draw(self, draw: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(num, self.num_in), np.full(num, self.num_out)

    def describe(self) -> str:
        return f"{self.num_in} tokens in, {self.num_out} out"


@dataclass(frozen=True)
class UniformLengths:
    """S-LoRA's: randint(low, high), high excluded."""

    low: int = 8
    high: int = 512

    def draw(self, draw: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
        return draw.integers(self.low, self.high, num), draw.integers(self.low, self.high, num)

    def describe(self) -> str:
        return f"randint({self.low}, {self.high}) tokens in and out"


@dataclass(frozen=True)
class ShareGptLike:
    """Lognormal, sigma 1; mu so that the means are 222 and 196 after the cut at 1,000."""

    mu_in: float = 4.967
    mu_out: float = 4.826
    most: int = 1000

    def draw(self, draw: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
        return self._some(draw, self.mu_in, num), self._some(draw, self.mu_out, num)

    def _some(self, draw: np.random.Generator, mu: float, num: int) -> np.ndarray:
        return np.clip(np.rint(draw.lognormal(mu, 1.0, num)), 1, self.most).astype(np.int64)

    def describe(self) -> str:
        return f"lognormal tokens, means 222 in and 196 out, at most {self.most}"


@dataclass(frozen=True)
class PunicaLengths:
    """Prompt -1 + 18 exp(0.8 z), prompt and answer together uniform(0, 2048)."""

    most: int = 2048

    def draw(self, draw: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
        prompt = np.clip(np.rint(18 * draw.lognormal(0.0, 0.8, num) - 1), 1, self.most // 2)
        total = draw.uniform(0, self.most, num)
        return prompt.astype(np.int64), np.maximum(1, total - prompt).astype(np.int64)

    def describe(self) -> str:
        return f"lognormal prompts, prompt and answer uniform up to {self.most} tokens"


# ---- all together


@dataclass(frozen=True)
class Recipe:
    """``popularity`` None: the traffic names the adapters. ``max_in`` and ``max_out`` cut."""

    traffic: Traffic
    popularity: Popularity | None
    lengths: Lengths
    num_adapters: int
    max_in: int | None = None
    max_out: int | None = None

    def quick(self) -> Recipe:
        """A few short requests of the same kind: does it run at all."""
        return replace(
            self,
            traffic=self.traffic.quick(),
            num_adapters=min(self.num_adapters, _QUICK_ADAPTERS),
            max_in=_QUICK_IN,
            max_out=_QUICK_OUT,
        )

    def describe(self) -> str:
        who = "" if self.popularity is None else f" ({self.popularity.describe()})"
        cuts = [
            f"at most {most} {side}"
            for most, side in ((self.max_in, "in"), (self.max_out, "out"))
            if most is not None
        ]
        lengths = ", ".join([self.lengths.describe(), *cuts])
        return f"{self.traffic.describe()}; {self.num_adapters} adapters{who}; {lengths}"

    def workload(self, seed: int, name: str, vocab_size: int, max_seq_len: int) -> Workload:
        """Equal for equal arguments. ``name`` varies the prompts alone, so that no run finds
        another's in a cache. Prompt and answer are cut to ``max_seq_len`` tokens together."""
        times, who, lengths = (np.random.default_rng((seed, part)) for part in range(3))
        words = np.random.default_rng((seed, zlib.crc32(name.encode())))
        visits = self.traffic.visits(times, self.num_adapters)
        if self.popularity is not None:
            drawn = self.popularity.adapters(who, len(visits), self.num_adapters).tolist()
            visits = [replace(v, adapter=a) for v, a in zip(visits, drawn, strict=True)]
        ins, outs = self._lengths(lengths, len(visits), max_seq_len)
        arrivals = tuple(
            Arrival(visit.at_s, visit.adapter or 0, visit.tenant, _prompt(words, i, vocab_size), o)
            for visit, i, o in zip(visits, ins, outs, strict=True)
        )
        description = f"{self.describe()}; {len(arrivals)} requests, seed {seed}"
        return Workload(description, arrivals, self.traffic.max_at_once)

    def _lengths(
        self, draw: np.random.Generator, num: int, max_seq_len: int
    ) -> tuple[list[int], list[int]]:
        ins, outs = self.lengths.draw(draw, num)
        ins = np.minimum(ins, min(self.max_in or max_seq_len, max_seq_len - 1))
        outs = np.minimum(outs, np.minimum(self.max_out or max_seq_len, max_seq_len - ins))
        return ins.tolist(), outs.tolist()


def _prompt(draw: np.random.Generator, num_tokens: int, vocab_size: int) -> tuple[int, ...]:
    """Random ids; the lowest, where special tokens live, are left out."""
    return tuple(draw.integers(vocab_size // 100, vocab_size, num_tokens).tolist())
