"""What the contract tests of frameworks and programs share for a session: one server process over
a tiny model with a long context, and an environment for each set of packages."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import tempfile
import venv
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.servers.contract_cases import ADAPTER, BASE
from tests.servers.process import ROOT, ServerProcess, start_server, write_adapter, write_model

OTHER_ADAPTER = "two"
MAX_SEQ_LEN = 2048  # a token is a byte: a tool's description takes hundreds
_INSTALL_S, _RUN_S = 280.0, 240.0
# no file of prices from the network, no traces sent anywhere
_ALONE = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "DO_NOT_TRACK": "1",
}


class ContractSession:
    """Everything is made when it is first asked for, and gone when the tests are over."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._pythons: dict[tuple[str, ...], Path] = {}

    def close(self) -> None:
        self._opened.close()

    @cached_property
    def home(self) -> Path:
        """The model and the adapters that the server has."""
        home = self._temporary_folder()
        config = write_model(home / "model") / "config.json"
        raw = json.loads(config.read_text()) | {"max_position_embeddings": MAX_SEQ_LEN}
        config.write_text(json.dumps(raw))
        for seed, name in enumerate((ADAPTER, OTHER_ADAPTER)):
            write_adapter(home / "root" / name, seed + 1)
        return home

    @cached_property
    def server(self) -> ServerProcess:
        home = self.home
        server = start_server(
            home,
            *("--model", str(home / "model"), "--model-id", BASE),
            *("--adapter-root", str(home / "root"), "--cache-dir", str(home / "cache")),
            *("--max-slots", "4", "--max-batch", "8", "--buckets", "8"),
            *("--adapter-bank-bytes", "8MiB"),
            env={"JAX_PLATFORMS": "cpu"},
        )
        self._opened.callback(server.process.wait)
        self._opened.callback(server.process.kill)
        return server

    def python_with(self, *requirements: str) -> Path:
        """An interpreter of an environment over this one: what cannot live in this one, or would
        bring too much into it, is installed there, and what is here is seen from there."""
        if requirements not in self._pythons:
            self._pythons[requirements] = _python_with(self._temporary_folder(), requirements)
        return self._pythons[requirements]

    def _temporary_folder(self) -> Path:
        return Path(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="jlorax-")))

    # ---- what the server itself says to a plain request

    def chat(self, model: str, *said: tuple[str, str], **fields: Any) -> Mapping[str, Any]:
        messages = [{"role": role, "content": text} for role, text in said]
        return self._answer("/v1/chat/completions", model, {"messages": messages, **fields})

    def chat_text(self, model: str, text: str) -> str:
        content: str = self.chat(model, ("user", text))["choices"][0]["message"]["content"]
        return content

    def completion_text(self, model: str, prompt: str, **fields: Any) -> str:
        answer = self._answer("/v1/completions", model, {"prompt": prompt, **fields})
        text: str = answer["choices"][0]["text"]
        return text

    def _answer(self, path: str, model: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        body = {"model": model, "temperature": 0, "max_tokens": 6, **fields}
        status, _, answer = self.server.request(path, body)
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer


def _python_with(folder: Path, requirements: Sequence[str]) -> Path:
    venv.create(folder, with_pip=True)
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (site_packages / "below.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *requirements]
    subprocess.run(install, check=True, timeout=_INSTALL_S)
    return python


def run(command: Sequence[str | Path], **variables: str) -> str:
    """What a program says, which has to end well."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **_ALONE, **variables},
        capture_output=True,
        text=True,
        timeout=_RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


class Outcomes:
    """What came of each case of a module of ``contract_cases``, by its name."""

    def __init__(
        self, python: Path, module: str, url: str, *arguments: str | Path, **variables: str
    ) -> None:
        said = run([python, "-m", module, url, *arguments], **variables)
        self._found: dict[str, dict[str, Any]] = json.loads(said.splitlines()[-1])

    def __getitem__(self, name: str) -> Any:
        found = self._found[name]
        assert "answer" in found, found["failure"]
        return found["answer"]
