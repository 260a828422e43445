"""What others reach on an H100, and what we mean to: data, by the names of decode's cases.

vLLM 0.22.0 (torch 2.11, FlashAttention 3, CUDA graphs), offline ``LLM.generate``, measured on one
NVIDIA H100 80GB HBM3 (driver 580.159, CUDA 13) on 2026-11-23. Llama-2-7B's shape, random bf16
weights, greedy, end of sequence ignored, prompts of random tokens, no prefix cache; max_num_seqs
256, max_num_batched_tokens 8192; adapters of rank 16 on q, k, v, o with max_loras 64. "base" is
vLLM started without LoRA. Targets and goals: those of the GPU hot path's issue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHAPE, RANK, TARGETS = "llama-2-7b", 16, ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Peer:
    """In the case's own unit: ms a step, s (prefill) or output tokens/s (closed load)."""

    vllm: float | None = None
    target: float | None = None
    goal: float | None = None
    vllm_tokens_per_s: float | None = None


PEERS: Mapping[str, Peer] = {
    "decode B=1 base": Peer(6.04, 5.1, 4.8, 165),
    "decode B=8 base": Peer(6.50, 5.5, 5.2, 1_217),
    "decode B=32 base": Peer(7.86, 6.8, 6.4, 3_912),
    "decode B=64 base": Peer(9.48, 8.7, 8.1, 6_309),
    "decode B=128 base": Peer(12.97, 12.0, 11.2, 8_923),
    "decode B=256 base": Peer(20.78, 18.8, 17.6, 10_907),
    "decode B=1 one": Peer(8.60, 5.3, None, 116),
    "decode B=8 one": Peer(8.91, 5.7, None, 884),
    "decode B=32 one": Peer(10.43, 7.0, None, 2_897),
    "decode B=64 one": Peer(12.89, 9.0, None, 4_536),
    "decode B=128 one": Peer(17.57, 12.4, None, 6_392),
    "decode B=256 one": Peer(27.21, 19.3, None, 7_988),
    "decode B=1 distinct": Peer(8.60, 5.4, 4.9, 116),
    "decode B=8 distinct": Peer(11.13, 5.9, 5.4, 705),
    "decode B=32 distinct": Peer(20.61, 7.4, 6.8, 1_508),
    "decode B=64 distinct": Peer(34.06, 9.6, 8.8, 1_809),
    "decode B=128 distinct": Peer(32.93, 13.0, 12.0, 3_589),
    "decode B=256 distinct": Peer(43.30, 19.9, 18.5, 5_244),
    "long B=64 base": Peer(18.6, vllm_tokens_per_s=2_165),
    "long B=64 distinct": Peer(44.5, vllm_tokens_per_s=999),
    "prefill 64x128 base": Peer(0.180, 0.17),
    "prefill 64x128 one": Peer(0.327),
    "prefill 64x128 distinct": Peer(0.373, 0.19),
    "prefill 64x1024 base": Peer(1.42, 1.40),
    "prefill 64x1024 distinct": Peer(2.55, 1.55),
    "closed base": Peer(7_435, 8_000),
    "closed one": Peer(5_182, 7_700),
    "closed zipf": Peer(4_048, 7_400),
}
SAMPLING_OVER_GREEDY = 1.06  # temperature 0.8, top-p 0.95: at most this much longer a step
