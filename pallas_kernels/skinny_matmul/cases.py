"""Named weights [K, N] that tests compile and benchmarks time. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ROWS = (1, 8, 32, 64, 128, 256)


class Weight(NamedTuple):
    k: int
    n: int


class Model(NamedTuple):
    """A layer's products and the head's; ``up``: up to the activation, gate and up if gated."""

    qkv: Weight
    out: Weight
    up: Weight
    down: Weight
    head: Weight  # stored [N, K]
    gated: bool  # SwiGLU and RMSNorm, else GELU and LayerNorm


MODELS: Mapping[str, Model] = {
    "llama-2-7b": Model(
        qkv=Weight(4096, 12288),
        out=Weight(4096, 4096),
        up=Weight(4096, 2 * 11008),
        down=Weight(11008, 4096),
        head=Weight(4096, 32000),
        gated=True,
    ),
    "mistral-7b": Model(
        qkv=Weight(4096, 6144),
        out=Weight(4096, 4096),
        up=Weight(4096, 2 * 14336),
        down=Weight(14336, 4096),
        head=Weight(4096, 32000),
        gated=True,
    ),
    "falcon-7b": Model(
        qkv=Weight(4544, 4672),
        out=Weight(4544, 4544),
        up=Weight(4544, 18176),
        down=Weight(18176, 4544),
        head=Weight(4544, 65024),
        gated=False,
    ),
}
