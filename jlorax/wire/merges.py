"""Which adapter a request runs with, how strongly, or which several merged into one.

LoRAX's object, for both route families: ``merged_adapters: {ids, weights, merge_strategy, density,
majority_sign_method}``, and beyond it ``rank`` (for "svd") and ``seed`` (for "dare_...").
Decisions: absent weights are 1 each; "ties" and "dare_..." need a density above 0 (with LoRAX's
default of 0 they keep nothing). lorax-client cannot leave the density out, so for strategies that
read none it may be anything from 0 to 1, and is not kept: equal merges are equal.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import TypeVar

from jlorax.types import (
    MAX_MERGED_ADAPTERS,
    AdapterMerge,
    GenerateRequest,
    MajoritySign,
    MergeStrategy,
)
from jlorax.wire.call import BASE_NAMES, Limits, parse_adapter_source
from jlorax.wire.fields import Fields, checked_adapter_id
from jlorax.wire.strict_json import kind_of

MAX_MERGE_WEIGHT = 100.0
MAX_MERGED_RANK = 256
MAX_MERGE_SEED = 2**32 - 1
MAX_ADAPTER_SCALE = 100.0

_DARE = (MergeStrategy.DARE_LINEAR, MergeStrategy.DARE_TIES)
_ELECTING = (MergeStrategy.TIES, MergeStrategy.DARE_TIES)
_SPARSE = (*_DARE, MergeStrategy.TIES)
E = TypeVar("E", bound=Enum)


def with_adapter(
    request: GenerateRequest, fields: Fields, adapter_id: str | None, limits: Limits
) -> GenerateRequest:
    """The request, to run with ``adapter_id`` (None: the base model) or else what the fields
    ``merged_adapters``, ``adapter_source`` and ``adapter_scale`` say."""
    merge = parse_merge(fields, adapter_id, limits)
    adapter = adapter_id if merge is None else merge
    return replace(
        request,
        adapter_id=adapter_id,
        merge=merge,
        adapter_source=parse_adapter_source(fields, adapter),
        adapter_scale=_parse_scale(fields, adapter),
    )


def parse_merge(fields: Fields, adapter_id: str | None, limits: Limits) -> AdapterMerge | None:
    """``merged_adapters``, which excludes an adapter of another field."""
    given = fields.mapping("merged_adapters")
    if given is None:
        return None
    if adapter_id is not None:
        raise fields.wrong(
            "merged_adapters",
            "excludes an adapter id: at most one of `adapter_id` or `adapters` may be provided. "
            f"Given: {adapter_id!r} and a merge",
        )
    merge = Fields(given, prefix="merged_adapters.")
    adapter_ids = _parse_ids(merge, limits)
    strategy = _one_of(merge, "merge_strategy", MergeStrategy.LINEAR)
    sign = _one_of(merge, "majority_sign_method", MajoritySign.TOTAL)
    parsed = AdapterMerge(
        adapter_ids,
        _parse_weights(merge, len(adapter_ids)),
        strategy,
        density=_parse_density(merge, strategy),
        majority_sign=sign if strategy in _ELECTING else MajoritySign.TOTAL,
        rank=_only_for(merge, "rank", strategy, (MergeStrategy.SVD,), 1, MAX_MERGED_RANK),
        seed=_only_for(merge, "seed", strategy, _DARE, 0, MAX_MERGE_SEED) or 0,
    )
    if merge.unknown():
        raise merge.wrong(merge.unknown()[0][:64], "is no field of a merge")
    return parsed


def _parse_ids(merge: Fields, limits: Limits) -> tuple[str, ...]:
    ids = merge.items("ids")
    if not ids:
        raise merge.wrong("ids", "must hold at least one adapter id")
    if len(ids) > MAX_MERGED_ADAPTERS:
        raise merge.wrong("ids", f"may hold at most {MAX_MERGED_ADAPTERS} ids, not {len(ids)}")
    for adapter_id in ids:
        if not isinstance(adapter_id, str):
            raise merge.wrong("ids", f"must hold strings, not {kind_of(adapter_id)}")
        if adapter_id in BASE_NAMES or adapter_id == limits.model_id:
            raise merge.wrong("ids", f"holds {adapter_id!r}: the base model cannot be merged")
    return tuple(checked_adapter_id(adapter_id) for adapter_id in ids)


def _parse_weights(merge: Fields, num_ids: int) -> tuple[float, ...]:
    weights = merge.items("weights") or [1.0] * num_ids
    if len(weights) != num_ids:
        raise merge.wrong(
            "weights",
            "are wrong: number of adapter IDs must match number of adapter weights. "
            f"Given: {num_ids} ids and {len(weights)} weights",
        )
    each = Fields({str(place): weight for place, weight in enumerate(weights)}, "weights at ")
    found = (
        each.number(str(place), -MAX_MERGE_WEIGHT, MAX_MERGE_WEIGHT) for place in range(num_ids)
    )
    if any(weight is None for weight in weights):
        raise merge.wrong("weights", "must hold numbers, not null")
    return tuple(weight for weight in found if weight is not None)


def _parse_density(merge: Fields, strategy: MergeStrategy) -> float:
    density = merge.number("density", 0.0, 1.0)
    if strategy not in _SPARSE:
        return 1.0
    if not density:
        raise merge.wrong(
            "density",
            f"must be > 0 and <= 1 for {strategy.value!r}: the share of values that it keeps. "
            f"Given: {density}",
        )
    return density


def _only_for(
    merge: Fields,
    name: str,
    strategy: MergeStrategy,
    readers: tuple[MergeStrategy, ...],
    low: int,
    high: int,
) -> int | None:
    value = merge.integer(name, low, high)
    if value is not None and strategy not in readers:
        words = " or ".join(repr(reader.value) for reader in readers)
        raise merge.wrong(name, f"is for merge_strategy {words}, not {strategy.value!r}")
    return value


def _one_of(merge: Fields, name: str, default: E) -> E:
    word = merge.text(name, max_chars=64)
    if word is None:
        return default
    known = {member.value: member for member in type(default)}
    if word.lower() not in known:
        raise merge.wrong(name, f"must be one of {', '.join(known)}. Given: {word!r}")
    return known[word.lower()]


def _parse_scale(fields: Fields, adapter: str | AdapterMerge | None) -> float:
    scale = fields.number("adapter_scale", -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)
    if scale is None:
        return 1.0
    if adapter is None and scale != 1.0:
        raise fields.wrong("adapter_scale", f"is {scale}, but the request names no adapter")
    return scale
