"""Every setting is a flag, a variable and a YAML key; a wrong one says what is allowed."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jlorax.config import AdapterConfig, KVConfig, ModelSource, SchedulerConfig, StepConfig
from jlorax.defaults import Machine
from jlorax.errors import ConfigError
from servers.settings import (
    SETTINGS,
    add_arguments,
    engine_config,
    read_settings,
    server_config,
    size_bytes,
)

ENVIRONMENT = {"XDG_CACHE_HOME": "/c"}
CPU = Machine("cpu")
H100 = Machine("gpu", 73 << 30)


def flags(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return vars(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 << 30),
        ("512 MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("4096", 4096),
        ("7b", 7),
    ],
)
def test_sizes_take_units(text: str, expected: int) -> None:
    assert size_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2XB", "1e9", "nan"])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="512MiB"):
        read_settings(flags(f"--kv-cache-bytes={text}"), {})


EXAMPLES = {
    "model": "dir",
    "model_id": "name",
    "dtype": "bfloat16",
    "load_format": "dummy",
    "host": "127.0.0.2",
    "port": "9000",
    "cors_allow_credentials": "true",
    "strict_fields": "true",
    "adapter_templates": "true",
    "adapter_root": "root",
    "adapter": "a=b",
    "remote": "far=hub",
    "tenant_weight": "a=2",
    "buckets": "2,4",
    "disk_cache": "d",
    "cache_dir": "c",
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_flag_variable_and_key_agree(setting: Any, tmp_path: Path) -> None:
    value = EXAMPLES.get(setting.key, "7")
    file = tmp_path / "config.yaml"
    file.write_text(f"{setting.key}: {'[' + value + ']' if setting.repeated else repr(value)}\n")
    by_flag = read_settings(flags(setting.flag, value), {})
    by_variable = read_settings(flags(), {setting.variable: value})
    by_key = read_settings(flags("--config", str(file)), {})
    assert by_flag == by_variable == by_key
    assert list(by_flag) == [setting.key]


def test_the_nearer_origin_wins(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\nmax_slots: 2\nmax_batch: 3\n")
    environment = {"JLORAX_PORT": "4", "JLORAX_MAX_SLOTS": "5", "JLORAX_CONFIG": str(file)}
    assert read_settings(flags("--port", "6"), environment) == {
        "port": 6,
        "max_slots": 5,
        "max_batch": 3,
    }


@pytest.mark.parametrize(
    ("argv", "environment", "words"),
    [
        (["--dtype", "int8"], {}, "--dtype.*float32, bfloat16"),
        (["--load-format", "random"], {}, "--load-format.*auto, dummy"),
        (["--port", "many"], {}, "--port.*whole number"),
        (["--adapter", "nameless"], {}, "NAME=DIR"),
        ([], {"JLORAX_MAX_SLOT": "1"}, "JLORAX_MAX_SLOTS"),
        (["--config", "/nowhere.yaml"], {}, "/nowhere.yaml"),
    ],
)
def test_a_wrong_value_says_where_and_what_is_allowed(
    argv: list[str], environment: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read_settings(flags(*argv), environment)


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max_slot: 3\n")
    with pytest.raises(ConfigError, match="max_slots"):
        read_settings(flags("--config", str(file)), {})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_rank": 257}, "257.*1 to 256"),
        ({"max_slots": 0}, "max_slots is 0"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_seq_len": 1}, "max_seq_len is 1"),
    ],
)
def test_a_value_out_of_range_has_its_number_in_the_error(
    values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        engine_config(values, ENVIRONMENT, CPU)


def test_a_port_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="70000"):
        server_config({"port": 70000})


def test_the_load_format_reaches_the_engine() -> None:
    values = read_settings(flags("--load-format", "dummy"), {})
    assert engine_config(values, ENVIRONMENT, CPU).model.load_format == "dummy"
    assert engine_config({}, ENVIRONMENT, CPU).model.load_format == "auto"


def test_the_largest_bucket_is_max_batch() -> None:
    steps = engine_config({"max_batch": 20}, ENVIRONMENT, CPU).steps
    assert steps.decode_buckets == (1, 8, 20)
    steps = engine_config({"max_batch": 20}, ENVIRONMENT, H100).steps
    assert steps.decode_buckets == (1, 8, 16, 20)


def test_buckets_that_are_named_hold_up_to_max_batch() -> None:
    values = read_settings(flags("--buckets", "2,300,4"), {})
    steps = engine_config(values, ENVIRONMENT, H100).steps
    assert steps.decode_buckets == (2, 4, 256)
    steps = engine_config(values, ENVIRONMENT, CPU).steps
    assert steps.decode_buckets == (2, 4, 32)


def test_without_settings_a_cpu_has_what_the_configuration_says() -> None:
    config = engine_config({}, ENVIRONMENT, CPU)
    assert config.model == ModelSource()
    assert config.scheduler == SchedulerConfig()
    assert config.kv == KVConfig()
    assert config.steps == replace(StepConfig(), decode_buckets=(1, 8, 32))
    assert config.adapters == AdapterConfig(disk_dir=Path("/c/jlorax/adapters"))


def test_without_settings_a_gpu_has_its_own() -> None:
    config = engine_config({}, ENVIRONMENT, H100)
    assert config.model.dtype == "bfloat16"
    assert config.scheduler.max_batch == 256
    assert config.steps.decode_buckets == (1, 8, 16, 32, 64, 128, 256)
    assert config.steps.extend_buckets == (512, 2048, 8192)
    assert (config.kv.cache_bytes, config.kv.device_bytes) == (None, H100.memory_bytes)
    assert (config.adapters.bank_bytes, config.adapters.host_cache_bytes) == (4 << 30, 8 << 30)


def test_a_setting_that_is_named_wins_on_a_gpu() -> None:
    argv = ["--dtype=float32", "--max-batch=8", "--max-queued=9"]
    sizes = ["--adapter-bank-bytes=1MiB", "--host-cache-bytes=2MiB", "--kv-cache-bytes=3MiB"]
    config = engine_config(read_settings(flags(*argv, *sizes), {}), ENVIRONMENT, H100)
    assert config.model.dtype == "float32"
    assert (config.scheduler.max_batch, config.scheduler.max_queued) == (8, 9)
    assert config.adapters.bank_bytes == 1 << 20
    assert config.adapters.host_cache_bytes == 2 << 20
    assert config.kv.cache_bytes == 3 << 20


def test_the_help_names_both_defaults() -> None:
    texts = {setting.key: setting.help for setting in SETTINGS}
    assert "(32; on a GPU 256)" in texts["max_batch"]
    assert "(float32; on a GPU bfloat16)" in texts["dtype"]
    assert "(256MiB; on a GPU 4GiB)" in texts["adapter_bank_bytes"]
    assert "(1,8,32; on a GPU 1,8,16,32,64,128,256)" in texts["buckets"]


def test_where_adapters_come_from_and_who_is_there_first() -> None:
    named = flags("--remote=far=hub", "--remote=s3=s3://b/p?region=x", "--pin=a", "--preload=none")
    adapters = engine_config(read_settings(named, {}), ENVIRONMENT, CPU).adapters
    assert adapters.remotes == (("far", "hub"), ("s3", "s3://b/p?region=x"))
    assert (adapters.pinned, adapters.preload) == (("a",), ())
    unnamed = engine_config({}, ENVIRONMENT, CPU).adapters
    assert unnamed.preload is None and 2 <= unnamed.num_loaders <= 8
    with pytest.raises(ConfigError, match="NAME=URL"):
        read_settings(flags("--remote=hub"), {})
