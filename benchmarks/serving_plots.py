"""Plots of a serving run, a PNG a preset. matplotlib is needed here alone: extra ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving_figures import ttft_s
from benchmarks.serving_load import Answers

_MOST_BINS = 120


def check() -> None:
    """Raises SystemExit before anything is measured that could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("--plots needs matplotlib: pip install 'jlorax[bench]'") from None


def plot(folder: Path, preset: str, answers: Answers) -> Path | None:
    """TTFT's distribution, TTFT by arrival, tokens/s over time. None: nothing was answered."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = [answer for answer in answers.found if answer.error is None]
    if not whole:
        return None
    start_s = answers.start_s
    figure, (cdf, over_time, rate) = pyplot.subplots(3, 1, figsize=(8, 11), layout="constrained")
    ttfts_ms = [1e3 * ttft_s(answer) for answer in whole]
    _draw_cdf(cdf, ttfts_ms)
    _draw_over_time(over_time, [answer.start_s - start_s for answer in whole], ttfts_ms)
    times = np.concatenate([answer.token_times_s for answer in whole])
    _draw_rate(rate, times - start_s)
    figure.suptitle(preset)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{preset}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw_cdf(axes: Any, ttfts_ms: list[float]) -> None:
    axes.plot(np.sort(ttfts_ms), np.arange(1, len(ttfts_ms) + 1) / len(ttfts_ms))
    axes.set(xlabel="TTFT, ms", ylabel="share of the requests", xscale="log", ylim=(0, 1))


def _draw_over_time(axes: Any, starts_s: list[float], ttfts_ms: list[float]) -> None:
    axes.scatter(starts_s, ttfts_ms, s=6)
    axes.set(xlabel="arrival, s", ylabel="TTFT, ms", yscale="log")


def _draw_rate(axes: Any, times_s: np.ndarray) -> None:
    bins = int(np.clip(times_s.max(), 10, _MOST_BINS))
    counts, edges = np.histogram(times_s, bins, (0.0, float(times_s.max())))
    axes.stairs(counts / np.diff(edges), edges)
    axes.set(xlabel="s", ylabel="output tokens/s")
