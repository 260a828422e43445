"""What ``benchmarks serving`` can run, by name, and what each run must show. Data, plain.

Targets and peers' figures of an H100 are those of Llama-2-7B's shape, adapters of rank 16 on
q, k, v, o unless said. vLLM is 0.22.0, offline, max_loras 64 (closed) or 8 (open loop).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from benchmarks.make_adapters import ATTENTION
from benchmarks.report import Bound
from benchmarks.workload import (
    Closed,
    Distinct,
    Fixed,
    Gamma,
    Groups,
    Hog,
    Identical,
    Open,
    PerAdapter,
    Popularity,
    PowerLaw,
    PunicaLengths,
    Recipe,
    ShareGptLike,
    Uniform,
    UniformLengths,
    Zipf,
)

_QUICK_STEADY, _QUICK_STEADY_OUT = 4, 48


@dataclass(frozen=True)
class AdapterKind:
    """Adapters that are alike. ``name`` is their folder's."""

    name: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]


R16 = AdapterKind("r16-qkvo", (16,), ATTENTION)
R8 = AdapterKind("r8-qkvo", (8,), ATTENTION)
MIXED = AdapterKind("r64-32-16-8-qkvo", (64, 32, 16, 8), ATTENTION)
R4 = AdapterKind("r4-qv", (4,), ("q_proj", "v_proj"))


class Kind(Enum):
    """How a preset is run."""

    WORKLOAD = "workload"
    LOADS = "loads"  # a steady batch, and cold loads beside it
    FIRST_TOKEN = "first token"  # one request at a time, by the tier that its adapter is in


@dataclass(frozen=True)
class Room:
    """What the engine gets for adapters; the settings of ``jlorax serve`` follow from it.

    ``bank`` and ``host``: bytes of so many adapters of the preset's kind; None: the default.
    """

    max_slots: int = 256
    bank: int | None = None
    host: int | None = None
    host_bytes: str | None = None

    def quick(self) -> Room:
        """Slots instead of bytes: a bank has room for the largest adapter, so for many small."""
        slots = 8 if self.bank is None else 2
        return Room(min(self.max_slots, slots), host=6 if self.host is not None else None)


_DEFAULT = Room()
_ALL_IN_RAM = Room(host_bytes="40GiB")
_A_ROW_EACH = Room(bank=256, host_bytes="40GiB")  # as many adapters as sequences run at once
_BANK_OF_8 = Room(bank=8, host=80)
_SLOTS_OF_8 = Room(max_slots=8)


@dataclass(frozen=True)
class Share:
    """A rate: this share of what another preset's run answered per second, at its steadiest."""

    of: str
    share: float


@dataclass(frozen=True)
class Promise:
    """One figure of a run, by its path in the results. ``over``: divided by another preset's.
    ``is_of_h100``: it is about that card and shape; else it holds anywhere."""

    what: str
    figure: str
    bound: Bound
    peer: str = "-"
    over: str | None = None
    is_of_h100: bool = True


@dataclass(frozen=True)
class Preset:
    """``after``: runs that must come before it on the same engine. ``shares``: it asks for the same
    adapters as that preset; else for some that nobody touched. ``touched``: each adapter of the
    workload is asked once before the clock starts."""

    name: str
    recipe: Recipe
    adapters: AdapterKind = R16
    room: Room = _DEFAULT
    kind: Kind = Kind.WORKLOAD
    after: tuple[str, ...] = ()
    shares: str | None = None
    touched: bool = False
    load: Share | None = None
    promises: tuple[Promise, ...] = field(default=())

    def quick(self) -> Preset:
        recipe = self.recipe.quick()
        if self.kind is Kind.LOADS:  # most adapters stay cold, and there is time for some to come
            recipe = replace(recipe, traffic=Closed(_QUICK_STEADY), max_out=_QUICK_STEADY_OUT)
        return replace(self, recipe=recipe, room=self.room.quick())

    def with_load(self, rate: float | None, duration_s: float | None) -> Preset:
        """Open-loop traffic at this rate, for so long; a closed load has neither."""
        traffic = self.recipe.traffic
        if not isinstance(traffic, Open):
            return self
        return replace(
            self, recipe=replace(self.recipe, traffic=traffic.with_load(rate, duration_s))
        )


