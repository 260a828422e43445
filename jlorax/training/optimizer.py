"""AdamW with a schedule, clipping, and LoRA+'s ratio of learning rates: optax throughout."""

from __future__ import annotations

import math

import optax

from jlorax.training.config import OptimizerConfig
from jlorax.training.lora import Adapter, LoraWeights


def learning_rates(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Of each step: a linear warm-up, whose first step learns too, then as ``schedule`` says, to 0
    after the last step."""
    warmup = math.ceil(config.warmup_ratio * num_steps)
    rest = max(1, num_steps - warmup)
    peak = config.learning_rate
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Loshchilov and Hutter 2019, arXiv:1711.05101; clipped by the norm of all gradients."""
    adamw = optax.adamw(
        learning_rates(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    return optax.chain(clip, adamw, _favour_b(config.lora_plus_ratio))


def _favour_b(ratio: float) -> optax.GradientTransformation:
    """B learns ``ratio`` times as fast as A. LoRA+: Hayou et al. 2024, arXiv:2402.12354."""
    if ratio == 1.0:
        return optax.identity()

    def scaled(updates: Adapter) -> Adapter:
        return {module: LoraWeights(u.a, u.b * ratio) for module, u in updates.items()}

    return optax.stateless(lambda updates, _: scaled(updates))
