"""One contestant of ``python -m benchmarks training``, in a process of its own: jlorax or peft.

    python -m benchmarks.training_contestants NAME '{"folder": ..., "batch": 8, ...}'

Both train the same rows of random tokens: LoRA on all linear layers but the head, AdamW, gradients
clipped at 1, the loss on the last ``num_targets`` tokens of each row. One JSON line comes out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RANK, ALPHA, LEARNING_RATE = 16, 32.0, 1e-4

Step = Callable[[np.ndarray], float]
"""i32[B, T] -> the loss, after the update."""


@dataclass(frozen=True)
class Work:
    """What each contestant does: ``num_steps`` timed ones of [batch, length] tokens.

    ``dummy``: random weights of the folder's config.json. ``recompute``: gradient checkpointing.
    """

    folder: str
    dummy: bool
    dtype: str
    batch: int
    length: int
    num_targets: int
    num_steps: int
    recompute: bool
    threads: int

    def rows(self, step: int, vocab_size: int) -> np.ndarray:
        random = np.random.default_rng(step)
        return random.integers(3, vocab_size, (self.batch, self.length)).astype(np.int32)


def main() -> None:
    name, work = sys.argv[1], Work(**json.loads(sys.argv[2]))
    vocab_size = json.loads((Path(work.folder) / "config.json").read_text())["vocab_size"]
    begun_s = time.monotonic()
    step, peak_bytes = {"jlorax": _jlorax, "peft": _peft}[name](work)
    losses = [step(work.rows(0, vocab_size))]  # compiles, warms up
    ready_s = time.monotonic() - begun_s
    losses.append(step(work.rows(1, vocab_size)))
    seconds = []
    for number in range(work.num_steps):
        rows = work.rows(2 + number, vocab_size)
        start_s = time.monotonic()
        losses.append(step(rows))
        seconds.append(time.monotonic() - start_s)
    told = {"seconds": seconds, "ready_s": ready_s, "peak_bytes": peak_bytes(), "losses": losses}
    print(json.dumps(told), flush=True)


def _jlorax(work: Work) -> tuple[Step, Callable[[], int | None]]:
    import jax
    import jax.numpy as jnp

    from jlorax.models.config import read_config
    from jlorax.models.weights import dummy_model, load_model
    from jlorax.training.config import LoraConfig, OptimizerConfig
    from jlorax.training.frozen import Form, frozen_base
    from jlorax.training.lora import adapter_shape, initial_adapter
    from jlorax.training.losses import OBJECTIVES
    from jlorax.training.optimizer import make_optimizer
    from jlorax.training.preparation import adapter_config
    from jlorax.training.step import Forward, Rows, TrainState, make_step
    from pallas_kernels.paged_attention.whole import Kernels

    config = read_config(Path(work.folder))
    on_gpu = jax.default_backend() == "gpu"
    narrow: Form | None = None if on_gpu or work.dtype == "float32" else "bfloat16"
    dtype = "float32" if narrow else work.dtype
    model = (
        dummy_model(config, dtype) if work.dummy else load_model(Path(work.folder), config, dtype)
    )
    projections = config.projections()
    described, _ = adapter_config(LoraConfig(rank=RANK, alpha=ALPHA), "base", projections)
    shape = adapter_shape(described, projections)
    kernels: Kernels = "cudnn" if on_gpu and work.dtype == "bfloat16" else "xla"
    base = frozen_base(model, narrow)
    forward = Forward(base, shape, OBJECTIVES["sft"], work.recompute, kernels)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", warmup_ratio=0.0), 1000
    )
    adapter = initial_adapter(shape, 0)
    state = TrainState(adapter, optimizer.init(adapter), jnp.int32(0))
    compiled = jax.jit(make_step(forward, optimizer, 0), donate_argnums=0)
    size = work.batch, work.length
    segments = np.ones(size, np.int32)
    positions = np.broadcast_to(np.arange(work.length, dtype=np.int32), size)
    first = work.length - work.num_targets - 1
    places = np.flatnonzero((positions >= first) & (positions < work.length - 1)).astype(np.int32)

    def step(rows: np.ndarray) -> float:
        nonlocal state
        targets = rows[:, first + 1 :].reshape(-1)
        batch = Rows(*(jnp.asarray(x)[None] for x in (rows, segments, positions, places, targets)))
        state, result = compiled(state, base.leaves, batch)
        return float(result.loss)

    def peak_bytes() -> int | None:
        memory: dict[str, Any] | None = jax.devices()[0].memory_stats()
        return memory["peak_bytes_in_use"] if memory else None

    return step, peak_bytes


def _peft(work: Work) -> tuple[Step, Callable[[], int | None]]:
    import peft
    import torch
    import transformers

    torch.set_num_threads(work.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, work.dtype)
    if work.dummy:
        config = transformers.AutoConfig.from_pretrained(work.folder)
        with torch.device(device):
            base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(work.folder, dtype=dtype)
    base = base.to(device)
    if work.recompute:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

    def step(rows: np.ndarray) -> float:
        ids = torch.tensor(rows, dtype=torch.long, device=device)
        labels = ids.clone()
        labels[:, : work.length - work.num_targets] = -100
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def peak_bytes() -> int | None:
        return torch.cuda.max_memory_allocated() if device == "cuda" else None

    return step, peak_bytes


if __name__ == "__main__":
    main()