_SLOW, _FAST = (0.1, 0.05, 0.025), (1.6, 0.8, 0.4)
_CLOSED = Closed(512)
_FIXED = Fixed(256, 128)
_OPEN_64_RATE = 3.775  # 64 adapters at 0.1, 0.05 and 0.025 in turn


def _tokens(low: float, peer: str) -> tuple[Promise, ...]:
    return (Promise("output tokens/s", "output_tokens_per_s", Bound(low=low), peer),)


def _ttft(mean: float, p99: float, peer_mean: str, peer_p99: str) -> tuple[Promise, ...]:
    return (
        Promise("TTFT mean, ms", "ttft_ms.mean", Bound(high=mean), peer_mean),
        Promise("TTFT p99, ms", "ttft_ms.p99", Bound(high=p99), peer_p99),
    )


def _closed() -> list[Preset]:
    zipf = Recipe(_CLOSED, Zipf(1.0), _FIXED, 1000)
    return [
        Preset("closed-1000-zipf", zipf, room=_A_ROW_EACH, promises=_tokens(6300, "1,758")),
        Preset(
            "closed-1000-zipf-warm",
            zipf,
            room=_A_ROW_EACH,
            after=("closed-1000-zipf",),
            shares="closed-1000-zipf",
            promises=_tokens(7000, "1,845"),
        ),
        Preset(
            "closed-1000-uniform",
            replace(zipf, popularity=Uniform()),
            room=_A_ROW_EACH,
            promises=_tokens(6000, "1,024"),
        ),
    ]


def _slora() -> list[Preset]:
    """arXiv:2311.03285, its synthetic settings S1 (rank 8) and S2 (ranks 64 to 8)."""
    synthetic = Recipe(Gamma(10.0, 60.0), PowerLaw(1.0), UniformLengths(), 2000)
    few = replace(synthetic, num_adapters=5)
    common = Preset("slora-s1", synthetic, R8, _ALL_IN_RAM)
    load = Share("slora-s1-capacity", 0.9)
    kept = Promise(
        "requests/s, 2000 / 5 adapters",
        "requests_per_s",
        Bound(low=0.98),
        "0.945 (S-LoRA)",
        over="slora-s1-5",
        is_of_h100=False,
    )
    return [
        common,
        replace(common, name="slora-s2", adapters=MIXED),
        replace(common, name="slora-s1-capacity", recipe=replace(few, traffic=Closed(1000))),
        replace(
            common,
            name="slora-s1-5",
            recipe=few,
            after=("slora-s1-capacity",),
            shares="slora-s1-capacity",
            touched=True,
            load=load,
        ),
        replace(
            common,
            name="slora-s1-2000",
            after=("slora-s1-capacity", "slora-s1-5"),
            touched=True,
            load=load,
            promises=(kept,),
        ),
    ]


def _open() -> list[Preset]:
    """The reference page's open loop; every adapter has been asked once, so none is cold."""
    many = Recipe(PerAdapter(_OPEN_64_RATE, 45.0, _SLOW), None, ShareGptLike(), 64)
    few = replace(many, traffic=PerAdapter(4.0, 45.0, _SLOW), num_adapters=16)
    cold = Recipe(Gamma(20.0, 4.0), Distinct(), ShareGptLike(), 64)
    return [
        Preset("open-64", many, touched=True, promises=_ttft(35, 120, "933", "3,490")),
        Preset(
            "open-64-bank8",
            many,
            room=_BANK_OF_8,
            touched=True,
            promises=_ttft(150, 1000, "933", "3,490"),
        ),
        Preset(
            "open-16-bank8",
            few,
            room=_BANK_OF_8,
            touched=True,
            promises=_ttft(40, 200, "81", "897"),
        ),
        Preset("cold-64", cold, promises=_ttft(100, 300, "3,142", "4,439")),
        Preset("starvation-64", many, room=_SLOTS_OF_8, touched=True),
        Preset("starvation-16", few, room=_SLOTS_OF_8, touched=True),
        Preset("per-adapter-slow", replace(many, num_adapters=96)),
        Preset(
            "per-adapter-fast",
            replace(many, traffic=PerAdapter(15.0, 45.0, _FAST), num_adapters=16),
        ),
    ]


