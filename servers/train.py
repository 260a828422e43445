"""``jlorax train``: what is being trained and how it goes, as bars or as JSON lines.

jax is imported only when a training, or a plan of one, begins.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, Field, asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from rich.console import Console
from rich.table import Table

from jlorax.errors import JLoraxError
from jlorax.training.aliases import config_from_mapping, read_mapping
from jlorax.training.bars import TrainingBars
from jlorax.training.config import SECTIONS, TrainConfig
from jlorax.training.events import Event, Failed, Report
from jlorax.training.process import HUGE_PAGES, environment
from jlorax.training.values import hint_of_key

if TYPE_CHECKING:
    from jlorax.training.plan import TrainPlan

CANCELLED = 130  # the exit status, as a shell has it for an interrupt
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ALSO = {"dataset": ("--data",)}  # shorter names of flags


# ---- flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A file, and every key of a configuration as a flag."""
    parser.add_argument("config", nargs="?", metavar="CONFIG.YAML", help="keys; flags win over it")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")
    parser.add_argument("--json", action="store_true", help="JSON lines, on a terminal too")
    parser.add_argument("--base", metavar="DIR|GGUF|HUB_ID", help="(default: the embedded model)")
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(section, _about(kind))
        for field in fields(kind):
            _add_flag(group, field)


def _about(kind: type[Any]) -> str:
    return " ".join((kind.__doc__ or "").replace("``", "").split())


def _add_flag(group: argparse._ArgumentGroup, field: Field[Any]) -> None:
    names = (*_ALSO.get(field.name, ()), "--" + field.name.replace("_", "-"))
    help_text = "" if field.default in (MISSING, None) else f"(default: {field.default})"
    kind = _kind(field.name)
    if kind is bool:
        group.add_argument(
            *names, dest=field.name, action=argparse.BooleanOptionalAction, help=help_text
        )
        return
    group.add_argument(*names, dest=field.name, metavar=_metavar(kind), help=help_text)


def _kind(key: str) -> Any:
    """The key's type without the None that stands for its default."""
    hint = hint_of_key(key)
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    is_optional = type(None) in get_args(hint)
    return kinds[0] if is_optional and len(kinds) == 1 else hint


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "N", float: "X", str: "TEXT"}.get(kind, "NAME,NAME")


def config_of(flags: Mapping[str, Any]) -> TrainConfig:
    """The file's keys, if there is one, under the flags that were given. Raises ConfigError."""
    keys = ("base", *(field.name for kind in SECTIONS.values() for field in fields(kind)))
    given = {key: flags[key] for key in keys if flags.get(key) is not None}
    file = flags.get("config")
    return config_from_mapping({} if file is None else read_mapping(Path(file)), given)


# ---- the training


def with_huge_pages() -> None:
    """Begins this program again where its allocator would use small pages: it reads what it should
    do when a process starts."""
    if sys.platform == "linux" and not HUGE_PAGES.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, environment())


def train(config: TrainConfig, cache_dir: Path, *, as_json: bool) -> int:
    """Exit status. The first SIGINT or SIGTERM cancels with a checkpoint, a second ends at once."""
    with _cancellation() as is_cancelled, _shown(as_json) as report:
        try:
            from jlorax.training.run import train as run

            published = run(config, cache_dir, report, is_cancelled)
        except JLoraxError as error:
            report(Failed(error.code, str(error)))
            raise
    out = sys.stderr if as_json else sys.stdout
    if published is None:
        print("cancelled; the same command continues it", file=out)
        return CANCELLED
    print(usage(config, published.adapter_id), file=out)
    return 0


def usage(config: TrainConfig, adapter_id: str) -> str:
    base = "" if config.base is None else f"--model {shlex.quote(config.base)} "
    root = shlex.quote(str(config.output_root))
    return f"""\
{adapter_id} is in {config.output_root / adapter_id}. To use it:
  jlorax serve {base}--adapter-root {root}
  jlorax generate "..." --adapter {adapter_id}
  client.generate("...", adapter_id="{adapter_id}")"""


@contextmanager
def _cancellation() -> Iterator[Callable[[], bool]]:
    is_told = False
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def tell(*_: object) -> None:
        nonlocal is_told
        is_told = True
        _restore()
        # no print: a handler may interrupt another one
        os.write(2, b"jlorax: ending with a checkpoint; once more to end at once\n")

    def _restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in _SIGNALS:
        signal.signal(number, tell)
    try:
        yield lambda: is_told
    finally:
        _restore()


def _shown(as_json: bool) -> AbstractContextManager[Report]:
    return nullcontext(_say_json) if as_json else TrainingBars(Console())


def _say_json(event: Event) -> None:
    print(event.to_json(), flush=True)


# ---- the plan


def dry_run(config: TrainConfig, cache_dir: Path, *, as_json: bool) -> int:
    from jlorax.training.plan import plan

    found = plan(config, cache_dir)
    if as_json:
        print(json.dumps({**asdict(found), "total_bytes": found.total_bytes}))
    else:
        Console().print(plan_table(found))
    return 0


def plan_table(plan: TrainPlan) -> Table:
    from servers.tables import as_size

    data = plan.data
    table = Table("what", "how much", "of which", title="training plan")
    rows = f"{data.num_used:,} used, {data.num_validation:,} of them for validation"
    rows += f"; {data.num_truncated:,} cut, {data.num_dropped:,} dropped, {data.num_empty:,} empty"
    table.add_row("rows", f"{data.num_rows:,}", rows)
    learnt = f"{plan.padding:.0%} of a row is padding; the longest example has {data.longest:,}"
    table.add_row("tokens", f"{plan.num_tokens:,}", learnt)
    table.add_row("steps", f"{plan.num_steps:,}", f"{plan.steps_per_epoch:,} an epoch")
    table.add_row("trainable parameters", f"{plan.num_parameters:,}", "")
    table.add_row("memory", as_size(plan.total_bytes), "all of the following")
    table.add_row("  base model", as_size(plan.weight_bytes), "frozen")
    table.add_row("  adapter and optimizer", as_size(plan.state_bytes), "")
    table.add_row("  a step's scratch", as_size(plan.scratch_bytes), "by the compiler's plan")
    seconds = timedelta(seconds=round(plan.seconds))
    table.add_row("time", str(seconds), "a guess, good for a factor of two; compiling is extra")
    return table


# ---- what is done with adapters


def import_adapter(folder: Path, name: str, root: Path) -> int:
    """A PEFT folder as the name's next version."""
    from jlorax.training.repository import Repository

    published = Repository(root, name).import_folder(folder)
    print(f"{published.adapter_id} is in {published.folder}")
    return 0


def export(base: str | None, adapter: Path, out: Path, cache_dir: Path) -> int:
    """Base and adapter as one model, in a folder."""
    from jlorax.base_model import find_base
    from jlorax.config import ModelSource
    from jlorax.training.export import merge_into_base
    from servers.progress import StartProgress

    with StartProgress() as progress:
        folder, _ = find_base(ModelSource(base), cache_dir, progress)
    merge_into_base(folder, adapter, out)
    print(f"{out} is a model of its own: jlorax serve --model {shlex.quote(str(out))}")
    return 0
