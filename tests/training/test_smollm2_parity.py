"""A training of SmolLM2 beside the same one by transformers and peft: same data, order, start."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from jlorax.models.embedded import ensure_embedded_model  # noqa: E402
from jlorax.training.batches import Batch, Batches  # noqa: E402
from jlorax.training.config import DataConfig, LoraConfig, RunConfig, TrainConfig  # noqa: E402
from jlorax.training.events import Ended, Evaluated, Event, StepDone  # noqa: E402
from jlorax.training.export import merge_into_base  # noqa: E402
from jlorax.training.lora import initial_adapter  # noqa: E402
from jlorax.training.preparation import Prepared, prepare  # noqa: E402
from jlorax.training.trainer import Trainer  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CACHE = Path(os.environ.get("JLORAX_CACHE_DIR", "~/.cache/jlorax")).expanduser()
LOSS_TOLERANCE = 0.02
LOGITS_TOLERANCE = 1e-4  # of the largest logit
NAMES = ("Anna", "Omar", "Mei", "Jonas", "Lucia", "Ravi")
CITIES = ("Lisbon", "Oslo", "Lima", "Kyoto", "Cairo")


def write_data(path: Path) -> None:
    drawn = random.Random(3)
    with path.open("w") as file:
        for _ in range(72):
            name, city, age = drawn.choice(NAMES), drawn.choice(CITIES), drawn.randint(18, 80)
            prompt = f"I am {name}, {age} years old, and I live in {city}."
            completion = json.dumps({"name": name, "age": age, "city": city})
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("parity")
    write_data(home / "data.jsonl")
    return home


@pytest.fixture(scope="module")
def prepared(home: Path) -> Prepared:
    config = TrainConfig(
        data=DataConfig(str(home / "data.jsonl"), max_seq_len=128, packing=False),
        lora=LoraConfig(rank=8),
        run=RunConfig(name="people", output_root=str(home / "root"), epochs=2, batch_size=4),
    )
    return prepare(config, CACHE)


@pytest.fixture(scope="module")
def events(prepared: Prepared) -> list[Event]:
    events: list[Event] = []
    Trainer(prepared, events.append).run()
    return events


def their_model(prepared: Prepared) -> Any:
    """With our start."""
    base = transformers.AutoModelForCausalLM.from_pretrained(ensure_embedded_model(CACHE))
    lora = prepared.config.lora
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.effective_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    start = initial_adapter(prepared.shape, prepared.config.run.seed)
    with torch.no_grad():
        for module, weights in start.items():
            name = f"base_model.model.{module}.lora_A.default.weight"
            model.get_parameter(name).copy_(torch.tensor(np.asarray(weights.a)))
    return model


def their_loss(model: Any, batch: Batch) -> tuple[Any, int]:
    """Sum over the targets, and how many there are; a row is one sequence."""
    logits = model(
        input_ids=torch.tensor(batch.tokens, dtype=torch.long),
        attention_mask=torch.tensor(batch.segments, dtype=torch.long),
    ).logits
    rows, columns = np.nonzero(batch.targets >= 0)
    wanted = torch.tensor(batch.targets[rows, columns], dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(logits[rows, columns], wanted, reduction="sum")
    return loss, len(rows)


def their_rate(step: int, num_steps: int, config: Any) -> float:
    """A linear warm-up, whose first step learns, and a cosine."""
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return float(config.learning_rate * (step + 1) / warmup)
    done = (step - warmup) / (num_steps - warmup)
    return float(config.learning_rate * (1 + math.cos(math.pi * done)) / 2)


def their_training(prepared: Prepared) -> tuple[list[float], float]:
    """Each step's loss, and the validation's at the end."""
    model, config = their_model(prepared), prepared.config.optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, eps=config.eps)
    losses: list[float] = []
    for epoch in range(prepared.config.run.epochs):
        for batch in prepared.batches.epoch(epoch):
            optimizer.param_groups[0]["lr"] = their_rate(len(losses), prepared.num_steps, config)
            total, num = their_loss(model, batch)
            (total / num).backward()
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total.detach()) / num)
    return losses, evaluate(model, prepared.validation)


@torch.inference_mode()
def evaluate(model: Any, batches: Batches | None) -> float:
    assert batches is not None
    sums = [their_loss(model, batch) for batch in batches.epoch(0)]
    return float(sum(total for total, _ in sums)) / sum(num for _, num in sums)


def test_the_losses_are_peft_s(prepared: Prepared, events: list[Event]) -> None:
    ours = [event.loss for event in events if isinstance(event, StepDone)]
    theirs, their_end = their_training(prepared)
    our_end = [event.loss for event in events if isinstance(event, Evaluated)][-1]
    print(f"validation loss: ours {our_end:.4f}, peft's {their_end:.4f}")
    assert our_end == pytest.approx(their_end, rel=LOSS_TOLERANCE)
    assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE)
    assert our_end < 0.5 * ours[0]


def test_peft_loads_what_was_made(prepared: Prepared, events: list[Event], home: Path) -> None:
    ended = events[-1]
    assert isinstance(ended, Ended)
    base = transformers.AutoModelForCausalLM.from_pretrained(ensure_embedded_model(CACHE))
    model = peft.PeftModel.from_pretrained(base, ended.folder)
    assert evaluate(model, prepared.validation) == pytest.approx(
        [event.loss for event in events if isinstance(event, Evaluated)][-1], rel=1e-4
    )
    merge_into_base(ensure_embedded_model(CACHE), Path(ended.folder), home / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(home / "merged")
    ids = torch.tensor(prepared.data.validation[0].ids[None], dtype=torch.long)
    with torch.inference_mode():
        theirs, whole = model(input_ids=ids).logits, merged(input_ids=ids).logits
    ours = our_logits(prepared, ended.folder, ids.numpy())
    largest = float(theirs.abs().max())
    assert np.abs(ours - theirs[0].numpy()).max() <= LOGITS_TOLERANCE * largest
    assert float((whole - theirs).abs().max()) <= LOGITS_TOLERANCE * largest


def our_logits(prepared: Prepared, folder: str, ids: np.ndarray) -> np.ndarray:
    """Of the published files, through the training's own forward pass: f32[T, V]."""
    from safetensors.numpy import load_file

    from jlorax.models.layers import TokenBatch
    from jlorax.training.lora import LoraWeights, TrainedLora
    from pallas_kernels.paged_attention.api import Places, Whole

    read = load_file(Path(folder) / "adapter_model.safetensors")
    adapter = {
        module: LoraWeights(
            jnp.asarray(read[f"base_model.model.{module}.lora_A.weight"]),
            jnp.asarray(read[f"base_model.model.{module}.lora_B.weight"].T),
        )
        for module in prepared.shape.ranks
    }
    num = ids.shape[1]
    positions = jnp.arange(num, dtype=jnp.int32)

    def logits(adapter: Any, leaves: Any) -> jax.Array:
        module, _ = prepared.forward.base.merge(leaves)
        lora = TrainedLora(prepared.shape, adapter)
        nowhere = jnp.zeros((num,), jnp.int32)
        queries = Whole(jnp.ones((1, num), jnp.int32), positions[None])
        batch = TokenBatch(
            jnp.asarray(ids[0]), positions, jnp.full((num,), num), Places(nowhere, nowhere), queries
        )
        hidden, _ = module(batch, [jnp.zeros((0,))] * len(module.blocks), lora)
        return module.logits(hidden, lora)

    return np.asarray(jax.jit(logits)(adapter, prepared.forward.base.leaves))
