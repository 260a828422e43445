"""Results of kernels as compact text: one table an op, one line a case. Plain: no jax."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from benchmarks.kernels.results import EMPTY, HOST_BOUND, OURS, Result
from benchmarks.text_table import text_table

_NOTE_CHARS = 150
_CAPTION = f"  {OURS}/target: less the {EMPTY} chain"


def op_table(op: str, results: Sequence[Result]) -> str:
    """case, floor, target, each contestant's microseconds and error, ours / target."""
    names = list(dict.fromkeys(r.contestant for r in results))
    rows = [_case_row(list(of_case), names) for _, of_case in groupby(results, lambda r: r.case)]
    headings = [f"{op}, us a call", "floor", "target", *names, f"{OURS}/target"]
    caption = [_CAPTION] if any(name.startswith(EMPTY) for name in names) else []
    return "\n".join([text_table(headings, rows), *caption, *_notes(results)])


def _case_row(results: list[Result], names: list[str]) -> list[str]:
    found = {r.contestant: r for r in results}
    case, target_us = results[0], results[0].target_us
    cells = [_cell(found[name]) if name in found else "" for name in names]
    net = _ours_net_us(results)
    ratio = "" if net is None or target_us is None else f"{net / target_us:.2f}"
    return [
        case.case,
        _us(case.floor_us),
        "" if target_us is None else _us(target_us),
        *cells,
        ratio,
    ]


def _ours_net_us(results: Sequence[Result]) -> float | None:
    """The best of ours, less the empty chain where the case has one: targets leave it out."""
    ours = [r.us.median for r in results if r.us is not None and r.contestant.startswith(OURS)]
    empty = [r.us.median for r in results if r.us is not None and r.contestant.startswith(EMPTY)]
    return min(ours) - min(empty, default=0.0) if ours else None


def _cell(result: Result) -> str:
    """ "12.3 4e-03": microseconds and error; "?" was not compared, "h" is host-bound."""
    if result.us is None:
        return "wrong" if result.error is not None else "failed"
    error = "?" if result.error is None else f"{result.error:.0e}"
    return f"{_us(result.us.median)}{'h' if result.note == HOST_BOUND else ''} {error}"


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def _notes(results: Sequence[Result]) -> list[str]:
    """Why something was not timed, in short; equal reasons once."""
    notes: dict[tuple[str, str], list[str]] = {}
    for r in results:
        if r.us is None:
            notes.setdefault((r.contestant, r.note[:_NOTE_CHARS]), []).append(r.case)
    return [
        f"  {contestant}: {note} [{cases[0]}{f' and {len(cases) - 1} more' if cases[1:] else ''}]"
        for (contestant, note), cases in notes.items()
    ]


def sweep_lines(results: Sequence[Result], best: int) -> str:
    """The quickest candidates of every case; a candidate's name is its line in tuning.py."""
    lines = []
    for case, of_case in groupby(results, lambda r: r.case):
        candidates = list(of_case)
        timed = sorted((r for r in candidates if r.us is not None), key=_median)
        lost = f", {len(candidates) - len(timed)} not timed" if len(timed) < len(candidates) else ""
        floor = _us(candidates[0].floor_us)
        lines.append(f"# {candidates[0].op}, {case}: floor {floor} us, {len(timed)} timed{lost}")
        lines += [f"{r.contestant},  # {_median(r):.2f} us" for r in timed[:best]]
        lines += _notes(candidates) if not timed else []
    return "\n".join(lines)


def _median(result: Result) -> float:
    assert result.us is not None
    return result.us.median
