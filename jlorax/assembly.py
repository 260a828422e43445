"""From a configuration to the parts of an engine: model, device, tiers, books. Blocking, plain.

``plan_memory`` alone says what would be taken, without loading anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from jlorax.actors.grammar import Compiler
from jlorax.actors.ingress import Limits
from jlorax.adapters.disk_tier import DiskTier, remove
from jlorax.adapters.host_tier import HostTier
from jlorax.adapters.loader import Loader, Spooled
from jlorax.adapters.pack import PackedAdapter
from jlorax.adapters.packing import PackerProcess
from jlorax.adapters.placement import share_bank
from jlorax.adapters.registry import DEFAULT_TENANT, AdapterRecord, Registry
from jlorax.adapters.remote import open_remote, parse_remote
from jlorax.adapters.remote_names import RemoteNames
from jlorax.adapters.slots import SlotTable
from jlorax.adapters.sources import Sources
from jlorax.adapters.tiers import AdapterTiers
from jlorax.base_model import find_base
from jlorax.config import GIB, EngineConfig, Kernels
from jlorax.defaults import Machine, reserve_bytes
from jlorax.device.device import Device, DeviceSizes, step_store
from jlorax.device.lora_bank import host_memory
from jlorax.device.step import row_bytes
from jlorax.errors import ConfigError
from jlorax.layout import (
    ITEM_BYTES,
    BankLayout,
    LoraReach,
    PoolKey,
    StepShape,
    decode_shape,
    packed_extend_shape,
)
from jlorax.metrics import Metrics
from jlorax.models.config import ModelConfig
from jlorax.models.kept import kept_config
from jlorax.models.weights import BaseModel, dummy_model, load_model, weight_bytes
from jlorax.scheduling.policy import Policy, PolicyConfig
from jlorax.structured.grammar import GrammarCompiler
from jlorax.tokenizer import Tokenizer
from jlorax.types import ModelInfo, Progress, Tier, no_progress

_DEFAULT_MAX_SEQ_LEN = 8192
_POOL_SHARE = 16  # by default the pool holds max_batch sequences of a sixteenth of the context


@dataclass(frozen=True)
class Parts:
    """Everything an engine is made of, before its actors run."""

    config: EngineConfig
    model_info: ModelInfo
    tokenizer: Tokenizer
    grammar_compiler: Compiler
    limits: Limits
    device: Device
    policy: Policy
    tiers: AdapterTiers
    metrics: Metrics


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes and counts, as ``--dry-run`` prints them."""

    platform: str
    device_bytes: int | None
    dtype: str
    weight_bytes: int
    random_weights: bool
    kv_bytes: int
    num_pages: int
    page_size: int
    max_seq_len: int
    bank_bytes: int
    row_bytes: int  # of what the device keeps for every sequence beside its keys and values
    max_slots: int
    pool_pages: Mapping[PoolKey, int]
    host_cache_bytes: int
    disk_cache_bytes: int
    shapes: tuple[StepShape, ...]


def assemble(config: EngineConfig, progress: Progress = no_progress) -> Parts:
    """Loads everything. Raises ConfigError or ModelInvalid with the reason."""
    folder, model_id = find_model(config, progress)
    model_config = kept_config(folder, config.executable_dir)
    registry = build_registry(config, model_id)
    layout = bank_layout(config, model_config)
    plan = plan_memory(config, model_config, registry, layout)
    sizes, vocab_size = _device_sizes(config, plan), model_config.shape.vocab_size
    steps = (layout, sizes, plan.shapes, kernels(config))
    with _tiers_in_the_making(config, registry, layout, plan) as tiers:
        with step_store(config.executable_dir, model_config, config.model.dtype, *steps) as store:
            progress("loading tokenizer", 0.0)
            tokenizer = load_tokenizer(config, folder, model_config)
            grammar_compiler = GrammarCompiler(tokenizer, vocab_size)
            model = load_weights(config, folder, model_config, progress)
            device = Device(model, *steps, store, progress)
        preload_adapters(config, tiers, progress)
    return Parts(
        config=config,
        model_info=_model_info(config, model_config, model_id, plan, tokenizer),
        tokenizer=tokenizer,
        grammar_compiler=grammar_compiler,
        limits=Limits(plan.max_seq_len, vocab_size),
        device=device,
        policy=Policy(_policy_config(config, sizes, plan, vocab_size)),
        tiers=tiers,
        metrics=Metrics(),
    )


