"""The one table of settings: each is a flag, a JLORAX_* variable and a key of the YAML file.

The first that names a setting wins: flag, environment, file, default; some defaults depend on
where the model runs (``jlorax.defaults``).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from jlorax.config import (
    DTYPES,
    GIB,
    LOAD_FORMATS,
    MIB,
    CorsConfig,
    EngineConfig,
    FineTuningConfig,
    ServerConfig,
)
from jlorax.defaults import CPU, GPU, Defaults, Machine, configured, default_cache_dir
from jlorax.errors import ConfigError
from servers.keys import read_keys

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def size_bytes(text: str) -> int:
    """Reads "2GiB", "512 MiB", "1.5GB" or a plain number of bytes."""
    match = _SIZE.fullmatch(text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS:
        raise ValueError("a size looks like 512MiB, 2GiB, 1.5GB or a number of bytes")
    return int(float(match[1]) * _UNITS[unit])


def _size_text(num_bytes: int) -> str:
    """As ``size_bytes`` reads it."""
    return f"{num_bytes // GIB}GiB" if num_bytes % GIB == 0 else f"{num_bytes // MIB}MiB"


def _buckets_text(buckets: Sequence[int]) -> str:
    return ",".join(map(str, buckets))


def _either(shown: Callable[[Defaults], object]) -> str:
    """A default that depends on where the model runs, for a help text."""
    return f"({shown(CPU)}; on a GPU {shown(GPU)})"


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("a whole number is needed") from None


def _one_of(allowed: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"allowed are: {', '.join(allowed)}")
        return text

    return parse


def _truth(text: str) -> bool:
    return _one_of(("true", "false"))(text.lower()) == "true"


def _buckets(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split(","))


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _named_adapter(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ValueError("an adapter is given as NAME=DIR")
    return name, _path(folder)


def _weight(text: str) -> tuple[str, float]:
    tenant, equals, weight = text.partition("=")
    if not (tenant and equals):
        raise ValueError("a weight is given as TENANT=W")
    try:
        return tenant, float(weight)
    except ValueError:
        raise ValueError(f"{weight!r} is no number") from None


def _remote(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not (name and equals and url):
        raise ValueError("a remote is given as NAME=URL")
    return name, url


@dataclass(frozen=True)
class Setting:
    """``key`` names it in YAML; the flag and the variable follow from it."""

    key: str
    parse: Callable[[str], Any]
    metavar: str
    help: str
    repeated: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        return "JLORAX_" + self.key.upper()


SETTINGS = (
    Setting("model", str, "DIR|GGUF|HUB_ID", "base model (default: the embedded SmolLM2-135M)"),
    Setting("model_id", str, "NAME", "the base model's name for clients"),
    Setting(
        "dtype",
        _one_of(DTYPES),
        "|".join(DTYPES),
        f"element type of weights, KV pool, bank {_either(lambda d: d.dtype)}",
    ),
    Setting(
        "load_format",
        _one_of(LOAD_FORMATS),
        "|".join(LOAD_FORMATS),
        "dummy: random weights of the config's shape, to measure speed (auto)",
    ),
    Setting("host", str, "HOST", "address to listen on (default 127.0.0.1)"),
    Setting("port", _whole, "PORT", "port to listen on (default 8080)"),
    Setting(
        "api_keys",
        _path,
        "FILE",
        "who may ask: a line a key, its SHA-256 in hex, tenant, scopes (infer, admin; or both with "
        "a comma) (everybody)",
    ),
    Setting(
        "cors_allow_origin",
        str,
        "ORIGIN",
        "a web page that may use this server from a browser, like https://app.example, or '*' for "
        "every one (none); may be repeated",
        True,
    ),
    Setting(
        "cors_allow_header",
        str,
        "NAME",
        f"a header that such pages may send ({', '.join(CorsConfig().headers)}); may be repeated",
        True,
    ),
    Setting(
        "cors_allow_method",
        str,
        "METHOD",
        f"a method that such pages may use ({', '.join(CorsConfig().methods)}); may be repeated",
        True,
    ),
    Setting(
        "cors_expose_header",
        str,
        "NAME",
        "a header of answers that such pages may read (none beside the usual); may be repeated",
        True,
    ),
    Setting(
        "cors_allow_credentials",
        _truth,
        "true|false",
        "whether such pages may send cookies and the like (false)",
    ),
    Setting("max_best_of", _whole, "N", "answers drawn for the best of a request's best_of (2)"),
    Setting(
        "strict_fields",
        _truth,
        "true|false",
        "whether a request with fields that nobody reads is refused (false: they are ignored)",
    ),
    Setting("adapter_root", _path, "DIR", "folder whose sub-folders are adapters"),
    Setting("adapter", _named_adapter, "NAME=DIR", "an adapter by name; may be repeated", True),
    Setting(
        "remote",
        _remote,
        "NAME=URL",
        "where adapters that are not here come from, asked in this order: hub (Hugging Face's, or "
        "HF_ENDPOINT's), s3://BUCKET/PREFIX; may be repeated",
        True,
    ),
    Setting(
        "preload",
        str,
        "ID",
        "an adapter to read into RAM at the start (all that --adapter names; none: nobody); "
        "may be repeated",
        True,
    ),
    Setting("pin", str, "ID", "an adapter to keep on the device; may be repeated", True),
    Setting("adapter_loaders", _whole, "N", "adapters read at once (half the cores, 2 to 8)"),
    Setting(
        "adapter_bank_bytes",
        size_bytes,
        "B",
        f"device memory for adapters {_either(lambda d: _size_text(d.bank_bytes))}",
    ),
    Setting("max_slots", _whole, "N", "adapters on the device at once (64)"),
    Setting("max_rank", _whole, "R", "largest LoRA rank served, 1 to 256 (64)"),
    Setting(
        "host_cache_bytes",
        size_bytes,
        "B",
        f"RAM for adapters {_either(lambda d: _size_text(d.host_cache_bytes))}",
    ),
    Setting(
        "adapter_templates",
        _truth,
        "true|false",
        "whether chats with an adapter whose folder has a chat template use it (false: the base's)",
    ),
    Setting("disk_cache", _path, "DIR", "folder for packed adapters (in the cache folder)"),
    Setting("disk_cache_bytes", size_bytes, "B", "its quota (16GiB)"),
    Setting("max_seq_len", _whole, "N", "tokens of prompt and answer (the model's, at most 8192)"),
    Setting(
        "max_batch", _whole, "N", f"sequences that run at once {_either(lambda d: d.max_batch)}"
    ),
    Setting("max_queued", _whole, "N", f"requests that may wait {_either(lambda d: d.max_queued)}"),
    Setting(
        "tenant_weight",
        _weight,
        "TENANT=W",
        "a tenant's part of what is served while others wait, in proportion (1); may be repeated",
        True,
    ),
    Setting(
        "kv_cache_bytes",
        size_bytes,
        "B",
        "memory for keys and values (a sixteenth of the context for each of max_batch; "
        "on a GPU what is left)",
    ),
    Setting(
        "buckets",
        _buckets,
        "N,N",
        "decode batch sizes to compile " + _either(lambda d: _buckets_text(d.decode_buckets)),
    ),
    Setting("files_dir", _path, "DIR", "folder for data that clients send (in the cache folder)"),
    Setting("max_file_bytes", size_bytes, "B", "the largest file that a client may send (512MiB)"),
    Setting(
        "train_memory_bytes",
        size_bytes,
        "B",
        "GPU memory that is kept for trainings, which need it there (none; on a CPU not used)",
    ),
    Setting("cache_dir", _path, "DIR", "prepared models, executables and adapters"),
)
_BY_KEY = {setting.key: setting for setting in SETTINGS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings")
    for setting in SETTINGS:
        action = "append" if setting.repeated else "store"
        help_text = f"{setting.help} [{setting.variable}]"
        parser.add_argument(
            setting.flag, dest=setting.key, metavar=setting.metavar, action=action, help=help_text
        )


def read_settings(flags: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Parsed values of every setting that anybody named. Raises ConfigError."""
    config_file = flags.get("config") or environment.get("JLORAX_CONFIG")
    named: dict[str, Any] = _read_yaml(Path(config_file)) if config_file else {}
    for setting in SETTINGS:
        for origin, raw in (
            (setting.variable, environment.get(setting.variable)),
            (setting.flag, flags.get(setting.key)),
        ):
            if raw is not None:
                named[setting.key] = (origin, raw)
    _refuse_unknown_variables(environment)
    return {key: _parse(_BY_KEY[key], origin, raw) for key, (origin, raw) in named.items()}