def _tiers() -> list[Preset]:
    """``first-token``: more adapters than RAM holds come round; its recipe only counts them."""
    one_token = Recipe(Closed(160, max_at_once=1), Distinct(), Fixed(16, 1), 160)
    steady = Recipe(Closed(32), Distinct(), Fixed(128, 512), 1000)
    return [
        Preset(
            "first-token",
            one_token,
            room=_BANK_OF_8,
            kind=Kind.FIRST_TOKEN,
            promises=(
                Promise(
                    "disk tier to first token, above a resident one, ms",
                    "above_resident_ms.disk",
                    Bound(high=40),
                    "83 to 263",
                ),
                Promise(
                    "RAM to first token, above a resident one, ms",
                    "above_resident_ms.host",
                    Bound(high=1.5),
                    "8 (the copy)",
                ),
            ),
        ),
        Preset(
            "loads-20",
            steady,
            kind=Kind.LOADS,
            promises=(
                Promise(
                    "ITL p99 during 20 cold loads a second / none",
                    "itl_p99_over_none.prefetched",
                    Bound(high=1.1),
                    is_of_h100=False,
                ),
            ),
        ),
    ]


def _registered() -> list[Preset]:
    recipe = Recipe(Gamma(20.0, 240.0), Zipf(1.0), _FIXED, 10_000)
    # answers of equal length end in waves: many waves, or the steady rate counts two in one's time
    sustained = Closed(2048, max_at_once=512)
    return [
        Preset("registered-capacity", replace(recipe, traffic=sustained), R4),
        Preset(
            "registered-10000",
            recipe,
            R4,
            after=("registered-capacity",),
            shares="registered-capacity",
            load=Share("registered-capacity", 0.7),
            promises=(
                Promise("errors", "num_errors", Bound(high=1), is_of_h100=False),
                Promise("TTFT p99, ms", "ttft_ms.p99", Bound(high=1000)),
                Promise(
                    "memory, % a minute",
                    "memory.slope_percent_per_min",
                    Bound(high=1),
                    is_of_h100=False,
                ),
            ),
        ),
    ]


def _hog() -> list[Preset]:
    traffic = Hog(58.0, 30.0)
    recipe = Recipe(traffic, Zipf(1.0), _FIXED, 64)
    alone = replace(recipe, traffic=replace(traffic, with_hog=False))
    return [
        Preset("hog-without", alone, touched=True),
        Preset(
            "hog",
            recipe,
            after=("hog-without",),
            shares="hog-without",
            touched=True,
            promises=tuple(
                Promise(
                    f"the others' {what} p99, with the hog / without",
                    figure,
                    Bound(high=1.5),
                    over="hog-without",
                    is_of_h100=False,
                )
                for what, figure in (("E2E", "others_e2e_ms.p99"), ("TTFT", "others_ttft_ms.p99"))
            ),
        ),
    ]


def _punica() -> list[Preset]:
    """arXiv:2310.18547: 1000 requests, 32 at a time; its uniform has ceil(sqrt n) adapters."""
    popularity: dict[str, tuple[Popularity, int]] = {
        "identical": (Identical(), 1),
        "distinct": (Distinct(), 1000),
        "uniform": (Uniform(), 32),
        "zipf": (Groups(1.5), 16),
    }
    return [
        Preset(
            f"punica-{name}", Recipe(Closed(1000, max_at_once=32), kind, PunicaLengths(), number)
        )
        for name, (kind, number) in popularity.items()
    ]


def _zipf() -> list[Preset]:
    return [
        Preset(f"zipf-{s:g}-{number}", Recipe(Gamma(20.0, 30.0), Zipf(s), _FIXED, number))
        for s in (0.8, 1.0, 1.2)
        for number in (64, 1000, 5000)
    ]


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for made in (_closed, _slora, _open, _tiers, _registered, _hog, _punica, _zipf)
    for preset in made()
}

H100 = (
    "closed-1000-zipf",
    "closed-1000-zipf-warm",
    "closed-1000-uniform",
    "slora-s1-2000",
    "open-64",
    "open-64-bank8",
    "open-16-bank8",
    "cold-64",
    "first-token",
    "registered-10000",
    "loads-20",
)
"""The rows of the issue's table, in its order, and loads beside a steady batch."""


def in_order(names: list[str]) -> list[Preset]:
    """Each once, behind those it needs; presets of one engine stand together."""
    found: dict[str, Preset] = {}
    for name in names:
        for needed in (*PRESETS[name].after, name):
            found.setdefault(needed, PRESETS[needed])
    rooms = list(dict.fromkeys(preset.room for preset in found.values()))
    return sorted(found.values(), key=lambda preset: rooms.index(preset.room))
