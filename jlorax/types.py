"""What crosses the borders between the parts: requests, events, shapes. Frozen, plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

Progress = Callable[[str, float], None]
"""Reports (what is being done, fraction done in 0..1); may be called from any thread."""


def no_progress(what: str, fraction: float) -> None:
    """The Progress that shows nothing."""


@dataclass(frozen=True)
class Projection:
    """One adaptable linear map of the base model: y = x @ W, in each of its layers.

    ``name`` is PEFT's last path component ("q_proj"); ``path`` is the module's full name with
    "{layer}" for the layer's number, or without it when the map exists once (lm_head).
    """

    name: str
    path: str
    d_in: int
    d_out: int
    num_layers: int

    def module(self, layer: int) -> str:
        return self.path.format(layer=layer)

    @property
    def is_output(self) -> bool:
        """Whether it is the output embedding, of which there is one."""
        return "{layer}" not in self.path


class AdapterVersion(NamedTuple):
    """What a name meant when a request resolved it. Keys slots, tiers, KV reuse and metrics.

    The same name uploaded again is a new generation; running requests keep theirs. A tuple: it is
    hashed a thousand times a step.
    """

    tenant: str
    adapter_id: str
    generation: int


class FinishReason(Enum):
    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Greedy when ``temperature`` is 0.

    Ranges are checked in ``wire``; here every value is already allowed.
    Order: penalties, biases, constraint, temperature, top-k, top-p, min-p, typical-p, draw.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and answer
    frequency_penalty: float = 0.0  # over the answer, per occurrence
    presence_penalty: float = 0.0  # over the answer, once
    seed: int | None = None  # None: drawn at admission, reported in the result


MAX_LOGIT_BIASES = 300  # tokens that one request may favour or disfavour, as with OpenAI
MAX_MERGED_ADAPTERS = 16


class ConstraintKind(Enum):
    """The language that a constraint's ``source`` is written in."""

    JSON_SCHEMA = "json_schema"  # JSON text of a schema; "{}" is any JSON object or array
    REGEX = "regex"  # of the whole answer
    CHOICE = "choice"  # JSON text of a list of strings: the answer is one of them
    GRAMMAR = "grammar"  # Lark, as llguidance reads it


@dataclass(frozen=True)
class Constraint:
    """What the answer's text must be. Hashable: compiled grammars are kept by it."""

    kind: ConstraintKind
    source: str


class MergeStrategy(Enum):
    """As PEFT's ``add_weighted_adapter`` names and defines them."""

    LINEAR = "linear"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    CAT = "cat"
    SVD = "svd"


class MajoritySign(Enum):
    """How TIES elects a sign: by the sum of values, or by the number of signs."""

    TOTAL = "total"
    FREQUENCY = "frequency"


@dataclass(frozen=True)
class AdapterMerge:
    """Several adapters as one, made when it is first asked for and kept by what it says.

    ``density`` is the share of values that TIES and DARE keep, in (0, 1]; ``seed`` draws DARE's
    masks, so that equal merges are equal. ``rank`` is SVD's, None for the largest of the parts.
    """

    adapter_ids: tuple[str, ...]
    weights: tuple[float, ...]
    strategy: MergeStrategy = MergeStrategy.LINEAR
    density: float = 1.0
    majority_sign: MajoritySign = MajoritySign.TOTAL
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt, one answer.

    ``prompt`` is text, or token ids taken as they are. ``max_new_tokens`` None means the rest of
    the context. ``num_top_logprobs`` asks for that many alternatives per token (0..20).
    ``logit_bias`` holds (token id, what is added to its logit), an id once.
    """

    prompt: str | tuple[int, ...]
    adapter_id: str | None = None  # None: the base model
    adapter_source: str | None = None  # None, or "local"
    tenant: str = "default"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_text: bool = True  # LoRAX keeps the stop string in the text, OpenAI strips it
    add_special_tokens: bool = True  # False for text from a chat template
    truncate: int | None = None  # keep only the last N prompt tokens
    num_top_logprobs: int = 0
    prompt_logprobs: bool = False
    detokenize: bool = True  # False: token ids alone, every text stays empty
    merge: AdapterMerge | None = None  # instead of adapter_id
    adapter_scale: float = 1.0  # multiplies the adapter's own scaling
    constraint: Constraint | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0  # no stop token is drawn before so many


@dataclass(frozen=True)
class TokenAlternative:
    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
    """One generated token. ``text`` is what it adds to the answer: "" while a character is
    incomplete or a stop string may be beginning, and then the held text comes with a later token.
    ``logprob`` is of the raw distribution, in nats."""

    id: int
    text: str
    logprob: float
    special: bool
    alternatives: tuple[TokenAlternative, ...] = ()


@dataclass(frozen=True)
class PromptToken:
    id: int
    text: str
    logprob: float | None  # None for the first token
    alternatives: tuple[TokenAlternative, ...] = ()


@dataclass(frozen=True)
class GenerateResult:
    text: str
    finish_reason: FinishReason
    tokens: tuple[Token, ...]
    prompt_token_ids: tuple[int, ...]
    seed: int | None  # None when greedy
    prompt_tokens: tuple[PromptToken, ...] = ()  # only with prompt_logprobs
    queue_s: float = 0.0
    time_to_first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class TokenEvent:
    """One item of a stream; the last one carries the whole result."""

    token: Token
    index: int
    result: GenerateResult | None = None


@dataclass(frozen=True)
class EmbedRequest:
    """One text, one vector. ``prompt`` is text, or token ids taken as they are."""

    prompt: str | tuple[int, ...]
    adapter_id: str | None = None  # None: the base model
    adapter_source: str | None = None  # None, or "local"
    tenant: str = "default"
    add_special_tokens: bool = True
    truncate: int | None = None  # keep only the last N prompt tokens


@dataclass(frozen=True)
class EmbedResult:
    """``embedding`` has the model's width."""

    embedding: tuple[float, ...]
    num_tokens: int


class Tier(Enum):
    """The fastest place where an adapter's weights are."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    SOURCE = "source"


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter, as the API lists it. ``size_bytes`` is its packed size, None before a load."""

    adapter_id: str
    tenant: str
    generation: int
    source: str
    tier: Tier
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int | None
    num_requests: int
    last_used_s: float | None  # Unix time
    pinned: bool = False  # by an operator: it stays in the bank


@dataclass(frozen=True)
class ModelInfo:
    """What /info and the front ends need of the base model."""

    model_id: str
    architecture: str
    dtype: str
    device: str
    vocab_size: int
    max_seq_len: int
    max_batch: int
    max_rank: int
    max_slots: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class TierStats:
    """One adapter tier. Hits and misses count requests, ``evictions`` adapters.

    ``max_bytes`` None: it has no limit of its own.
    """

    tier: Tier
    num_adapters: int
    used_bytes: int
    max_bytes: int | None
    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for /health and /metrics: counts now, and totals since the start."""

    state: str  # "starting" | "ready" | "draining" | "dead"
    num_queued: int
    num_running: int
    free_pages: int
    total_pages: int
    pinned_slots: int
    used_slots: int
    executables_compiled_after_ready: int
    tiers: tuple[TierStats, ...] = ()
