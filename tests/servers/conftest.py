"""What the contract tests share: an environment of LoRAX's clients, and a server process."""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.contract_session import ContractSession
from tests.servers.process import ServerProcess, start_server, write_adapter, write_model

# lorax-client pins huggingface-hub < 1: it cannot live beside the transformers that serve
CLIENTS = ["lorax-client==0.6.3", "text-generation==0.7.0"]


@pytest.fixture(scope="session")
def python_of_clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has LoRAX's and TGI's clients, unmodified."""
    folder = tmp_path_factory.mktemp("clients")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", *CLIENTS]
    subprocess.run(install, check=True, timeout=240)
    return python


@pytest.fixture(scope="session")
def contract_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A tiny model and the adapters "one" and "two", in a process of their own."""
    home = tmp_path_factory.mktemp("home")
    write_model(home / "model")
    for seed, name in enumerate(("one", "two")):
        write_adapter(home / "root" / name, seed + 1)
    server = start_server(
        home,
        *("--model", str(home / "model"), "--cache-dir", str(home / "cache")),
        *("--adapter-root", str(home / "root"), "--max-slots", "4", "--max-batch", "4"),
        *("--max-seq-len", "64", "--adapter-bank-bytes", "8MiB", "--buckets", "4"),
    )
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="session")
def session() -> Iterator[ContractSession]:
    session = ContractSession()
    yield session
    session.close()
