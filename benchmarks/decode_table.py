"""Figures of the whole engine beside others' and the targets. Plain: no clock, no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.decode_cases import Case, Sample
from benchmarks.h100_peers import SAMPLING_OVER_GREEDY, Peer
from benchmarks.report import Spread
from benchmarks.text_table import text_table


@dataclass(frozen=True)
class Row:
    """One case over all its rounds. Shares are of time: below 1 we are ahead."""

    case: str
    unit: str
    ours: Spread
    tokens_per_s: float
    peer: Peer
    share_of_vllm: float | None
    share_of_target: float | None


def rows(cases: Sequence[Case], samples: Sequence[Sample], peers: Mapping[str, Peer]) -> list[Row]:
    """Cases that have at least one round, in order."""
    found = {case.name: [s for s in samples if s.case == case.name] for case in cases}
    measured = [case for case in cases if found[case.name]]
    ours = {case.name: case.figures(found[case.name]) for case in measured}
    return [
        _row(case, ours[case.name], found[case.name], _peer(case, peers, ours)) for case in measured
    ]


def _row(case: Case, ours: Spread, samples: Sequence[Sample], peer: Peer) -> Row:
    def share(other: float | None) -> float | None:
        return None if other is None else case.share(ours.median, other)

    rate = median(case.tokens_per_s(sample) for sample in samples)
    return Row(case.name, case.unit, ours, rate, peer, share(peer.vllm), share(peer.target))


def _peer(case: Case, peers: Mapping[str, Peer], ours: Mapping[str, Spread]) -> Peer:
    """A sampling step is held against our own greedy one."""
    peer = peers.get(case.name, Peer())
    greedy = ours.get(case.name.replace("sampling", "decode"))
    if case.group != "sampling" or greedy is None:
        return peer
    return replace(peer, target=SAMPLING_OVER_GREEDY * greedy.median)


def as_text(found: Sequence[Row]) -> str:
    headings = ["case", "ours", "", "low..high", "tok/s", "vLLM", "tok/s", "/vLLM"]
    headings += ["target", "goal", "/target", ""]
    return text_table(headings, [_cells(row) for row in found])


def _cells(row: Row) -> list[str]:
    peer = row.peer
    missed = row.share_of_target is not None and row.share_of_target > 1
    return [
        row.case,
        _figure(row.ours.median),
        row.unit,
        f"{_figure(row.ours.low)}..{_figure(row.ours.high)}",
        f"{row.tokens_per_s:.0f}",
        _figure(peer.vllm),
        "" if peer.vllm_tokens_per_s is None else f"{peer.vllm_tokens_per_s:.0f}",
        _share(row.share_of_vllm),
        _figure(peer.target),
        _figure(peer.goal),
        _share(row.share_of_target),
        "missed" if missed else "",
    ]


def _figure(value: float | None) -> str:
    """Three or four significant digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
