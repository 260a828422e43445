"""Ludwig's keys (ludwig.ai, 0.10 and later) for ``model_type: llm``. Plain.

Ludwig writes a prompt as its template says and nothing around it, so no chat template is used
where a prompt or features are given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jlorax.errors import ConfigError
from jlorax.training.dialects.rules import (
    Found,
    Rule,
    either,
    only,
    refused,
    to,
    with_others,
    word,
)
from jlorax.training.values import typed


def _validation_fraction(value: Any) -> float:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError("shares to train on, to validate with and to test with are needed")
    train, validation, test = map(float, value)
    if test > 0:
        raise ValueError("no rows are kept for a test here: keep them in a file of their own")
    if abs(train + validation - 1) > 1e-6:
        raise ValueError(f"the shares add up to {train + validation:g}, not to 1")
    return validation


def _betas(found: Found, where: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError(f"{where} is {value!r}; two numbers are needed")
    found.give("beta1", value[0], where)
    found.give("beta2", value[1], where)


def _steps_per_checkpoint(found: Found, where: str, value: Any) -> None:
    """Ludwig evaluates where it saves; 0: once an epoch."""
    if value != 0:
        found.give("checkpoint_every_steps", value, where)
        found.give("eval_every_steps", value, where)


def _early_stop(value: Any) -> Any:
    """-1 (or 0) is Ludwig's word for never."""
    return None if value in (-1, 0) else value


def _bits(value: Any) -> str:
    if value != 8:
        raise ValueError("a frozen base is kept in 8 bits or whole")
    return "int8"


_PER_STEP = "give batch_size and gradient_accumulation_steps"
_FULL_RANGE = "numbers are bfloat16 or float32 as a whole: give dtype"
RULES: dict[str, Rule] = {
    "base_model": to("base"),
    "ludwig_version": either,
    "backend.type": only("local", reason="one process trains"),
    "adapter.type": only("lora", reason="other kinds of adapters are not served"),
    "adapter.r": to("rank"),
    "adapter.alpha": to("alpha"),
    "adapter.dropout": to("dropout"),
    "adapter.target_modules": to("targets"),
    "adapter.use_rslora": to("use_rslora"),
    "adapter.use_dora": refused("DoRA's magnitudes are not served"),
    "adapter.bias_type": only("none", reason="biases are not trained"),
    "adapter.pretrained_adapter_weights": refused("a training begins with a new adapter"),
    "adapter.postprocessor.merge_adapter_into_base_model": refused(
        "`jlorax export` merges an adapter that is there"
    ),
    "adapter.postprocessor.progressbar": either,
    "quantization.bits": to("base_quantization", _bits),
    "prompt.template": with_others,
    "prompt.task": with_others,
    "prompt.retrieval": refused("prompts are made of the row alone"),
    "input_features": with_others,
    "output_features": with_others,
    "preprocessing.split.type": only("random", reason="give a file of its own as `validation`"),
    "preprocessing.split.probabilities": to("validation_fraction", _validation_fraction),
    "preprocessing.sample_ratio": only(1, 1.0, reason="all rows are used"),
    "preprocessing.global_max_sequence_length": to("max_seq_len"),
    "trainer.type": only("finetune", reason="only that trains an adapter"),
    "trainer.epochs": to("epochs"),
    "trainer.train_steps": to("max_steps"),
    "trainer.batch_size": to("batch_size"),
    "trainer.gradient_accumulation_steps": to("accumulation"),
    "trainer.effective_batch_size": refused(_PER_STEP),
    "trainer.max_batch_size": refused(_PER_STEP),
    "trainer.eval_batch_size": refused("validation takes batch_size rows"),
    "trainer.learning_rate": to("learning_rate"),
    "trainer.learning_rate_scheduler.decay": to(
        "schedule", word(cosine="cosine", linear="linear", none="constant")
    ),
    "trainer.learning_rate_scheduler.warmup_fraction": to("warmup_ratio"),
    "trainer.learning_rate_scheduler.warmup_evaluations": refused("give warmup_fraction"),
    "trainer.learning_rate_scheduler.reduce_on_plateau": refused("the schedule is known before"),
    "trainer.optimizer.type": only("adamw", reason="others are not built in"),
    "trainer.optimizer.betas": _betas,
    "trainer.optimizer.eps": to("eps"),
    "trainer.optimizer.weight_decay": to("weight_decay"),
    "trainer.gradient_clipping.clipglobalnorm": to("max_grad_norm"),
    "trainer.gradient_clipping.clipnorm": refused("give clipglobalnorm"),
    "trainer.gradient_clipping.clipvalue": refused("give clipglobalnorm"),
    "trainer.early_stop": to("early_stopping_patience", _early_stop),
    "trainer.steps_per_checkpoint": _steps_per_checkpoint,
    "trainer.checkpoints_per_epoch": refused("give steps_per_checkpoint"),
    "trainer.enable_gradient_checkpointing": to("gradient_checkpointing"),
    "trainer.use_mixed_precision": refused(_FULL_RANGE),
    "trainer.should_shuffle": only(True, reason="every epoch has an order of its own"),
    "trainer.validation_metric": only("loss", reason="no other is computed"),
    "generation": refused("how an answer is sampled is for the request to say"),
}


