"""What actors send each other: frozen, and the only thing they share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from jlorax.actors.stream import TokenStream
from jlorax.adapters.loader import Spooled
from jlorax.adapters.pack import PackedAdapter
from jlorax.adapters.registry import Seen
from jlorax.adapters.remote_names import Found, Question
from jlorax.adapters.sources import LocalFiles
from jlorax.device.device import HostOutput
from jlorax.errors import JLoraxError
from jlorax.layout import LoraReach, SlotWrite
from jlorax.scheduling.sequence import Sequence
from jlorax.scheduling.step_plan import StepPlan
from jlorax.types import (
    AdapterInfo,
    AdapterMerge,
    AdapterVersion,
    Constraint,
    GenerateRequest,
    Tier,
)

if TYPE_CHECKING:
    import numpy as np

# ---- to ingress


@dataclass(frozen=True)
class Submit:
    """``wants_embedding``: of the prompt, and no token."""

    request: GenerateRequest
    stream: TokenStream
    wants_embedding: bool = False


# ---- to the scheduler


@dataclass(frozen=True)
class Admit:
    sequence: Sequence


@dataclass(frozen=True)
class Wake:
    """A stream's cancel flag was raised; the flag itself says which."""


@dataclass(frozen=True)
class StepDone:
    plan: StepPlan
    output: HostOutput


@dataclass(frozen=True)
class AdapterAtHand:
    """Its weights are in RAM or in the bank."""

    version: AdapterVersion


@dataclass(frozen=True)
class AdapterLoading:
    """It was acquired and its weights are not in RAM: they are loaded first."""

    version: AdapterVersion


@dataclass(frozen=True)
class AdapterUnloadable:
    """Its load failed before anybody acquired it."""

    version: AdapterVersion
    error: JLoraxError


@dataclass(frozen=True)
class AdapterReady:
    """An Acquire's answer: pinned, and its write is on the way to the device."""

    version: AdapterVersion
    slot: int
    reach: LoraReach


@dataclass(frozen=True)
class AdapterFailed:
    """An Acquire's other answer."""

    version: AdapterVersion
    error: JLoraxError


@dataclass(frozen=True)
class MaskReady:
    """An AcceptToken's answer: what may come next, i32[ceil(V / 32)], a bit a token."""

    sequence: Sequence
    mask: np.ndarray


@dataclass(frozen=True)
class GrammarEnded:
    """Its second answer: the token was the last, nothing may follow."""

    sequence: Sequence


@dataclass(frozen=True)
class GrammarFailed:
    """Its third answer."""

    sequence: Sequence
    error: JLoraxError


@dataclass(frozen=True)
class GrammarAnswers:
    """Of the tokens that one thread was given."""

    answers: tuple[MaskReady | GrammarEnded | GrammarFailed, ...]


# ---- to the runner


@dataclass(frozen=True)
class RunStep:
    plan: StepPlan


@dataclass(frozen=True)
class WriteSlot:
    write: SlotWrite


@dataclass(frozen=True)
class DeviceFault:
    error: Exception


# ---- to the grammars


class GrammarStart(NamedTuple):
    """A sequence's own place in its grammar, and what may come first: i32[ceil(V / 32)]."""

    matcher: Any
    mask: np.ndarray


@dataclass(frozen=True)
class CompileGrammar:
    constraint: Constraint
    reply: asyncio.Future[GrammarStart]


@dataclass(frozen=True)
class AcceptToken:
    """A sequence that has a matcher drew it and goes on."""

    sequence: Sequence
    token: int


@dataclass(frozen=True)
class AcceptTokens:
    """Of one step."""

    tokens: tuple[AcceptToken, ...]


# ---- to the cache


@dataclass(frozen=True)
class Resolve:
    tenant: str
    adapter_id: str
    source: str | None
    reply: asyncio.Future[AdapterVersion]


@dataclass(frozen=True)
class LocateAdapter:
    """Where an adapter's own files are. None: not in a folder of this machine."""

    tenant: str
    adapter_id: str
    source: str | None
    reply: asyncio.Future[LocalFiles | None]


@dataclass(frozen=True)
class Derive:
    """What a merge makes of these versions, resolved before in its order."""

    merge: AdapterMerge
    parts: tuple[AdapterVersion, ...]
    reply: asyncio.Future[AdapterVersion]


@dataclass(frozen=True)
class Prefetch:
    """A request that names it was queued; Forget follows when that request is over."""

    version: AdapterVersion


@dataclass(frozen=True)
class Forget:
    version: AdapterVersion


@dataclass(frozen=True)
class Acquire:
    version: AdapterVersion


@dataclass(frozen=True)
class Release:
    version: AdapterVersion


@dataclass(frozen=True)
class Loaded:
    """``seconds``: what the load took. ``kept_is_damaged``: its file in the disk tier was."""

    version: AdapterVersion
    packed: PackedAdapter
    tier: Tier
    seconds: float
    kept_is_damaged: bool


@dataclass(frozen=True)
class LoadFailed:
    """``error`` None: it was given up, because nobody wanted it any more."""

    version: AdapterVersion
    error: JLoraxError | None


@dataclass(frozen=True)
class SpoolDone:
    """A packed file lies beside the disk tier's own. None: the disk would not take it."""

    spooled: Spooled | None


@dataclass(frozen=True)
class Described:
    """What remotes said of a name."""

    question: Question
    answer: Found | JLoraxError


@dataclass(frozen=True)
class Scanned:
    """What lies under the adapter root, for a ListAdapters."""

    request: ListAdapters
    seen: list[Seen]


@dataclass(frozen=True)
class LoadAdapter:
    """``replace``: the name may be taken; running requests keep what they started with."""

    tenant: str
    adapter_id: str
    folder: str
    replace: bool
    reply: asyncio.Future[AdapterInfo]


@dataclass(frozen=True)
class UnloadAdapter:
    tenant: str
    adapter_id: str
    force: bool
    reply: asyncio.Future[None]


@dataclass(frozen=True)
class PrefetchAdapter:
    """Answered once it is in RAM."""

    tenant: str
    adapter_id: str
    reply: asyncio.Future[AdapterInfo]


@dataclass(frozen=True)
class PinAdapter:
    """``pinned``: answered once it is in the bank, where it stays until it is unpinned."""

    tenant: str
    adapter_id: str
    pinned: bool
    reply: asyncio.Future[AdapterInfo]


@dataclass(frozen=True)
class ListAdapters:
    tenant: str
    reply: asyncio.Future[list[AdapterInfo]]


IngressMessage = Submit
SchedulerMessage = (
    Admit
    | Wake
    | StepDone
    | AdapterAtHand
    | AdapterLoading
    | AdapterUnloadable
    | AdapterReady
    | AdapterFailed
    | GrammarAnswers
)
GrammarMessage = CompileGrammar | AcceptTokens
RunnerMessage = RunStep | WriteSlot | DeviceFault
CacheMessage = (
    Resolve
    | LocateAdapter
    | Derive
    | Prefetch
    | Forget
    | Acquire
    | Release
    | Loaded
    | LoadFailed
    | SpoolDone
    | Described
    | Scanned
    | LoadAdapter
    | UnloadAdapter
    | PrefetchAdapter
    | PinAdapter
    | ListAdapters
)
