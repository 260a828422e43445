"""Configuration: one frozen dataclass per owner, composed, checked when built.

The environment is read in ``servers`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal, get_args

from jlorax.errors import ConfigError

DTYPES = ("float32", "bfloat16")
LOAD_FORMATS = ("auto", "dummy")
Kernels = Literal["xla", "pallas", "pallas_interpret"]
MIB = 1 << 20
GIB = 1 << 30


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class ModelSource:
    """Where the base model comes from: a folder, a GGUF file, a hub id; None: the embedded one.

    ``load_format`` "dummy": random weights of the shape that its config.json describes, to measure
    speed; no weights are read, and a folder without a tokenizer gets one of numbers.
    """

    model: str | None = None
    dtype: str = "float32"
    load_format: str = "auto"

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, f"dtype is {self.dtype!r}; allowed are: {', '.join(DTYPES)}")
        _require(
            self.load_format in LOAD_FORMATS,
            f"load_format is {self.load_format!r}; allowed are: {', '.join(LOAD_FORMATS)}",
        )

    @property
    def is_dummy(self) -> bool:
        return self.load_format == "dummy"


@dataclass(frozen=True)
class StepConfig:
    """The compiled shapes. A step is a decode (a token per sequence) or an extend (prompt chunks).

    ``decode_buckets`` are batch sizes. Every step serves greedy requests and others together.
    ``tile`` tokens of an extend step belong to one sequence, where XLA computes.

    ``kernels`` says who does: "xla", or our own kernels, whose steps are packed and have twins
    with fewer adapters or none ("pallas"; "pallas_interpret" on a CPU, for tests). None: Pallas on
    a GPU, XLA elsewhere.
    """

    decode_buckets: tuple[int, ...] = (1, 8, 32)
    extend_buckets: tuple[int, ...] = (64, 256)
    tile: int = 16
    kernels: Kernels | None = None

    def __post_init__(self) -> None:
        _require(
            self.kernels is None or self.kernels in get_args(Kernels),
            f"kernels is {self.kernels!r}; allowed are: {', '.join(get_args(Kernels))}",
        )
        for name in ("decode_buckets", "extend_buckets"):
            buckets = getattr(self, name)
            _require(
                all(b > 0 for b in buckets) and list(buckets) == sorted(set(buckets)),
                f"{name} is {buckets}; it must rise and be positive",
            )
        _require(bool(self.decode_buckets), "decode_buckets is empty")
        _require(bool(self.extend_buckets), "extend_buckets is empty")
        _require(
            all(b % self.tile == 0 for b in self.extend_buckets),
            f"extend_buckets {self.extend_buckets} must be multiples of tile {self.tile}",
        )


@dataclass(frozen=True)
class SchedulerConfig:
    """Batching. ``max_batch`` sequences run at once; ``max_queued`` more may wait."""

    max_batch: int = 32
    max_queued: int = 256
    is_shared: bool = False  # by several tenants: none holds more than half of the places
    max_overtake_s: float = 0.5  # how long a request that waits for a slot may be passed by
    masks_within: float = 0.5  # of a decode step: how long the next one is held for its masks
    tenant_weights: tuple[tuple[str, float], ...] = ()  # shares of the device; 1 for the others

    def __post_init__(self) -> None:
        _require(self.max_batch >= 1, f"max_batch is {self.max_batch}; it must be at least 1")
        _require(self.max_queued >= 1, f"max_queued is {self.max_queued}; it must be at least 1")
        _require(
            self.masks_within >= 0,
            f"masks_within is {self.masks_within}; it must not be negative",
        )
        for tenant, weight in self.tenant_weights:
            _require(weight > 0, f"the weight of tenant {tenant!r} is {weight}; it must be above 0")


@dataclass(frozen=True)
class KVConfig:
    """The KV pool. ``cache_bytes`` None: what is left of ``device_bytes``, as far as max_batch
    sequences can fill it; that None too: a sixteenth of the context for each of max_batch."""

    max_seq_len: int | None = None  # None: what the model was trained for, at most 8192
    cache_bytes: int | None = None
    device_bytes: int | None = None  # what all of this may take of the device
    page_size: int = 64

    def __post_init__(self) -> None:
        _require(
            self.max_seq_len is None or self.max_seq_len >= 2,
            f"max_seq_len is {self.max_seq_len}; it must be at least 2",
        )
        _require(self.page_size >= 1, f"page_size is {self.page_size}; it must be at least 1")


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter tiers: device bank, host RAM, disk; and where adapters may come from.

    ``remotes``: (name, URL), asked in this order for a name that is not here. ``preload``: who is
    read into RAM and checked at the start. ``pinned``: who stays in the bank.
    """

    root: Path | None = None
    named: tuple[tuple[str, Path], ...] = ()
    remotes: tuple[tuple[str, str], ...] = ()
    preload: tuple[str, ...] | None = None  # None: all that are named
    pinned: tuple[str, ...] = ()
    bank_bytes: int = 256 * MIB
    max_slots: int = 64
    max_rank: int = 64
    host_cache_bytes: int = 2 * GIB
    disk_dir: Path | None = None  # None: no disk tier
    disk_cache_bytes: int = 16 * GIB
    num_loaders: int = 2  # threads that read and pack
    own_templates: bool = False  # an adapter's own chat template is used, where it has one

    def __post_init__(self) -> None:
        _require(self.max_slots >= 1, f"max_slots is {self.max_slots}; it must be at least 1")
        _require(self.num_loaders >= 1, f"num_loaders is {self.num_loaders}; it must be at least 1")
        _require(1 <= self.max_rank <= 256, f"max_rank is {self.max_rank}; allowed are 1 to 256")
        for name in ("bank_bytes", "host_cache_bytes", "disk_cache_bytes"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} is {value}; it must not be negative")


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine needs, by owner."""

    cache_dir: Path
    model: ModelSource = field(default_factory=ModelSource)
    steps: StepConfig = field(default_factory=StepConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    model_id: str | None = None  # the name clients use; None: from the model's source
    executable_dir: Path | None = None  # None: compiled anew at every start

    def __post_init__(self) -> None:
        largest = self.steps.decode_buckets[-1]
        _require(
            largest >= self.scheduler.max_batch,
            f"max_batch is {self.scheduler.max_batch}, above the largest decode bucket {largest}",
        )


@dataclass(frozen=True)
class FineTuningConfig:
    """Trainings beside a server, for clients. ``base`` as ModelSource has it. Without
    ``adapter_root`` there is nowhere to put what they make; on a GPU none runs without
    ``device_share``, the part of its memory that is kept for them."""

    cache_dir: Path
    files_dir: Path
    adapter_root: Path | None = None
    base: str | None = None
    max_file_bytes: int = 512 * MIB
    is_on_gpu: bool = False
    device_share: float | None = None
    is_shared: bool = False  # by several tenants: adapters below the root are for all of them

    def __post_init__(self) -> None:
        _require(
            self.max_file_bytes >= 1,
            f"max_file_bytes is {self.max_file_bytes}; it must be at least 1",
        )


class Scope(Enum):
    """What a key may be good for: to ask, and to change what is served."""

    INFER = "infer"
    ADMIN = "admin"


@dataclass(frozen=True)
class ApiKey:
    """Whose key it is, and what it is good for."""

    tenant: str
    scopes: frozenset[Scope]


_ORIGIN = re.compile(r"https?://[^/@?#*\s,]+")
_HEADER_OR_METHOD = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110's token


@dataclass(frozen=True)
class CorsConfig:
    """Which web pages may use the server from a browser (CORS): none, until origins are named.

    ``origins`` as browsers send them ("https://app.example"), or "*" for every page. What pages may
    send are ``headers`` and ``methods``; beside what browsers show anyway they may read the
    answer's headers of ``exposed``.
    """

    origins: tuple[str, ...] = ()
    headers: tuple[str, ...] = ("content-type", "authorization", "x-api-key")
    methods: tuple[str, ...] = ("GET", "POST")
    exposed: tuple[str, ...] = ()
    allow_credentials: bool = False

    def __post_init__(self) -> None:
        for origin in self.origins:
            _require(
                origin == "*" or _ORIGIN.fullmatch(origin) is not None,
                f"the CORS origin {origin!r} is not like https://app.example, nor '*'",
            )
        for token in (*self.headers, *self.methods, *self.exposed):
            _require(
                _HEADER_OR_METHOD.fullmatch(token) is not None,
                f"{token!r} is no name of a header or method",
            )
        _require(
            not (self.allow_credentials and "*" in self.origins),
            "CORS credentials are only for origins that are named, not for '*'",
        )

    def allows(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP front. ``api_keys`` by the sha256 of the key; None: everybody may do everything, as
    the tenant "default"."""

    host: str = "127.0.0.1"
    port: int = 8080
    max_body_bytes: int = 2 * MIB
    max_batch_prompts: int = 64
    max_best_of: int = 2
    strict_fields: bool = False  # fields of a body that nobody reads are refused
    keep_alive_s: float = 75.0
    drain_s: float = 30.0
    api_keys: Mapping[bytes, ApiKey] | None = field(default=None, repr=False)
    cors: CorsConfig = field(default_factory=CorsConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, f"port is {self.port}; allowed are 0 to 65535")
        _require(
            1 <= self.max_best_of <= self.max_batch_prompts,
            f"max_best_of is {self.max_best_of}; allowed are 1 to {self.max_batch_prompts}",
        )

    @property
    def num_tenants(self) -> int:
        """Those that have a key; without keys there is one."""
        return len({key.tenant for key in self.api_keys.values()}) if self.api_keys else 1