def find_model(config: EngineConfig, progress: Progress = no_progress) -> tuple[Path, str]:
    """(folder in Hugging Face's layout, the name clients use)."""
    folder, name = find_base(config.model, config.cache_dir, progress)
    return folder, config.model_id or name


def load_tokenizer(config: EngineConfig, folder: Path, model: ModelConfig) -> Tokenizer:
    """The folder's own; with dummy weights a folder may have none, and token i is the word "i"."""
    if config.model.is_dummy and not any(folder.glob("tokenizer*")):
        return Tokenizer.numbered(model.shape.vocab_size)
    return Tokenizer.load(folder)


def load_weights(
    config: EngineConfig, folder: Path, model: ModelConfig, progress: Progress = no_progress
) -> BaseModel:
    if config.model.is_dummy:
        return dummy_model(model, config.model.dtype, progress=progress)
    return load_model(folder, model, config.model.dtype, progress)


def bank_layout(config: EngineConfig, model: ModelConfig) -> BankLayout:
    return BankLayout(model.projections(), config.model.dtype, config.adapters.max_rank)


def build_registry(config: EngineConfig, model_id: str) -> Registry:
    """Names from the configuration. A named adapter that cannot be read stops the start."""
    root = config.adapters.root
    if root is not None and not root.is_dir():
        raise ConfigError(f"adapter_root {root} is not a folder")
    registry = Registry(root, model_id, config.adapters.max_rank)
    for name, folder in config.adapters.named:
        registry.register(name, folder)
    return registry


@contextmanager
def _tiers_in_the_making(
    config: EngineConfig, registry: Registry, layout: BankLayout, plan: MemoryPlan
) -> Iterator[AdapterTiers]:
    """What takes them seconds goes on beside the ``with``: locking memory, starting packers."""
    tiers = adapter_tiers(config, registry, layout, plan)
    loader, adapters = tiers.loader, config.adapters
    try:
        with ThreadPoolExecutor(1) as beside:
            reserving = beside.submit(loader.memory.reserve, adapters.host_cache_bytes)
            if adapters.root is not None or adapters.remotes:  # whom nobody named at the start
                for _ in range(adapters.num_loaders):
                    loader.prepare()
            yield tiers
        reserving.result()
    except BaseException:
        loader.close()
        raise


def adapter_tiers(
    config: EngineConfig, registry: Registry, layout: BankLayout, plan: MemoryPlan
) -> AdapterTiers:
    adapters = config.adapters
    remotes = [parse_remote(*remote) for remote in adapters.remotes]
    sources = {remote.name: open_remote(remote) for remote in remotes}
    memory = host_memory()
    return AdapterTiers(
        registry=registry,
        remote_names=RemoteNames(registry, tuple(sources)),
        loader=Loader(layout, Sources(sources, adapters.disk_dir), memory, PackerProcess),
        disk=_disk_tier(config),
        host=HostTier(memory.kept_bytes(adapters.host_cache_bytes)),
        slots=SlotTable(plan.max_slots, plan.pool_pages),
        pinned=adapters.pinned,
    )


def preload_adapters(
    config: EngineConfig, tiers: AdapterTiers, progress: Progress = no_progress
) -> None:
    """Reads adapters and checks them, into RAM while there is room; a bad one stops the start.
    The others wait for their first request. Nobody is served yet: no process is needed for it."""
    loader = Loader(tiers.loader.layout, tiers.loader.sources, tiers.loader.memory)
    records = _to_preload(config, tiers.registry)
    with ThreadPoolExecutor(config.adapters.num_loaders) as threads:
        loads = [threads.submit(_preload, loader, tiers.disk, record) for record in records]
        try:
            for i, (record, load) in enumerate(zip(records, loads, strict=True)):
                _keep(tiers, record, *load.result())
                progress("loading adapters", (i + 1) / len(records))
        finally:
            threads.shutdown(cancel_futures=True)


