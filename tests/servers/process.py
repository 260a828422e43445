"""A real server process on a real socket, over a tiny random model made without torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.adapters.helpers import config as peft_config
from tests.adapters.helpers import llama_projections, tensors_for

ROOT = Path(__file__).resolve().parents[2]
START_DEADLINE_S = 120.0

D, FFN, KV, LAYERS, HEADS = 32, 48, 16, 2, 4
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
VOCAB = len(_ALPHABET) + len(_SPECIAL)
_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(folder: Path) -> Path:
    """A Llama of 2 layers with a byte-level tokenizer and a chat template."""
    folder.mkdir(parents=True)
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": D,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    random = np.random.default_rng(0)

    def draw(*dims: int) -> np.ndarray:
        return random.normal(0, 0.08, dims).astype(np.float32)

    tensors = {"model.embed_tokens.weight": draw(VOCAB, D), "model.norm.weight": draw(D) + 1}
    for p in _projections()[:-1]:
        for layer in range(LAYERS):
            tensors[p.module(layer) + ".weight"] = draw(p.d_out, p.d_in)
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = draw(D) + 1
    save_file(tensors, folder / "model.safetensors")
    _write_tokenizer(folder)
    return folder


def write_adapter(folder: Path, seed: int, rank: int = 4) -> Path:
    """A LoRA on q and v that moves the answers."""
    folder.mkdir(parents=True)
    modules = {
        f"model.layers.{layer}.self_attn.{name}": rank
        for layer in range(LAYERS)
        for name in ("q_proj", "v_proj")
    }
    save_file(tensors_for(modules, _projections(), seed=seed), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(r=rank, lora_alpha=rank)))
    return folder


def _projections() -> Any:
    return llama_projections(D, KV, FFN, VOCAB, LAYERS)


def _write_tokenizer(folder: Path) -> None:
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *_ALPHABET])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        additional_special_tokens=_SPECIAL[1:],
        chat_template=_TEMPLATE,
    )
    fast.save_pretrained(folder)


@dataclass
class ServerProcess:
    """``jlorax serve`` in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def request(
        self, path: str, body: Any = None, method: str | None = None
    ) -> tuple[int, Mapping[str, str], Any]:
        """(status, headers, decoded JSON or text)."""
        data = (
            body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        )
        headers = {"Content-Type": "application/json"} if data is not None else {}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.headers, _decoded(response.read())
        except urllib.error.HTTPError as error:
            return error.code, error.headers, _decoded(error.read())

    def metric(self, name: str) -> float:
        text = self.request("/metrics")[2]
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        return float(line.split()[1])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode()


def start_server(work: Path, *flags: str, env: Mapping[str, str] | None = None) -> ServerProcess:
    """Starts and waits until /health says ready."""
    port = free_port()
    log = work / f"server-{port}.log"
    command = [sys.executable, "-m", "servers.cli", "serve", "--port", str(port), *flags]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
    server = ServerProcess(process, f"http://127.0.0.1:{port}", log)
    _await_ready(server)
    return server


def _await_ready(server: ServerProcess) -> None:
    deadline_s = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline_s:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended: {server.log.read_text()}")
        try:
            if server.request("/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.1)  # nothing to wait on before the process listens
    server.process.kill()
    raise TimeoutError(server.log.read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_script(python: Path, script: str, *arguments: str) -> None:
    """Runs a script in another interpreter, which has to say "passed"."""
    done = subprocess.run(
        [str(python), "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.endswith("passed\n"), done.stdout + done.stderr
