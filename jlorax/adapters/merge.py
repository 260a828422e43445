"""Several LoRAs as one, as PEFT's ``add_weighted_adapter`` defines it. numpy, in float32.

A module's delta is scaling * B @ A. With f = weight * scaling of each part that adapts the module:
    linear       A = sum sign(f) sqrt|f| A_i          B = sum sqrt|f| B_i
    ties         the same of each matrix's largest values, where the parts' signs are elected and
                 those that agree are averaged (https://arxiv.org/abs/2306.01708)
    dare_...     linear or ties of randomly kept values, divided by the density
                 (https://arxiv.org/abs/2311.03099)
    cat          A = [f A_1; f A_2; ...]              B = [B_1, B_2, ...]: the exact weighted sum
    svd          the nearest of a given rank to that sum
and the result's scaling is 1. What follows from this definition, and is PEFT's: a part without
weights in a module has no say there; a part alone is only scaled, whatever the strategy; a negative
weight turns its part round; an adapter may be named twice.

What PEFT 0.21 does and this does not: a first part with rsLoRA multiplies the result by sqrt(rank)
(a fault, https://github.com/huggingface/peft/issues/3761), and what the first part's
layers_to_transform and exclude_modules leave out is dropped from the others without a word.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from jlorax.adapters.peft import Adapter, AdapterConfig, LayerWeights, all_finite
from jlorax.errors import AdapterInvalid, InvalidParameter, InvalidRequest
from jlorax.types import (
    MAX_MERGED_ADAPTERS,
    AdapterMerge,
    GenerateRequest,
    MajoritySign,
    MergeStrategy,
)

_FORMAT = 1  # raised when equal merges come to give other values, so that no kept one is used
_MAX_NAMED = 4  # adapters shown in one message
_MAX_F32 = float(np.finfo(np.float32).max)

_DARE = (MergeStrategy.DARE_LINEAR, MergeStrategy.DARE_TIES)
_ELECTING = (MergeStrategy.TIES, MergeStrategy.DARE_TIES)
_OF_ANY_RANKS = (MergeStrategy.CAT, MergeStrategy.SVD)

Masks = Callable[[tuple[int, ...], float], np.ndarray]
"""(shape, density) -> bool[shape]: the next mask, each value kept with that probability."""


# ---- what is asked for


def merge_of(request: GenerateRequest) -> AdapterMerge | None:
    """The merge that answers the request, checked. None: one adapter as it is, or the base model.

    A scale is a merge of one; of a merge it multiplies the weights, which every strategy's delta is
    proportional to. Raises InvalidRequest.
    """
    merge, scale = request.merge, request.adapter_scale
    if not math.isfinite(scale):
        raise InvalidParameter("adapter_scale", f"must be a finite number, not {scale}")
    if merge is not None:
        if request.adapter_id is not None:
            raise InvalidRequest(
                f"the request names the adapter {request.adapter_id!r} and a merge: only one of "
                "them can answer it"
            )
        check_merge(merge)
        return replace(merge, weights=tuple(weight * scale for weight in merge.weights))
    if scale == 1.0:
        return None
    if request.adapter_id is None:
        raise InvalidParameter("adapter_scale", f"is {scale}, but the request names no adapter")
    return AdapterMerge((request.adapter_id,), (scale,), MergeStrategy.CAT)


def check_merge(merge: AdapterMerge) -> None:
    """Raises InvalidParameter for what no adapters can make right."""
    num_parts = len(merge.adapter_ids)
    if not 1 <= num_parts <= MAX_MERGED_ADAPTERS:
        raise _wrong("adapter_ids", f"must be 1 to {MAX_MERGED_ADAPTERS}, not {num_parts}")
    if len(merge.weights) != num_parts:
        raise _wrong("weights", f"must be {num_parts}, one an adapter, not {len(merge.weights)}")
    if wrong := [weight for weight in merge.weights if not math.isfinite(weight)]:
        raise _wrong("weights", f"must be finite numbers, not {wrong[0]}")
    if not isinstance(merge.strategy, MergeStrategy):
        raise _wrong("strategy", f"must be a MergeStrategy, not {merge.strategy!r}")
    if not isinstance(merge.majority_sign, MajoritySign):
        raise _wrong("majority_sign", f"must be a MajoritySign, not {merge.majority_sign!r}")
    if not 0 < merge.density <= 1:
        raise _wrong("density", f"must be above 0 and at most 1, not {merge.density}")
    if merge.rank is not None and merge.rank < 1:
        raise _wrong("rank", f"must be at least 1, not {merge.rank}")
    if merge.seed < 0:
        raise _wrong("seed", f"must be at least 0, not {merge.seed}")


def merge_name(merge: AdapterMerge, contents: Sequence[str]) -> str:
    """Equal for two merges exactly when they say the same of the same contents, whatever those are
    called. No adapter's id can be one: it has a colon.

    ``contents``: what tells each part's content from any other's.
    """
    said = [
        _FORMAT,
        list(contents),
        [float(weight) for weight in merge.weights],
        merge.strategy.value,
        float(merge.density),
        merge.majority_sign.value,
        merge.rank,
        merge.seed,
    ]
    return f"merge:{hashlib.sha256(json.dumps(said).encode()).hexdigest()}"


def merged_config(
    merge: AdapterMerge, parts: Sequence[AdapterConfig], max_rank: int
) -> AdapterConfig:
    """What the merge will say of itself, from what its parts do. AdapterInvalid names the ranks
    that cannot be merged so, or add up to more than ``max_rank``."""
    first = parts[0]
    if len(parts) == 1:
        return _scaled_config(first, merge.weights[0])
    rank = _merged_rank(merge, [part.max_rank for part in parts], max_rank)
    targets = {name for part in parts for name in part.target_names}
    return replace(
        first,
        r=rank,
        alpha=float(rank),
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=tuple(sorted(targets)),
        exclude_modules=(),
        layers_to_transform=(),
        layers_pattern=(),
    )


# ---- the values


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """The same adapter, ``factor`` times as strong: its matrices are not touched."""
    weights = {
        name: {
            layer: replace(w, scaling=_as_f32(float(w.scaling) * factor, adapter.adapter_id))
            for layer, w in layers.items()
        }
        for name, layers in adapter.weights.items()
    }
    return Adapter(adapter.adapter_id, _scaled_config(adapter.config, factor), weights)


def seeded_masks(seed: int) -> Masks:
    random = np.random.default_rng(seed)
    return lambda shape, density: random.random(shape, np.float32) < density


def merge_adapters(
    parts: Sequence[Adapter], merge: AdapterMerge, max_rank: int, masks: Masks | None = None
) -> Adapter:
    """The parts, all read for one base model and in the merge's order, as one adapter in float32.

    ``masks``: DARE's, by default of the merge's seed; taken part by part for A, then for B, one
    module after the other. AdapterInvalid where the parts' ranks or weights do not allow it.
    """
    config = merged_config(merge, [part.config for part in parts], max_rank)
    if len(parts) == 1:
        return scaled(parts[0], merge.weights[0])
    masks = masks or seeded_masks(merge.seed)
    weights: dict[str, dict[int, LayerWeights]] = {}
    for name, layer in _modules(parts):
        said = [
            (part.weights[name][layer], weight)
            for part, weight in zip(parts, merge.weights, strict=True)
            if layer in part.weights.get(name, ())
        ]
        merged = _merge_module(merge, said, config.r, masks, f"layer {layer} of {name}")
        weights.setdefault(name, {})[layer] = merged
    return Adapter(shown(merge), config, weights)


def shown(merge: AdapterMerge) -> str:
    """For messages."""
    names = [name if len(name) <= 80 else f"{name[:77]}..." for name in merge.adapter_ids]
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return " + ".join(names[:_MAX_NAMED]) + more


def _modules(parts: Sequence[Adapter]) -> list[tuple[str, int]]:
    """(projection, layer) of every module that some part adapts."""
    names = dict.fromkeys(name for part in parts for name in part.weights)
    return [
        (name, layer)
        for name in names
        for layer in sorted({n for part in parts for n in part.weights.get(name, ())})
    ]


def _merge_module(
    merge: AdapterMerge,
    said: Sequence[tuple[LayerWeights, float]],
    rank: int,
    masks: Masks,
    where: str,
) -> LayerWeights:
    """``said``: (weights, weight) of each part that adapts the module."""
    factors = [float(_as_f32(w * float(part.scaling), shown(merge))) for part, w in said]
    a = [part.a.astype(np.float32) for part, _ in said]
    b = [part.b.astype(np.float32) for part, _ in said]
    with np.errstate(over="ignore", invalid="ignore"):  # found below
        if merge.strategy in _OF_ANY_RANKS:
            merged = _concatenated(a, b, factors)
            if merge.strategy is MergeStrategy.SVD and all(map(all_finite, merged)):
                merged = _nearest(*merged, rank)
        else:
            _check_equal_ranks(merge, [part.rank for part, _ in said], f" in {where}")
            roots = np.sqrt(np.abs(factors))
            merged = (
                _joined(a, np.copysign(roots, factors), merge, masks),
                _joined(b, roots, merge, masks),
            )
    if not all(map(all_finite, merged)):
        raise _invalid(merge, f"the values of {where} are too large for float32")
    return LayerWeights(*merged, np.float32(1.0))


def _concatenated(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], factors: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) with B @ A = sum f B_i A_i. Their rank is the sum of the ranks.

    a: f32[r_i, d_in] each   b: f32[d_out, r_i] each
    """
    strong = [np.float32(f) * part for f, part in zip(factors, a, strict=True)]
    return np.concatenate(strong), np.concatenate(b, axis=1)