def _to_preload(config: EngineConfig, registry: Registry) -> list[AdapterRecord]:
    names = config.adapters.preload
    if names is None:
        names = tuple(name for name, _ in config.adapters.named)
    found = [(name, registry.find(DEFAULT_TENANT, name)) for name in names]
    missing = [name for name, record in found if record is None]
    if missing:
        raise ConfigError(f"preload names {missing[0]!r}, but no adapter here is named so")
    return [record for _, record in found if record is not None]


def _preload(
    loader: Loader, disk: DiskTier | None, record: AdapterRecord
) -> tuple[PackedAdapter, Spooled | None]:
    """On a thread; the books are for the caller."""
    kept = None if disk is None else disk.find(loader.key(record))
    load = loader.load(record, kept)
    if disk is None or load.tier is not Tier.SOURCE:
        return load.packed, None
    try:
        return load.packed, loader.spool(record, load.packed, disk.folder)
    except OSError:
        return load.packed, None


def _keep(
    tiers: AdapterTiers, record: AdapterRecord, packed: PackedAdapter, spooled: Spooled | None
) -> None:
    if tiers.host.used_bytes + packed.size_bytes <= tiers.host.max_bytes:
        tiers.host.put(record.version, packed, packed.size_bytes)
    if tiers.disk is not None and spooled is not None:
        gone = tiers.disk.take(spooled.source, spooled.digest, spooled.path, spooled.size_bytes)
        remove(gone)


def plan_memory(
    config: EngineConfig, model: ModelConfig, registry: Registry, layout: BankLayout
) -> MemoryPlan:
    shape, kv, adapters = model.shape, config.kv, config.adapters
    max_seq_len = _max_seq_len(config, model)
    item = ITEM_BYTES[config.model.dtype]
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * item
    page_bytes = per_token * kv.page_size
    known = [_known_ranks(record, layout) for record in registry.records()]
    pool_pages = share_bank(layout, adapters.bank_bytes, known)
    bank_bytes = sum(layout.page_bytes(pool) * count for pool, count in pool_pages.items())
    weights = weight_bytes(model, config.model.dtype)
    rows = row_bytes(config.scheduler.max_batch, shape.vocab_size)
    num_pages = _num_pages(config, max_seq_len, page_bytes, weights + bank_bytes + rows)
    return MemoryPlan(
        platform=jax.default_backend(),
        device_bytes=kv.device_bytes,
        dtype=config.model.dtype,
        weight_bytes=weights,
        random_weights=config.model.is_dummy,
        kv_bytes=num_pages * page_bytes,
        num_pages=num_pages,
        page_size=kv.page_size,
        max_seq_len=min(max_seq_len, (num_pages - 1) * kv.page_size),
        bank_bytes=bank_bytes,
        row_bytes=rows,
        max_slots=adapters.max_slots,
        pool_pages=pool_pages,
        host_cache_bytes=adapters.host_cache_bytes,
        disk_cache_bytes=adapters.disk_cache_bytes if adapters.disk_dir else 0,
        shapes=step_shapes(config),
    )


