"""axolotl's common keys (docs.axolotl.ai, config reference of 0.10 and later). Plain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlorax.errors import ConfigError
from jlorax.training.dialects.rules import Found, Rule, either, only, refused, to, word

_KINDS = {"alpaca": "alpaca", "completion": "text", "chat_template": "chat"}


def _datasets(found: Found, where: str, value: Any) -> None:
    dataset = _one(where, value)
    where = f"{where}[0]"
    found.give("dataset", _file(where, dataset), f"{where}.path")
    kind = dataset.get("type")
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise ConfigError(
            f"{where}.type is {kind!r}; known are {known}, and for other prompts our own "
            "`dataset` with `template`"
        )
    found.give("mode", _KINDS[kind], f"{where}.type")
    if kind == "alpaca":  # written as it is, without a chat template around it
        found.imply("use_chat_template", False)
    for name, rule in _DATASET.items():
        if dataset.get(name) is not None:
            rule(found, f"{where}.{name}", dataset[name])


def _test_datasets(found: Found, where: str, value: Any) -> None:
    """Its rows are read as those of ``datasets`` are."""
    found.give("validation", _file(f"{where}[0]", _one(where, value)), f"{where}[0].path")


def _one(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], Mapping):
        num = len(value) if isinstance(value, list) else "no"
        raise ConfigError(f"{where} has {num} entries; one with a path is needed")
    dataset: Mapping[str, Any] = value[0]
    for name in dataset:
        if name not in ("path", "type", *_DATASET):
            known = ", ".join(("path", "type", *_DATASET))
            raise ConfigError(f"unknown key '{where}[0].{name}'; known are: {known}")
    return dataset


def _file(where: str, dataset: Mapping[str, Any]) -> str:
    path = dataset.get("path")
    if not isinstance(path, str):
        raise ConfigError(f"{where}.path is {path!r}; a file of examples is needed")
    return path


def _output_dir(found: Found, where: str, value: Any) -> None:
    """Versions appear below it: it is our root and name."""
    path = Path(str(value))
    found.give("output_root", str(path.parent), where)
    found.imply("name", path.name)


def _target_linear(value: Any) -> str | None:
    return "all-linear" if value else None


def _warmup_steps(found: Found, where: str, value: Any) -> None:
    if value != 0:
        raise ConfigError(f"{where} is {value!r}; give warmup_ratio, a share of all steps")
    found.give("warmup_ratio", 0.0, where)


def _lr_scheduler(found: Found, where: str, value: Any) -> None:
    to(
        "schedule",
        word(
            cosine="cosine", linear="linear", constant="constant", constant_with_warmup="constant"
        ),
    )(found, where, value)
    if value == "constant":
        found.imply("warmup_ratio", 0.0)


_DATASET: dict[str, Rule] = {
    "field": to("text_column"),
    "field_messages": to("messages_column"),
    "ds_type": only("json", "csv", "parquet", reason="a file's name says what it is"),
    "split": only("train", reason="a file is read whole"),
    "chat_template": only("tokenizer_default", reason="the base model's own is used"),
    "roles_to_train": only(["assistant"], reason="the assistant's turns are learnt"),
    "train_on_eos": only("turn", reason="a turn's end is learnt with it"),
}
_ONE_DEVICE = "one device trains"
_LOG_DIR = "give log_dir for TensorBoard's files"
_BASE_OWN = "the base model's own is used"
RULES: dict[str, Rule] = {
    "base_model": to("base"),
    "datasets": _datasets,
    "test_datasets": _test_datasets,
    "adapter": only("lora", reason="other adapters are not served, and no base is kept in 4 bits"),
    "lora_r": to("rank"),
    "lora_alpha": to("alpha"),
    "lora_dropout": to("dropout"),
    "lora_target_modules": to("targets"),
    "lora_target_linear": to("targets", _target_linear),
    "lora_modules_to_save": refused("only LoRA's matrices are trained"),
    "lora_model_dir": refused("a training begins with a new adapter"),
    "peft_use_rslora": to("use_rslora"),
    "peft_use_dora": refused("DoRA's magnitudes are not served"),
    "loraplus_lr_ratio": to("lora_plus_ratio"),
    "micro_batch_size": to("batch_size"),
    "gradient_accumulation_steps": to("accumulation"),
    "num_epochs": to("epochs"),
    "lr_scheduler": _lr_scheduler,
    "warmup_steps": _warmup_steps,
    "adam_beta1": to("beta1"),
    "adam_beta2": to("beta2"),
    "adam_epsilon": to("eps"),
    "optimizer": only(
        "adamw",
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_hf",
        reason="AdamW's state is kept in float32",
    ),
    "sequence_len": to("max_seq_len"),
    "sample_packing": to("packing"),
    "pad_to_sequence_len": either,
    "flash_attention": either,
    "sdp_attention": either,
    "val_set_size": to("validation_fraction"),
    "train_on_inputs": to("train_on_prompt"),
    "group_by_length": refused("packing makes rows equally long"),
    "output_dir": _output_dir,
    "dataset_prepared_path": refused("the data is read anew each time"),
    "bf16": to("dtype", word(true="bfloat16", false="float32", auto=None)),
    "fp16": refused("float16's range is too small for gradients: give bf16"),
    "tf32": refused("float32 is computed as float32"),
    "load_in_8bit": to("base_quantization", word(true="int8", false=None)),
    "load_in_4bit": refused("a frozen base is kept in 8 bits or whole"),
    "eval_steps": to("eval_every_steps"),
    "evals_per_epoch": only(1, reason="give eval_steps"),
    "save_steps": to("checkpoint_every_steps"),
    "saves_per_epoch": refused("give save_steps"),
    "logging_steps": only(1, reason="every step is told"),
    "auto_resume_from_checkpoints": to("resume"),
    "resume_from_checkpoint": refused("the same training started again goes on by itself"),
    "chat_template": only("tokenizer_default", reason=_BASE_OWN),
    "tokenizer_type": only("AutoTokenizer", reason=_BASE_OWN),
    "special_tokens": refused(_BASE_OWN),
    "tokens": refused("no rows are added to the embedding"),
    "strict": refused("what a base model lacks is always an error"),
    "neftune_noise_alpha": refused("no noise is added"),
    "rl": refused("supervised training alone"),
    "deepspeed": refused(_ONE_DEVICE),
    "fsdp": refused(_ONE_DEVICE),
    "fsdp_config": refused(_ONE_DEVICE),
    "wandb_project": refused(_LOG_DIR),
    "wandb_entity": refused(_LOG_DIR),
    "wandb_watch": refused(_LOG_DIR),
    "wandb_name": refused(_LOG_DIR),
    "wandb_log_model": refused(_LOG_DIR),
    "mlflow_tracking_uri": refused(_LOG_DIR),
    "hub_model_id": refused("an adapter is a folder on this machine"),
}