def _nearest(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(V^T, U S) of the first ``rank`` singular values of b @ a.

    a: f32[R, d_in]   b: f32[d_out, R]
    The product is never made: of b = Q_b R_b and a^T = Q_a R_a only R_b R_a^T is decomposed, which
    has at most R rows and columns.
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    near_b = q_b @ (u[:, :rank] * s[:rank])
    near_a = vt[:rank] @ q_a.T
    return near_a.astype(np.float32), near_b.astype(np.float32)


def _joined(
    matrices: Sequence[np.ndarray], factors: np.ndarray, merge: AdapterMerge, masks: Masks
) -> np.ndarray:
    """sum f M_i of the values that are kept; with elections, the mean of those that agree.

    matrices: f32[m, n] each   factors: f64[parts]
    """
    kept = np.stack([_thinned(matrix, merge, masks) for matrix in matrices])
    strong = kept * factors.astype(np.float32)[:, None, None]
    if merge.strategy not in _ELECTING:
        return np.asarray(strong.sum(axis=0))
    agrees = _agrees(kept, merge.majority_sign)
    num_agreeing = np.maximum(agrees.sum(axis=0), 1).astype(np.float32)
    return np.asarray((strong * agrees).sum(axis=0) / num_agreeing)


def _agrees(kept: np.ndarray, by: MajoritySign) -> np.ndarray:
    """Which values have the sign that most have, before any weight; a tie is positive, and zero
    agrees with nobody. kept: f32[parts, m, n] -> bool[parts, m, n]"""
    signs = np.sign(kept)
    votes = kept if by is MajoritySign.TOTAL else signs
    return np.asarray(signs == np.where(votes.sum(axis=0) >= 0, 1, -1))


def _thinned(matrix: np.ndarray, merge: AdapterMerge, masks: Masks) -> np.ndarray:
    if merge.strategy is MergeStrategy.TIES:
        return _largest(matrix, merge.density)
    if merge.strategy in _DARE:
        return np.asarray(matrix * masks(matrix.shape, merge.density) / np.float32(merge.density))
    return matrix


def _largest(matrix: np.ndarray, density: float) -> np.ndarray:
    """The rest is zero. Of equal ones at the border the first are kept."""
    count = int(density * matrix.size)
    if not count:
        return np.zeros_like(matrix)
    sizes = np.abs(matrix).reshape(-1)
    least = np.partition(sizes, -count)[-count]
    is_kept = sizes > least
    border = np.flatnonzero(sizes == least)
    is_kept[border[: count - np.count_nonzero(is_kept)]] = True
    return np.asarray(matrix * is_kept.reshape(matrix.shape))


# ---- ranks and scalings


def _merged_rank(merge: AdapterMerge, ranks: Sequence[int], max_rank: int) -> int:
    if merge.strategy is MergeStrategy.CAT:
        rank, hint = sum(ranks), "; svd can give a smaller one"
    elif merge.strategy is MergeStrategy.SVD:
        rank, hint = min(merge.rank or max(ranks), sum(ranks)), ""
    else:
        _check_equal_ranks(merge, ranks)
        rank, hint = ranks[0], ""
    if rank > max_rank:
        raise _invalid(
            merge,
            f"{merge.strategy.value} of the ranks {_listed(ranks)} gives rank {rank}, above the "
            f"limit of {max_rank}{hint}",
        )
    return rank


def _check_equal_ranks(merge: AdapterMerge, ranks: Sequence[int], where: str = "") -> None:
    if len(set(ranks)) > 1:
        others = " and ".join(strategy.value for strategy in _OF_ANY_RANKS)
        raise _invalid(
            merge,
            f"{merge.strategy.value} needs adapters of equal rank, but{where} they have "
            f"{_listed(ranks)}; {others} take unequal ones",
        )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _scaled_config(config: AdapterConfig, factor: float) -> AdapterConfig:
    alphas = {pattern: alpha * factor for pattern, alpha in config.alpha_pattern.items()}
    return replace(config, alpha=config.alpha * factor, alpha_pattern=alphas)


def _as_f32(scaling: float, adapter_id: str) -> np.float32:
    if not abs(scaling) <= _MAX_F32:
        raise AdapterInvalid(adapter_id, "scaling", f"{scaling:g} is too large for float32")
    return np.float32(scaling)


def _invalid(merge: AdapterMerge, reason: str) -> AdapterInvalid:
    return AdapterInvalid(shown(merge), "merge", reason)


def _wrong(name: str, message: str) -> InvalidParameter:
    return InvalidParameter(f"merge.{name}", message)
