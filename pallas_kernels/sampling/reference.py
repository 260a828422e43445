"""Sampling with sorts, a row at a time, in numpy and f64: slow and obvious."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Row = Mapping[str, float]  # the fields of RowParameters, of one row


def sample(logits: np.ndarray, warm: np.ndarray, row: Row) -> tuple[int, float]:
    """(token, raw log-probability) of one row: logits and warm are f32[V]."""
    if row["is_greedy"]:
        token = int(np.argmax(warm))
    else:
        cumulative = np.cumsum(filtered(warm, row))
        token = int(np.argmax(cumulative > row["points"] * cumulative[-1]))
    return token, float(logprobs(logits)[token])


def alternatives(logits: np.ndarray, count: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` most probable tokens and their log-probabilities, then zeros: [most] both."""
    best = np.argsort(-logits, kind="stable")[:count]
    space = (0, most - count)
    return np.pad(best, space), np.pad(logprobs(logits)[best], space)


def logprobs(logits: np.ndarray) -> np.ndarray:
    """log softmax."""
    wide = logits.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def filtered(warm: np.ndarray, row: Row) -> np.ndarray:
    """f64[V]: the distribution that the filters leave."""
    kept = np.ones(warm.shape, bool)
    if row["top_k"] > 0:
        kept &= warm >= np.sort(warm)[::-1][int(min(row["top_k"], warm.size)) - 1]
    if row["top_p"] < 1:
        kept &= _nearest(-warm, _probabilities(warm, kept), row["top_p"])
    if row["min_p"] > 0:
        kept &= warm >= np.float32(warm.max() + np.log(np.float32(row["min_p"])))
    if row["typical_p"] < 1:
        p = _probabilities(warm, kept)
        surprise = -np.log(np.where(p > 0, p, 1.0))
        distance = np.where(p > 0, np.abs(surprise - (p * surprise).sum()), np.inf)
        kept &= _nearest(distance, p, row["typical_p"])
    return _probabilities(warm, kept)


def _probabilities(warm: np.ndarray, kept: np.ndarray) -> np.ndarray:
    weights = np.where(kept, np.exp(warm.astype(np.float64) - warm.max()), 0.0)
    return weights / weights.sum()


def _nearest(distances: np.ndarray, p: np.ndarray, target: float) -> np.ndarray:
    """bool[V]: those of the least distances whose mass reaches the target; equals go together."""
    order = np.argsort(distances, kind="stable")
    reached = np.cumsum(p[order]) >= target
    last = order[np.argmax(reached)] if reached.any() else order[-1]
    return distances <= distances[last]
