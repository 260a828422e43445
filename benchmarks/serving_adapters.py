"""The adapters of a command's presets: which numbers are whose, and their folders.

A few weight files stand for all: the other folders hold links to them and a config of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.make_adapters import make_adapters
from benchmarks.serving_presets import AdapterKind, Preset
from benchmarks.upload import adapter_name

NUM_FILES = 64
DTYPE = "bfloat16"


def numbers(presets: Sequence[Preset]) -> dict[str, range]:
    """By preset's name, in order: every preset has its own of its kind, unless it shares."""
    found: dict[str, range] = {}
    used: dict[AdapterKind, int] = {}
    for preset in presets:
        if preset.shares is not None:
            found[preset.name] = found[preset.shares]
            continue
        first = used.get(preset.adapters, 0)
        used[preset.adapters] = first + preset.recipe.num_adapters
        found[preset.name] = range(first, used[preset.adapters])
    return found


def name_of(preset: Preset, own: range, prefix: str | None) -> Callable[[int], str]:
    """From a workload's adapter number to the name that the target knows it by.

    ``prefix`` None: the folder of its kind, below the adapter root.
    """
    start = f"{preset.adapters.name}/" if prefix is None else prefix
    return lambda number: start + adapter_name(own[number])


def prepare(
    root: Path, model: Path, presets: Sequence[Preset], seed: int, say: Callable[[str], None]
) -> None:
    """Makes what is not below ``root`` yet, and reads every weight file into the page cache."""
    own = numbers(presets)
    needed: dict[AdapterKind, int] = {}
    for preset in presets:
        kind = preset.adapters
        needed[kind] = max(needed.get(kind, 0), own[preset.name].stop)
    for kind, num in needed.items():
        folder = root / kind.name
        if not _is_made(folder, model, kind, num, seed):
            say(f"making {num} adapters, {kind.name}")
            make_adapters(
                model,
                folder,
                num,
                ranks=kind.ranks,
                targets=kind.targets,
                seed=seed,
                dtype=DTYPE,
                hard_link=NUM_FILES,
            )
            _note(folder).write_text(json.dumps(_made(model, kind, num, seed)))
        for i in range(min(num, NUM_FILES)):
            (folder / adapter_name(i) / "adapter_model.safetensors").read_bytes()


def _note(folder: Path) -> Path:
    return folder.with_suffix(".json")


def _is_made(folder: Path, model: Path, kind: AdapterKind, num: int, seed: int) -> bool:
    """As many as that at least, of this shape and seed."""
    if not _note(folder).is_file():
        return False
    made = json.loads(_note(folder).read_text())
    return bool(made == _made(model, kind, made["num"], seed) and made["num"] >= num)


def _made(model: Path, kind: AdapterKind, num: int, seed: int) -> dict[str, object]:
    shape = json.loads((model / "config.json").read_text())
    return {
        "num": num,
        "shape": shape,
        "ranks": list(kind.ranks),
        "targets": list(kind.targets),
        "seed": seed,
        "dtype": DTYPE,
        "files": NUM_FILES,
    }
