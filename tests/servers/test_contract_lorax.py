"""The unmodified ``lorax-client`` and ``text-generation`` (marker ``contract``).

lorax-client pins huggingface-hub < 1, so both live in a virtual environment of their own, which
pip builds once a session; a script there talks to the server here.
"""

from __future__ import annotations

import asyncio
import subprocess
import venv
from pathlib import Path

import pytest

from tests.fakes import FakeEngine, adapter_info
from tests.servers.serving import in_loop, serving

pytestmark = pytest.mark.contract
CLIENTS = ["lorax-client==0.6.3", "text-generation==0.7.0"]

SCRIPT = """
import sys
from {module} import Client
from {module} import errors
client = Client(sys.argv[1])
extra = {extra}
whole = client.generate("hi", max_new_tokens=4, decoder_input_details=True, **extra)
assert whole.generated_text == "Hello, world", whole
assert whole.details.prompt_tokens == 3 if hasattr(whole.details, "prompt_tokens") else True
assert len(whole.details.prefill) == 3
assert [t.text for t in whole.details.tokens] == ["Hello", ",", " ", "world"]
events = list(client.generate_stream("hi", max_new_tokens=4, **extra))
assert [e.token.text for e in events] == ["Hello", ",", " ", "world"]
assert events[-1].generated_text == "Hello, world"
assert events[-1].details.generated_tokens == 4
{more}
print("passed")
"""

LORAX_ERRORS = """
for ask in (client.generate, lambda *a, **k: list(client.generate_stream(*a, **k))):
    for kind, options in ((errors.NotFoundError, dict(adapter_id="nope")),
                          (errors.ValidationError, dict(stop_sequences=[""]))):
        try:
            ask("hi", **options)
        except kind:
            continue
        raise SystemExit(f"no {kind}")
"""


@pytest.fixture(scope="session")
def python_of_clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", *CLIENTS]
    subprocess.run(install, check=True, timeout=240)
    return python


@pytest.mark.parametrize(
    ("module", "extra", "more"),
    [
        ("lorax", '{"adapter_id": "org/x"}', LORAX_ERRORS),
        ("text_generation", "{}", ""),
    ],
)
@in_loop
async def test_the_client_reads_everything(
    python_of_clients: Path, module: str, extra: str, more: str
) -> None:
    engine = FakeEngine(registered={"org/x": adapter_info("org/x")})
    async with serving(engine) as server:
        script = SCRIPT.format(module=module, extra=extra, more=more)
        process = await asyncio.create_subprocess_exec(
            str(python_of_clients),
            "-c",
            script,
            server.url,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert output.decode().endswith("passed\n"), output.decode()
    assert engine.seen[0].adapter_id == ("org/x" if module == "lorax" else None)
