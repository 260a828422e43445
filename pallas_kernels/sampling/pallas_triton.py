"""Sampling as one Pallas-Triton kernel: a program has a row, and branches on what the row wants.

A program walks its row chunk after chunk; after the first walk a row of 32,000 logits (128 KB) is
in its multiprocessor's L1 cache. What it needs of the row is always a few sums or a maximum, so
nothing is sorted, stored or exchanged:

    always            3 walks: the greatest of warm and of logits, the sum of exp(logits - greatest)
    a draw            1.5 walks: all mass, then as far as the point
    top-k, top-p      a search of at most 32 / log2(ways) walks each; top-p one more
    min-p             none
    typical-p         a search, and 2 more
    an alternative    1 walk each

A walk is arithmetic more than reading: some 20 instructions a logit in a search of 4 ways, 2.5
microseconds where a multiprocessor has one program (an estimate).

All filters but typical-p are lower bounds on warm, so what they leave is one float, ``lowest``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.sampling.operands import RowParameters, Sampled
from pallas_kernels.sampling.tuning import Tuning
from pallas_kernels.triton_parts import whole

_BITS_OF_NOTHING = -0x7F800001  # the ordered bits of -inf
_LOG2_E = math.log2(math.e)  # the hardware's exponential is of base 2

Weigh = Callable[[jax.Array], jax.Array]  # of a chunk of logits, elementwise


def sample(
    logits: jax.Array,
    warm: jax.Array,
    parameters: RowParameters,
    max_alternatives: int,
    tuning: Tuning,
    *,
    interpret: bool = False,
) -> Sampled:
    """As ``api.sample``."""
    num_rows, vocab_size = logits.shape
    # one small operand: slices of a packed vector would be a launch each. V is exact in f32
    columns = parameters._replace(top_k=jnp.minimum(parameters.top_k, vocab_size))
    packed = jnp.stack([column.astype(jnp.float32) for column in columns])
    dims = ((num_rows,), (num_rows, max_alternatives))
    out = [jax.ShapeDtypeStruct(d, dtype) for d in dims for dtype in (jnp.int32, jnp.float32)]
    operands = logits, warm, packed
    results = pl.pallas_call(
        functools.partial(_sample_kernel, tuning),
        grid=(num_rows,),
        in_specs=[whole(array.shape) for array in operands],
        out_specs=[whole(array.shape) for array in out],
        out_shape=out,
        compiler_params=pltriton.CompilerParams(num_warps=tuning.num_warps, num_stages=1),
        interpret=interpret,
        name="sample",
    )(*operands)
    return Sampled(*results)


class _Asked(NamedTuple):
    """RowParameters of one row, as f32 scalars."""

    is_greedy: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    point: jax.Array
    num_alternatives: jax.Array


@dataclass(frozen=True)
class _Row:
    """A row of logits [B, V], and how it is walked."""

    ref: Any
    row: jax.Array
    tuning: Tuning

    @property
    def size(self) -> int:
        return self.ref.shape[1]

    @property
    def num_chunks(self) -> int:
        return pl.cdiv(self.size, self.tuning.chunk)

    def chunk(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(logits f32[chunk], their indices): -inf past the end."""
        index = i * self.tuning.chunk + jnp.arange(self.tuning.chunk)
        if self.size % self.tuning.chunk == 0:
            return pltriton.load(self.ref.at[self.row, index]), index
        mask = index < self.size
        return pltriton.load(self.ref.at[self.row, index], mask=mask, other=-jnp.inf), index

    def sums(self, *weighs: Weigh) -> list[jax.Array]:
        """Sums over the row, all in one walk."""

        def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            x, _ = self.chunk(i)
            return tuple(total + weigh(x) for total, weigh in zip(sums, weighs, strict=True))

        zeros = (jnp.zeros((self.tuning.chunk,), jnp.float32),) * len(weighs)
        return [jnp.sum(total) for total in lax.fori_loop(0, self.num_chunks, add, zeros)]

    def greatest(self, after: tuple[jax.Array, jax.Array] | None = None) -> tuple[Any, Any]:
        """The greatest logit and its index, of equals the first; ``after``: the next behind it."""

        def compare(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> Any:
            x, index = self.chunk(i)
            if after is not None:
                value, place = after
                behind = (x < value) | ((x == value) & (index > place))
                x = jnp.where(behind, x, -jnp.inf)
            is_better = x > best[0]
            return jnp.where(is_better, x, best[0]), jnp.where(is_better, index, best[1])

        lanes = jnp.arange(self.tuning.chunk)
        start = jnp.full(lanes.shape, -jnp.inf, jnp.float32), lanes
        values, places = lax.fori_loop(0, self.num_chunks, compare, start)
        value = jnp.max(values)
        return value, jnp.min(jnp.where(values == value, places, self.size))


def _sample_kernel(
    tuning: Tuning,
    logits_ref: Any,
    warm_ref: Any,
    parameters_ref: Any,
    tokens_ref: Any,
    logprobs_ref: Any,
    top_tokens_ref: Any,
    top_logprobs_ref: Any,
) -> None:
    row = pl.program_id(0)
    asked = _Asked(*(parameters_ref[i, row] for i in range(len(_Asked._fields))))
    raw, warm = _Row(logits_ref, row, tuning), _Row(warm_ref, row, tuning)
    best, first_best = warm.greatest()
    token = _if(asked.is_greedy == 0, lambda: _drawn(warm, best, asked), first_best)
    highest, _ = raw.greatest()
    [mass] = raw.sums(lambda x: _exp(x - highest))
    normaliser = highest + jnp.log(mass)
    tokens_ref[row] = token
    logprobs_ref[row] = logits_ref[row, token] - normaliser
    _store_alternatives(raw, asked, normaliser, top_tokens_ref, top_logprobs_ref)


def _drawn(warm: _Row, best: jax.Array, asked: _Asked) -> jax.Array:
    """The token at the row's point."""
    lowest = _lowest(warm, best, asked)

    def weigh(x: jax.Array) -> jax.Array:
        return jnp.where(x >= lowest, _exp(x - best), 0.0)

    zero = jnp.float32(0.0)
    typical = _if(
        asked.typical_p < 1,
        lambda: _typical(warm, best, weigh, asked.typical_p),
        _Typical(zero, zero, jnp.float32(-jnp.inf)),
    )
    kept = lambda x: jnp.where(typical.nearness(x) >= typical.least, weigh(x), 0.0)  # noqa: E731
    return _locate(warm, kept, asked.point)


def _lowest(warm: _Row, best: jax.Array, asked: _Asked) -> jax.Array:
    """The least logit that top-k, top-p and min-p keep."""
    everything = jnp.float32(-jnp.inf)

    def top_k() -> jax.Array:
        ones = functools.partial(jnp.full_like, fill_value=1.0)
        bounds = jnp.int32(_BITS_OF_NOTHING), _ordered_bits(best)
        return _threshold(warm, lambda x: x, ones, asked.top_k, bounds, is_count=True)

    lowest = _if(asked.top_k > 0, top_k, everything)

    def top_p() -> jax.Array:
        weigh = lambda x: _exp(x - best)  # noqa: E731 (what the search compares is kept so far)
        [mass] = warm.sums(lambda x: jnp.where(x >= lowest, weigh(x), 0.0))
        bounds = _ordered_bits(lowest), _ordered_bits(best)
        return _threshold(warm, lambda x: x, weigh, asked.top_p * mass, bounds)

    lowest = _if(asked.top_p < 1, top_p, lowest)
    floor = best + jnp.log(jnp.maximum(asked.min_p, 1e-38))
    return jnp.where(asked.min_p > 0, jnp.maximum(lowest, floor), lowest)


class _Typical(NamedTuple):
    """What typical-p keeps: nearness(x) >= least. The log-probability of x is x - shift."""

    shift: jax.Array
    entropy: jax.Array
    least: jax.Array

    def nearness(self, x: jax.Array) -> jax.Array:
        """Of a logit's surprise to the entropy: 0 at most."""
        return -jnp.abs(self.shift - x - self.entropy)


def _typical(warm: _Row, best: jax.Array, weigh: Weigh, p: jax.Array) -> _Typical:
    [mass] = warm.sums(weigh)
    shift = best + jnp.log(mass)

    def term(x: jax.Array) -> jax.Array:
        weight = weigh(x)
        return jnp.where(weight > 0, weight * (shift - x), 0.0)

    [surprise] = warm.sums(term)
    all_kept = _Typical(shift, surprise / mass, jnp.float32(-jnp.inf))
    bounds = jnp.int32(_BITS_OF_NOTHING), jnp.int32(0)
    least = _threshold(warm, all_kept.nearness, weigh, p * mass, bounds)
    return all_kept._replace(least=least)


def _threshold(
    row: _Row,
    key: Weigh,
    weigh: Weigh,
    target: jax.Array,
    bounds: tuple[jax.Array, jax.Array],
    is_count: bool = False,
) -> jax.Array:
    """The greatest t within ``bounds`` whose sum(weigh[key >= t]) >= target, else the least.

    ``bounds``: ordered bits, both included; no key is beyond the second.
    ``is_count``: weights are 1, so that a sum that meets the target exactly ends the search: a
    greater t that does would keep the same.

    The sum reaches the target at ``low`` and not at ``high``.
    """
    ways = row.tuning.ways

    def is_open(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        low, high, mass = state
        found = high - low == 1  # may wrap, but never to 1
        return ~(found | (mass == target)) if is_count else ~found

    def narrow(state: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        low, high, mass = state
        width = lax.shift_right_logical(high - low, jnp.int32(ways.bit_length() - 1))
        width = jnp.maximum(width, 1)
        pivots = [low + i * width for i in range(1, ways)]

        def above(pivot: jax.Array) -> Weigh:
            return lambda x: jnp.where(key(x) >= _float_of(pivot), weigh(x), 0.0)

        nearest = high
        for pivot, found in zip(pivots, row.sums(*map(above, pivots)), strict=True):
            # the neighbours of low may lie beyond high, and of NaN sums nothing is sure
            is_reached = (found >= target) & (pivot < nearest)
            low, mass = jnp.where(is_reached, pivot, low), jnp.where(is_reached, found, mass)
            nearest = jnp.where(is_reached, nearest, jnp.minimum(nearest, pivot))
        return low, nearest, mass

    start = bounds[0], bounds[1] + 1, jnp.float32(jnp.nan)
    low, _, _ = lax.while_loop(is_open, narrow, start)
    return _float_of(low)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """i32 that order as the floats do: of a negative one all bits but the sign are flipped."""
    return _flip_negative(lax.bitcast_convert_type(x, jnp.int32))


def _float_of(ordered: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(_flip_negative(ordered), jnp.float32)


def _flip_negative(bits: jax.Array) -> jax.Array:
    sign = lax.shift_right_arithmetic(bits, jnp.int32(31))
    return bits ^ (sign & jnp.int32(0x7FFFFFFF))


def _locate(row: _Row, weigh: Weigh, point: jax.Array) -> jax.Array:
    """The smallest i with sum(w[:i + 1]) > point * sum(w); it has mass, whatever the rounding.

    Chunks are summed one after the other, twice in the same way, and point * total < total for
    every point < 1; inside a chunk a sum grows with every weight, and only there.
    """

    def through(i: jax.Array, before: jax.Array) -> jax.Array:
        return before + jnp.sum(weigh(row.chunk(i)[0]))

    total = lax.fori_loop(0, row.num_chunks, through, jnp.float32(0.0))
    wanted = point * total

    def is_short(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return ~(state[2] > wanted) & (state[0] < row.num_chunks - 1)

    def go_on(state: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        i, _, mass = state
        return i + 1, mass, through(i + 1, mass)

    start = jnp.int32(-1), jnp.float32(0.0), jnp.float32(0.0)
    i, before, _ = lax.while_loop(is_short, go_on, start)
    x, index = row.chunk(i)
    weights = weigh(x)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> Any:
        low, high = bounds
        middle = lax.shift_right_logical(low + high, jnp.int32(1))
        mass = before + jnp.sum(jnp.where(index <= middle, weights, 0.0))
        enough = mass > wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    first = i * row.tuning.chunk
    bounds = first, first + row.tuning.chunk - 1
    found = lax.fori_loop(0, row.tuning.chunk.bit_length() - 1, halve, bounds)[1]
    return jnp.minimum(found, row.size - 1)  # of NaN too, an index that exists


def _store_alternatives(
    raw: _Row, asked: _Asked, normaliser: jax.Array, tokens_ref: Any, logprobs_ref: Any
) -> None:
    """One after the other, each the greatest behind the one before."""
    most = tokens_ref.shape[1]
    places = jnp.arange(pl.next_power_of_2(most))

    def find(n: jax.Array, state: Any) -> Any:
        last, tokens, logprobs = state
        value, token = raw.greatest(after=last)
        tokens = jnp.where(places == n, token, tokens)
        return (value, token), tokens, jnp.where(places == n, value - normaliser, logprobs)

    start = (jnp.float32(jnp.inf), jnp.int32(-1)), places * 0, places * 0.0
    wanted = asked.num_alternatives.astype(jnp.int32)
    _, tokens, logprobs = lax.fori_loop(0, wanted, find, start)
    mask = places < most
    pltriton.store(tokens_ref.at[raw.row, places], tokens, mask=mask)
    pltriton.store(logprobs_ref.at[raw.row, places], logprobs, mask=mask)


def _if(predicate: jax.Array, compute: Callable[[], Any], otherwise: Any) -> Any:
    """lax.cond whose other branch is given; the Triton dialect lets no constant out of a branch."""
    given = jax.tree.map(lambda x: jnp.where(predicate, x, x), otherwise)
    return lax.cond(predicate, compute, lambda: given)


def _exp(x: jax.Array) -> jax.Array:
    return jnp.exp2(x * _LOG2_E)