def _num_pages(config: EngineConfig, max_seq_len: int, page_bytes: int, taken_bytes: int) -> int:
    """Of the KV pool, padding's page included; ``taken_bytes``: weights, bank and rows."""
    kv, max_batch = config.kv, config.scheduler.max_batch
    pages_per_sequence = -(-max_seq_len // kv.page_size)
    if kv.cache_bytes is not None:
        num_pages, given = kv.cache_bytes // page_bytes, f"kv_cache_bytes is {kv.cache_bytes}"
    elif kv.device_bytes is not None:
        left = kv.device_bytes - reserve_bytes(kv.device_bytes) - taken_bytes
        num_pages = min(max_batch * pages_per_sequence + 1, left // page_bytes)
        given = (
            f"of the device's {kv.device_bytes} bytes weights, adapter bank and rows' books "
            f"take {taken_bytes}, and {left} are left for keys and values"
        )
    else:
        share = -(-pages_per_sequence // _POOL_SHARE)
        return max(pages_per_sequence, max_batch * share) + 1
    if num_pages < 2:
        raise ConfigError(f"{given}; two pages of {kv.page_size} tokens take {2 * page_bytes}")
    return num_pages


def running_on() -> Machine:
    """Starts jax. A GPU's memory in whole GiB: what differs by less from start to start must not
    change the shapes that executables are kept by."""
    if jax.default_backend() != "gpu":
        return Machine(jax.default_backend())
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return Machine("gpu", None if limit is None else limit // GIB * GIB)


def kernels(config: EngineConfig) -> Kernels:
    """Who computes the steps."""
    return config.steps.kernels or ("pallas" if jax.default_backend() == "gpu" else "xla")


def step_shapes(config: EngineConfig) -> tuple[StepShape, ...]:
    """Every executable: decode steps by batch, extend steps by tokens; one of these scores."""
    steps = config.steps
    if kernels(config) != "xla":
        return _packed_shapes(config)
    extends = [StepShape(t, steps.tile, t // steps.tile) for t in steps.extend_buckets]
    return *map(decode_shape, steps.decode_buckets), *extends, replace(extends[0], scores=True)


def _packed_shapes(config: EngineConfig) -> tuple[StepShape, ...]:
    """A GPU's launches are counted, so what has no adapters gets an executable without them."""
    steps, slots = config.steps, config.adapters.max_slots
    most = config.scheduler.max_batch

    def extend_shape(num_tokens: int, lora: LoraReach) -> StepShape:
        return packed_extend_shape(num_tokens, min(most, max(1, num_tokens // steps.tile)), lora)

    return (
        *(
            decode_shape(b, lora, packed_slots=slots)
            for b in steps.decode_buckets
            for lora in LoraReach
        ),
        *(extend_shape(t, lora) for t in steps.extend_buckets for lora in LoraReach),
        replace(extend_shape(steps.extend_buckets[0], LoraReach.ALL), scores=True),
    )


def _max_seq_len(config: EngineConfig, model: ModelConfig) -> int:
    trained = model.shape.max_seq_len
    wanted = config.kv.max_seq_len
    if wanted is None:
        return min(trained, _DEFAULT_MAX_SEQ_LEN)
    if wanted > trained:
        raise ConfigError(f"max_seq_len is {wanted}; the model was made for at most {trained}")
    return wanted


def _known_ranks(record: AdapterRecord, layout: BankLayout) -> dict[str, int]:
    """What an adapter will ask of the pools, from its config alone."""
    named = [name for name in record.target_modules if name in layout.index]
    every = [p.name for p in layout.projections if p.name != "lm_head"]
    return dict.fromkeys(named or every, min(record.rank, layout.max_rank))


def _disk_tier(config: EngineConfig) -> DiskTier | None:
    adapters = config.adapters
    if adapters.disk_dir is None:
        return None
    return DiskTier(adapters.disk_dir, adapters.disk_cache_bytes)


def _device_sizes(config: EngineConfig, plan: MemoryPlan) -> DeviceSizes:
    return DeviceSizes(
        max_batch=config.scheduler.max_batch,
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        max_pages_per_sequence=-(-plan.max_seq_len // plan.page_size),
        num_slots=plan.max_slots,
        pool_pages=plan.pool_pages,
    )


def _policy_config(
    config: EngineConfig, sizes: DeviceSizes, plan: MemoryPlan, vocab_size: int
) -> PolicyConfig:
    return PolicyConfig(
        shapes=plan.shapes,
        max_batch=sizes.max_batch,
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        max_pages_per_sequence=sizes.max_pages_per_sequence,
        num_slots=sizes.num_slots,
        vocab_size=vocab_size,
        max_overtake_s=config.scheduler.max_overtake_s,
        tenant_weights=dict(config.scheduler.tenant_weights),
    )


def _model_info(
    config: EngineConfig, model: ModelConfig, model_id: str, plan: MemoryPlan, tokenizer: Tokenizer
) -> ModelInfo:
    return ModelInfo(
        model_id=model_id,
        architecture=type(model).__name__.removesuffix("Config").lower(),
        dtype=config.model.dtype,
        device=jax.devices()[0].device_kind,
        vocab_size=model.shape.vocab_size,
        max_seq_len=plan.max_seq_len,
        max_batch=config.scheduler.max_batch,
        max_rank=config.adapters.max_rank,
        max_slots=plan.max_slots,
        eos_token_ids=tokenizer.eos_token_ids,
    )
