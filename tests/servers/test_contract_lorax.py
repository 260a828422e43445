"""The unmodified ``lorax-client`` against a real server process (marker ``contract``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers.process import ServerProcess, run_script

pytestmark = pytest.mark.contract

BEGIN = """
import json, sys
from lorax import Client, errors
from lorax.types import FinishReason, MergedAdapters, ResponseFormat
client = Client(sys.argv[1])
ask = client.generate
"""

ANSWERS = """
whole = ask("Hello", adapter_id="one", max_new_tokens=6, decoder_input_details=True,
            return_k_alternatives=2)
details = whole.details
assert (details.finish_reason, details.generated_tokens) == (FinishReason.Length, 6), whole
assert (details.prompt_tokens, details.seed) == (5, None)
assert [t.text for t in details.prefill] == list("Hello")
assert [t.logprob is None for t in details.prefill] == [True] + [False] * 4
assert all(len(t.alternative_tokens) == 2 and t.alternative_tokens[0].id == t.id
           for t in details.tokens)
events = list(client.generate_stream("Hello", adapter_id="one", max_new_tokens=6))
assert [e.token.id for e in events] == [t.id for t in details.tokens]
assert events[-1].generated_text == whole.generated_text
assert events[-1].details.generated_tokens == 6
assert ask("Hello", max_new_tokens=6).generated_text != whole.generated_text
full = ask("Hello", adapter_id="one", max_new_tokens=6, return_full_text=True)
assert full.generated_text == "Hello" + whole.generated_text
short = ask("xxHello", adapter_id="one", max_new_tokens=6, truncate=5)
assert short.generated_text == whole.generated_text
"""

BEST_OF = """
best = ask("Hello", do_sample=True, temperature=2.0, best_of=2, max_new_tokens=4).details
(other,) = best.best_of_sequences
assert best.seed is not None and best.seed != other.seed
mean = lambda tokens: sum(t.logprob for t in tokens) / len(tokens)
assert mean(best.tokens) >= mean(other.tokens)
one, two = (ask("Hello", do_sample=True, seed=7, max_new_tokens=8) for _ in range(2))
assert one.generated_text == two.generated_text and one.details.seed == 7
"""

CONSTRAINED = """
schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
          "additionalProperties": False}
form = ResponseFormat(type="json_object", schema=schema)
said = ask("Hello", response_format=form, max_new_tokens=40)
assert type(json.loads(said.generated_text)["yes"]) is bool, said
assert said.details.finish_reason == FinishReason.EndOfSequenceToken
"""

MERGED = """
def merged(weights, **more):
    how = dict(merge_strategy="linear", density=0.0, majority_sign_method="total") | more
    merge = MergedAdapters(ids=["one", "two"], weights=weights, **how)
    return ask("Hello", merged_adapters=merge, max_new_tokens=8).generated_text
one = ask("Hello", adapter_id="one", max_new_tokens=8).generated_text
assert merged([1.0, 0.0]) == one
assert merged([0.5, 0.5]) not in (one, ask("Hello", max_new_tokens=8).generated_text)
merged([1.0, 1.0], merge_strategy="ties", density=0.5)
"""

OTHERS = """
assert len(client.embed("Hello").embeddings) == 32
for call, inputs in ((client.classify, "x"), (client.classify_batch, ["x"])):
    try:
        call(inputs)
    except errors.GenerationError as error:
        assert "generates text" in str(error)
    else:
        raise SystemExit("it classifies")
"""

ERRORS = """
streamed = lambda *a, **k: list(client.generate_stream(*a, **k))
for call in (ask, streamed):
    for kind, options in (
        (errors.NotFoundError, dict(adapter_id="nope")),
        (errors.ValidationError, dict(stop_sequences=[""])),
        (errors.ValidationError, dict(max_new_tokens=1000)),
    ):
        try:
            call("hi", **options)
        except kind:
            continue
        raise SystemExit(f"no {kind}")
"""

SCRIPTS = {
    "answers": ANSWERS,
    "best_of": BEST_OF,
    "constrained": CONSTRAINED,
    "merged": MERGED,
    "others": OTHERS,
    "errors": ERRORS,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_lorax_client(name: str, python_of_clients: Path, contract_server: ServerProcess) -> None:
    script = BEGIN + SCRIPTS[name] + 'print("passed")\n'
    run_script(python_of_clients, script, contract_server.url)