def _parse(setting: Setting, origin: str, raw: Any) -> Any:
    try:
        if not setting.repeated:
            return setting.parse(str(raw))
        return tuple(setting.parse(text) for text in _texts(raw))
    except ValueError as error:
        raise ConfigError(f"{origin}: {raw!r} is not allowed: {error}") from None


def _texts(raw: Any) -> Sequence[str]:
    """A repeated setting: a list, a mapping NAME: DIR (YAML), or a comma-separated text."""
    if isinstance(raw, Mapping):
        return [f"{name}={value}" for name, value in raw.items()]
    return raw.split(",") if isinstance(raw, str) else [str(text) for text in raw]


def _read_yaml(path: Path) -> dict[str, tuple[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: must be a mapping of settings, not a {type(content)}")
    for key in content:
        if key not in _BY_KEY:
            raise ConfigError(
                f"--config {path}: unknown key {key!r}; {_nearest(str(key), _BY_KEY)}"
            )
    return {key: (f"{path}: {key}", value) for key, value in content.items() if value is not None}


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    known = {setting.variable for setting in SETTINGS} | {"JLORAX_CONFIG", "JLORAX_API_KEY"}
    for name in environment:
        if name.startswith("JLORAX_") and name not in known:
            raise ConfigError(f"unknown variable {name}; {_nearest(name, known)}")


def _nearest(word: str, known: Any) -> str:
    close = get_close_matches(word, list(known), 1)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(sorted(known))}"


def engine_config(
    values: Mapping[str, Any],
    environment: Mapping[str, str],
    machine: Machine,
    is_shared: bool = False,
) -> EngineConfig:
    """``is_shared``: by several tenants."""
    cache_dir = values.get("cache_dir") or default_cache_dir(environment)
    return configured(values, cache_dir, machine, is_shared)


def server_config(values: Mapping[str, Any]) -> ServerConfig:
    names = ("host", "port", "max_best_of", "strict_fields")
    given = _given({name: values.get(name) for name in names})
    file = values.get("api_keys")
    keys = None if file is None else read_keys(file)
    return ServerConfig(**given, api_keys=keys, cors=_cors(values))


def _cors(values: Mapping[str, Any]) -> CorsConfig:
    named = {
        "origins": values.get("cors_allow_origin"),
        "headers": values.get("cors_allow_header"),
        "methods": values.get("cors_allow_method"),
        "exposed": values.get("cors_expose_header"),
        "allow_credentials": values.get("cors_allow_credentials"),
    }
    given = _given(named)
    if given and not named["origins"]:
        raise ConfigError("the cors settings do nothing without cors_allow_origin")
    return CorsConfig(**given)


def fine_tuning_config(
    values: Mapping[str, Any], engine: EngineConfig, machine: Machine, device_share: float | None
) -> FineTuningConfig:
    """``device_share``: of the card's memory, what ``train_memory_bytes`` is."""
    is_on_gpu = machine.platform == "gpu"
    if is_on_gpu and device_share is None and values.get("train_memory_bytes") is not None:
        raise ConfigError("train_memory_bytes: nvidia-smi does not tell how much memory there is")
    given = _given({"max_file_bytes": values.get("max_file_bytes")})
    return FineTuningConfig(
        cache_dir=engine.cache_dir,
        files_dir=values.get("files_dir") or engine.cache_dir / "files",
        adapter_root=engine.adapters.root,
        base=engine.model.model,
        is_on_gpu=is_on_gpu,
        device_share=device_share if is_on_gpu else None,
        is_shared=engine.scheduler.is_shared,
        **given,
    )


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
