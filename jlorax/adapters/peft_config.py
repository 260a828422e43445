"""adapter_config.json: an allow-list over every field of PEFT's LoraConfig.

A key is understood, or known not to change inference, or must be empty; anything else is refused by
name. PEFT grows a new variant every few months, and a variant that is ignored answers wrongly.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from jlorax.adapters.files import CONFIG_FILE
from jlorax.adapters.patterns import PatternRefused, matches_suffix, matches_whole
from jlorax.errors import AdapterInvalid, UnsupportedAdapter

MAX_RANK = 256
MAX_ALPHA = 1e6
MAX_PATTERNS = 8192
ALL_LINEAR = "all-linear"

T = TypeVar("T")
Names = str | tuple[str, ...]

UNDERSTOOD = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "bias",
        "base_model_name_or_path",
    }
)

# Training, bookkeeping, or a parameter of a feature that another key switches on.
# fan_in_fan_out: PEFT itself sets it back to false for torch.nn.Linear (lora/layer.py).
# eva/corda/lora_ga_config: read only while init_lora_weights names them.
HARMLESS = frozenset(
    {
        "lora_dropout",
        "inference_mode",
        "revision",
        "task_type",
        "auto_mapping",
        "peft_version",
        "fan_in_fan_out",
        "megatron_config",
        "megatron_core",
        "runtime_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
    }
)

# key -> (the feature's name, why it cannot be ignored)
MUST_BE_EMPTY: Mapping[str, tuple[str, str]] = {
    "use_dora": ("DoRA", "it rescales the base weights' columns"),
    "modules_to_save": ("modules_to_save", "it replaces whole modules of the base model"),
    "lora_bias": ("lora_bias", "it adds biases to lora_B"),
    "trainable_token_indices": ("trainable_token_indices", "it changes the embeddings"),
    "layer_replication": ("layer_replication", "it changes the base model's layers"),
    "target_parameters": ("target_parameters", "it adapts parameters that are no linear layer"),
    "loftq_config": ("LoftQ", "it changes the base weights"),
    "alora_invocation_tokens": ("aLoRA", "it is active behind its invocation tokens only"),
    "use_qalora": ("QALoRA", "it pools the input in groups"),
    "arrow_config": ("Arrow", "it routes each token among several adapters"),
    "velora_config": ("VeLoRA", "this variant of LoRA is not computed here"),
    "kasa_config": ("KaSA", "it truncates the base weights"),
    "monteclora_config": ("MonteCLoRA", "it samples the adapter's weights"),
    "use_bdlora": ("BD-LoRA", "its matrices are block-diagonal"),
    "ensure_weight_tying": ("ensure_weight_tying", "it ties lm_head's LoRA to the embeddings'"),
}

# The others (pissa, pissa_niter_N, olora, corda, loftq, lora_ga) change the base weights.
SAFE_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an adapter says of itself: y += (x @ A.T @ B.T) * scaling, where it applies."""

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: Names  # a str is a regular expression, or "all-linear"
    exclude_modules: Names
    layers_to_transform: tuple[int, ...]  # empty: all
    layers_pattern: tuple[str, ...]
    base_model: str | None

    @property
    def max_rank(self) -> int:
        return max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r

    @property
    def target_names(self) -> tuple[str, ...]:
        """For display: last path components, or the expression itself."""
        if isinstance(self.target_modules, str):
            return (self.target_modules,)
        return tuple(sorted({name.rpartition(".")[2] for name in self.target_modules}))

    def selects(self, module: str, is_output: bool = False) -> bool:
        """Whether PEFT would adapt this linear layer (its check_target_module_exists).

        ``is_output``: the output embedding (lm_head), which "all-linear" leaves out.
        """
        if self._excludes(module):
            return False
        targets = self.target_modules
        if isinstance(targets, str):
            if targets.lower() == ALL_LINEAR:
                return not is_output
            return matches_whole(targets, module)
        if module in targets:  # a full name is taken whatever layers_to_transform says, as in PEFT
            return True
        return _ends_with(module, targets) and self._in_layers(module)

    def rank(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """alpha / r, with rsLoRA alpha / sqrt(r) (https://arxiv.org/abs/2312.03732)."""
        rank = self.rank(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _excludes(self, module: str) -> bool:
        exclude = self.exclude_modules
        if not exclude:
            return False
        if isinstance(exclude, str):
            return matches_whole(exclude, module)
        return module in exclude or _ends_with(module, exclude)

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        if not self.layers_pattern:
            match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
        else:
            tries = (
                re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", module) for p in self.layers_pattern
            )
            match = next((m for m in tries if m), None)
        return match is not None and int(match["idx"]) in self.layers_to_transform


def parse_config(
    data: bytes | memoryview, adapter_id: str, max_rank: int = MAX_RANK
) -> AdapterConfig:
    """adapter_config.json's bytes -> AdapterConfig. AdapterInvalid names the key at fault."""
    values = _load(data, adapter_id)
    reader = _Reader(values, adapter_id)
    _refuse_features(values, reader)
    nothing: Names = ()
    config = AdapterConfig(
        r=reader.get("r", _rank, 8),
        alpha=reader.get("lora_alpha", _alpha, 8.0),
        use_rslora=reader.get("use_rslora", _bool, False),
        rank_pattern=reader.get("rank_pattern", _map_of(_rank), {}),
        alpha_pattern=reader.get("alpha_pattern", _map_of(_alpha), {}),
        target_modules=reader.get("target_modules", _targets, nothing),
        exclude_modules=reader.get("exclude_modules", _targets, nothing),
        layers_to_transform=reader.get("layers_to_transform", _layers, ()),
        layers_pattern=reader.get("layers_pattern", _layer_names, ()),
        base_model=reader.get("base_model_name_or_path", _text, None),
    )
    _check_whole(config, reader, min(max_rank, MAX_RANK))
    return config


def _load(data: bytes | memoryview, adapter_id: str) -> dict[str, Any]:
    try:
        values = json.loads(bytes(data).decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(adapter_id, CONFIG_FILE, f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise AdapterInvalid(adapter_id, CONFIG_FILE, "is not a JSON object")
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} appears twice")
        result[key] = value
    return result


def _refuse_features(values: Mapping[str, Any], reader: _Reader) -> None:
    if "peft_type" not in values:
        raise reader.invalid("peft_type is missing: not a PEFT adapter")
    if values["peft_type"] != "LORA":
        raise reader.unsupported(f"peft_type {values['peft_type']!r}", "only LORA is computed here")
    for key, (feature, why) in MUST_BE_EMPTY.items():
        if not _empty(values.get(key)):
            raise reader.unsupported(feature, f"{key} is {_short(values[key])}: {why}")
    if values.get("bias", "none") not in ("none", None):
        raise reader.unsupported(
            "bias", f"bias is {_short(values['bias'])}: it changes the base model's biases"
        )
    init = values.get("init_lora_weights", True)
    if not any(init is safe if isinstance(safe, bool) else init == safe for safe in SAFE_INITS):
        raise reader.unsupported(
            f"init_lora_weights {_short(init)}", "such an adapter belongs to changed base weights"
        )
    known = UNDERSTOOD | HARMLESS | MUST_BE_EMPTY.keys()
    for key, value in values.items():
        if key not in known and not _empty(value):
            raise reader.unsupported(
                _short(key), f"its value is {_short(value)}, and this key is not known here"
            )


def _check_whole(config: AdapterConfig, reader: _Reader, max_rank: int) -> None:
    if not config.target_modules:
        raise reader.invalid("target_modules is empty: nothing would be adapted")
    if config.max_rank > max_rank:
        raise reader.invalid(f"rank {config.max_rank} is above the limit of {max_rank}")
    if isinstance(config.target_modules, str) and (
        config.layers_to_transform or config.layers_pattern
    ):
        raise reader.invalid(
            "layers_to_transform and layers_pattern cannot be used when target_modules is a string"
        )
    if config.layers_pattern and not config.layers_to_transform:
        raise reader.invalid("layers_pattern needs layers_to_transform")
    try:  # every expression once, so that a wrong one is a fault of this file
        config.selects("x")
        config.scaling("x")
        for key in (*config.rank_pattern, *config.alpha_pattern):
            matches_suffix(key, "x")
    except PatternRefused as error:
        raise reader.invalid(f"a pattern {error}") from error


@dataclass(frozen=True)
class _Reader:
    values: Mapping[str, Any]
    adapter_id: str

    def get(self, key: str, parse: Callable[[Any], T], default: T) -> T:
        value = self.values.get(key)
        if value is None:
            return default
        try:
            return parse(value)
        except (ValueError, OverflowError) as error:
            raise self.invalid(f"{key} is {_short(value)}: {error}") from error

    def invalid(self, reason: str) -> AdapterInvalid:
        return AdapterInvalid(self.adapter_id, CONFIG_FILE, reason)

    def unsupported(self, feature: str, reason: str) -> UnsupportedAdapter:
        return UnsupportedAdapter(self.adapter_id, CONFIG_FILE, feature, reason)


def _rank(value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError("a rank is a whole number above 0")
    return value


def _alpha(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= MAX_ALPHA:
        raise ValueError(f"alpha is a number above 0 and at most {MAX_ALPHA:g}")
    return float(value)


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("must be true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError("must be a list of names")
    return tuple(value)


def _targets(value: Any) -> Names:
    return value if isinstance(value, str) else _strings(value)


def _map_of(parse: Callable[[Any], T]) -> Callable[[Any], dict[str, T]]:
    def parse_map(value: Any) -> dict[str, T]:
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            raise ValueError(f"must be an object of at most {MAX_PATTERNS} patterns")
        return {key: parse(item) for key, item in value.items()}

    return parse_map


def _layers(value: Any) -> tuple[int, ...]:
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise ValueError("must be one layer's number or a list of them")
    return tuple(layers)


def _layer_names(value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) and value else _strings(value or [])
    if not all(re.fullmatch(r"[\w.]+", name) for name in names):
        raise ValueError("only plain names are read here, not expressions")
    return names


def _ends_with(module: str, names: tuple[str, ...]) -> bool:
    return any(module.endswith(f".{name}") for name in names)


def _first_match(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first key that matches the end of the name, as PEFT's get_pattern_key."""
    for key, value in patterns.items():
        if matches_suffix(key, module):
            return value
    return default


def _empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
