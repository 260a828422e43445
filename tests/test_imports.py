"""The house's import table, held by a test: who may know whom."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLAIN = {"jlorax.errors", "jlorax.types", "jlorax.layout", "jlorax.version"}

# the half of jlorax.training that a client or a command line may bring in
_PLAIN_TRAINING = (
    "aliases",
    "bars",
    "batches",
    "card",
    "config",
    "dialects",
    "events",
    "examples",
    "process",
    "records",
    "values",
)

# package or module -> what it may import besides the standard library and itself
ALLOWED: dict[str, set[str]] = {
    "jlorax.errors": set(),
    "jlorax.types": set(),
    "jlorax.version": set(),
    "jlorax.layout": {"numpy", "jlorax.types"},
    "jlorax.config": {"jlorax.errors"},
    "jlorax.defaults": {"jlorax.config"},
    "jlorax.metrics": {"prometheus_client", "jlorax.types"},
    "jlorax.wire": PLAIN | {"jlorax.jobs.types"},
    "jlorax.demo": {"jlorax.types"},
    "jlorax.demo.tasks": set(),  # data packages by name, when they are needed
    "jlorax.demo.make_data": {"jlorax.demo.tasks", "jlorax.llm"},
    "jlorax.demo.score": {"jlorax.demo", "jlorax.llm", "jlorax.training.repository", "rich"},
    "jlorax.hugging_face": {"transformers"},
    "jlorax.tokenizer": {"tokenizers", "jlorax.errors", "jlorax.hugging_face"},
    "jlorax.structured": PLAIN | {"numpy", "llguidance", "jlorax.tokenizer"},
    "jlorax.scheduling": PLAIN | {"numpy"},
    "jlorax.adapters": PLAIN | {"numpy", "safetensors", "ml_dtypes"},
    "jlorax.adapters.remote": PLAIN | {"huggingface_hub", "obstore", "jlorax.adapters.files"},
    "pallas_kernels": {"jax", "numpy"},
    "jlorax.models": PLAIN
    | {"pallas_kernels", "flax", "jax", "numpy", "ml_dtypes", "safetensors", "gguf"}
    | {"tokenizers", "jlorax.hugging_face"},
    "jlorax.device": PLAIN | {"pallas_kernels", "jlorax.models", "flax", "jax", "numpy"},
    "jlorax.actors.runner": PLAIN
    | {"jlorax.device", "jlorax.actors.messages", "jlorax.actors.mailbox"}
    | {"jlorax.scheduling.step_plan"},
    "jlorax.actors": PLAIN
    | {"jlorax.actors.messages", "jlorax.actors.mailbox", "jlorax.actors.stream"}
    | {"jlorax.scheduling", "jlorax.adapters", "jlorax.tokenizer", "jlorax.metrics"},
    "jlorax.base_model": {"jlorax.config", "jlorax.errors", "jlorax.models", "huggingface_hub"}
    | {"jlorax.types"},
    "jlorax.training": PLAIN
    | {"jlorax.adapters", "jlorax.base_model", "jlorax.config", "jlorax.models"}
    | {"jlorax.tokenizer", "pallas_kernels", "jax", "flax", "optax", "orbax", "numpy"}
    | {"safetensors", "yaml", "matplotlib", "tensorboard"},
    **{
        f"jlorax.training.{name}": PLAIN
        | {"jlorax.adapters", "jlorax.config", "jlorax.training", "numpy", "rich", "yaml"}
        for name in _PLAIN_TRAINING
    },
    "jlorax.jobs": PLAIN
    | {"jlorax.config", "jlorax.adapters.registry", "jlorax.adapters.files"}
    | {f"jlorax.training.{name}" for name in _PLAIN_TRAINING},
    "jlorax.fine_tuning": PLAIN | {"jlorax.defaults", "jlorax.training", "rich"},
    "jlorax.client": PLAIN
    | {"jlorax.wire", "jlorax.client_http", "jlorax.client_fine_tuning", "jlorax.loop_thread"}
    | {"jlorax.jobs.types", "aiohttp"},
    "jlorax.client_fine_tuning": PLAIN
    | {"jlorax.wire", "jlorax.client_http", "jlorax.loop_thread", "jlorax.jobs.types"}
    | {"jlorax.training.events", "jlorax.training.records", "aiohttp"},
    "jlorax.client_http": PLAIN | {"jlorax.wire", "aiohttp", "yarl"},
    "jlorax.loop_thread": PLAIN,
    "jlorax.together": set(),
    "servers": PLAIN
    | {"jlorax.engine", "jlorax.assembly", "jlorax.wire", "jlorax.config", "jlorax.demo"}
    | {"jlorax.defaults", "jlorax.together"}
    | {"jlorax.tokenizer", "jlorax.metrics", "jlorax.client", "jlorax.models.config"}
    | {"jlorax.structured", "jlorax.base_model", "jlorax.training", "jlorax.jobs"}
    | {"aiohttp", "yaml", "rich"},
}
# seams where types of a lower floor pass by
EXCEPTIONS = {("jlorax.actors.messages", "jlorax.device.device")}
NO_ASYNCIO = (
    "jlorax.structured",
    "jlorax.scheduling",
    "jlorax.training",
    "jlorax.adapters",
    "jlorax.models",
    "jlorax.device",
    "jlorax.wire",
    "jlorax.tokenizer",
    "jlorax.metrics",
    "jlorax.layout",
    "pallas_kernels",
)


def modules() -> Iterator[tuple[str, Path]]:
    for top in ("jlorax", "pallas_kernels", "servers"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> set[str]:
    """Every module that the file names, wherever in it; but not for type checking alone."""
    found = set()
    for node in _outside_type_checking(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _outside_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield from _outside_type_checking(child)


def rule(module: str) -> str | None:
    """The longest entry of the table that the module lies under."""
    fitting = [name for name in ALLOWED if _under(module, name)]
    return max(fitting, key=len, default=None)


def _under(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: str(value)[-60:])
def test_imports_follow_the_table(module: str, path: Path) -> None:
    name = rule(module)
    if name is None:  # jlorax itself, engine, assembly: they join everything
        return
    for imported in imports(path):
        top = imported.partition(".")[0]
        if top in sys.stdlib_module_names or top == "__future__" or _under(imported, name):
            continue
        allowed = any(_under(imported, entry) for entry in ALLOWED[name])
        excepted = any(module == one and _under(imported, other) for one, other in EXCEPTIONS)
        assert allowed or excepted, f"{module} imports {imported}"


@pytest.mark.parametrize("package", NO_ASYNCIO)
def test_plain_and_device_code_never_awaits(package: str) -> None:
    for module, path in modules():
        if _under(module, package):
            assert "asyncio" not in {i.partition(".")[0] for i in imports(path)}, module


def test_the_client_brings_no_jax() -> None:
    import subprocess

    code = (
        "import jlorax, sys; jlorax.AsyncClient; jlorax.Client; jlorax.finetune; "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