def read_together(found: Found, mapping: Mapping[str, Any]) -> None:
    """Features and prompt: the columns, the template and the length."""
    source = _feature(mapping, "input_features")
    target = _feature(mapping, "output_features")
    prompt = mapping.get("prompt") or {}
    if source is None and target is None and not prompt:
        return
    found.imply("use_chat_template", False)
    if target is not None:
        found.give("completion_column", target["name"], "output_features[0].name")
    if template := prompt.get("template"):
        written = _template(str(template), prompt.get("task"), source)
        found.give("template", written, "prompt.template")
    elif prompt.get("task"):
        raise ConfigError("prompt.task needs a prompt.template that has {__task__}")
    elif source is not None:
        found.give("prompt_column", source["name"], "input_features[0].name")
        found.imply("mode", "completion")
    _give_length(found, _max_length(source), _max_length(target))


def _feature(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The one text feature of ``key``, checked."""
    features = mapping.get(key)
    if features is None:
        return None
    if not isinstance(features, list) or len(features) != 1 or not isinstance(features[0], Mapping):
        raise ConfigError(f"{key} is {features!r}; a list of one text feature is needed")
    feature: Mapping[str, Any] = features[0]
    _check_keys(feature, {"name", "type", "column", "preprocessing"}, f"{key}[0]")
    if "name" not in feature or feature.get("type", "text") != "text":
        raise ConfigError(f"{key}[0] is {dict(feature)!r}; a name and the type text are needed")
    _check_keys(
        feature.get("preprocessing") or {}, {"max_sequence_length"}, f"{key}[0].preprocessing"
    )
    return {**feature, "name": feature.get("column") or feature["name"]}


def _check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(
                f"unknown key '{where}.{name}'; known are: {', '.join(sorted(known))}"
            )


def _max_length(feature: Mapping[str, Any] | None) -> int | None:
    preprocessing = (feature or {}).get("preprocessing") or {}
    length: int | None = preprocessing.get("max_sequence_length")
    return length


def _give_length(found: Found, source: int | None, target: int | None) -> None:
    """Ludwig bounds prompt and answer each; here both together have one bound, their sum."""
    where = "preprocessing.max_sequence_length"
    if source is None and target is None:
        return
    if source is None or target is None:
        raise ConfigError(
            f"{where} is given for one of input and output: give both, or "
            "preprocessing.global_max_sequence_length"
        )
    found.imply(
        "max_seq_len", typed("max_seq_len", source, where) + typed("max_seq_len", target, where)
    )


def _template(template: str, task: Any, source: Mapping[str, Any] | None) -> str:
    """Ludwig's {__sample__} is the input feature's column, and {__task__} the task's text."""
    values = {}
    if source is not None:
        values["__sample__"] = f"{{{source['name']}}}"
    if task is not None:
        values["__task__"] = str(task).replace("{", "{{").replace("}", "}}")

    def written(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ConfigError(f"prompt.template has {match[0]}, but nothing says what it is")
        return values[match[1]]

    return re.sub(r"\{(__\w+__)\}", written, template)
