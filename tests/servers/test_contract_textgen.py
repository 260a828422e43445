"""The unmodified ``text-generation`` (TGI's client) against a real server process (marker
``contract``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers.process import ServerProcess, run_script

pytestmark = pytest.mark.contract

BEGIN = """
import json, sys
from text_generation import Client, errors
from text_generation.types import FinishReason, Grammar, GrammarType
client = Client(sys.argv[1])
ask = client.generate
"""

ANSWERS = """
whole = ask("Hello", max_new_tokens=4, decoder_input_details=True, top_n_tokens=3).details
assert (whole.finish_reason, whole.generated_tokens) == (FinishReason.Length, 4)
assert [t.text for t in whole.prefill] == list("Hello")
assert [len(tops) for tops in whole.top_tokens] == [3] * 4
assert [tops[0].id for tops in whole.top_tokens] == [t.id for t in whole.tokens]
events = list(client.generate_stream("Hello", max_new_tokens=4, top_n_tokens=3))
assert [e.token.id for e in events] == [t.id for t in whole.tokens]
assert [len(e.top_tokens) for e in events] == [3] * 4
assert events[-1].details.generated_tokens == 4
"""

BEST_OF = """
best = ask("Hello", do_sample=True, best_of=2, max_new_tokens=4, top_n_tokens=2).details
(other,) = best.best_of_sequences
assert best.seed != other.seed and len(other.tokens) == len(other.top_tokens) == 4
"""

GRAMMARS = """
schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
          "additionalProperties": False}
said = ask("Hello", grammar=Grammar(type=GrammarType.Json, value=schema), max_new_tokens=40)
assert type(json.loads(said.generated_text)["yes"]) is bool, said
said = ask("Hello", grammar=Grammar(type=GrammarType.Regex, value="[ab]{3}"), max_new_tokens=40)
assert len(said.generated_text) == 3 and set(said.generated_text) <= set("ab"), said
"""

CHAT = """
message = {"role": "user", "content": "hi"}
chat = client.chat(messages=[message], max_tokens=4)
assert chat.choices[0].message.content is not None and chat.usage["completion_tokens"] == 4
"""

ERRORS = """
try:
    ask("hi", max_new_tokens=1000)
except errors.ValidationError:
    pass
else:
    raise SystemExit("no ValidationError")
"""

SCRIPTS = {
    "answers": ANSWERS,
    "best_of": BEST_OF,
    "grammars": GRAMMARS,
    "chat": CHAT,
    "errors": ERRORS,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_text_generation(
    name: str, python_of_clients: Path, contract_server: ServerProcess
) -> None:
    script = BEGIN + SCRIPTS[name] + 'print("passed")\n'
    run_script(python_of_clients, script, contract_server.url)
