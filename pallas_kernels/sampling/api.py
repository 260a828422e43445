"""The next token of every row, each row by its own filters; nothing is sorted.

    kept   = typical-p(min-p(top-p(top-k(warm))))      each filter of what the ones before it kept
    token  = the smallest i with sum(p[:i + 1]) > point * sum(p),  p = exp(warm) where kept, else 0;
             in a greedy row the first index of warm's maximum
    logprob, alternatives: of the softmax of ``logits``

    top-k      the k greatest                                     (and all equal to the last one)
    top-p      the most probable whose mass reaches p             Holtzman et al. 2019
    min-p      tokens at least p times as probable as the best    Nguyen et al. 2024, 2407.01082
    typical-p  the nearest to the entropy whose mass reaches p    Meister et al. 2022, 2202.00666

    logits: f32[B, V], as the model gives them
    warm: f32[B, V], penalised and divided by the temperature; of a greedy row penalised

Every filter is a threshold on a key, found by search over the bits of a float; keys equal to it are
kept. A row's token depends on its own operands alone: not on its place, its neighbours, or B.

"xla" searches for all rows together, a filter after the other, and asks the host which of them
anybody wants; "pallas" does all that a row wants in one program; "pallas_interpret" runs the same
kernel on a CPU.
"""

from __future__ import annotations

from typing import Literal

import jax

from pallas_kernels.sampling import pallas_triton, tuning, xla
from pallas_kernels.sampling.operands import RowParameters, Sampled

__all__ = ["Implementation", "RowParameters", "Sampled", "sample"]

Implementation = Literal["xla", "pallas", "pallas_interpret"]


def sample(
    logits: jax.Array,
    warm: jax.Array,
    parameters: RowParameters,
    *,
    max_alternatives: int,
    implementation: Implementation,
) -> Sampled:
    """Chooses a token for each row; A = ``max_alternatives``."""
    if implementation == "xla":
        return xla.sample(logits, warm, parameters, max_alternatives)
    return pallas_triton.sample(
        logits,
        warm,
        parameters,
        max_alternatives,
        tuning.choose(jax.devices()[0].device_kind, logits.shape[1]),
        interpret=implementation == "pallas_interpret",
    )
