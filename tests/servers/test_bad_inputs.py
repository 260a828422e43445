"""A table of bad inputs against a real server process: each gets its status, nobody is disturbed.

Rows are numbered; what other tests hold is named here, so that a missing row shows.
"""

from __future__ import annotations

import ast
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers.process import ServerProcess, start_server, write_adapter, write_model

TESTS = Path(__file__).resolve().parent.parent
MAX_SEQ_LEN = 64


@dataclass(frozen=True)
class Case:
    """``fields`` beside a prompt or messages; ``text``: the body as it is sent."""

    row: int
    name: str
    status: int
    fields: Mapping[str, Any] | None = None
    text: str | None = None
    path: str = "/v1/completions"
    says: str = ""

    def body(self) -> bytes:
        if self.text is not None:
            return self.text.encode()
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 2}
        if self.path.endswith("chat/completions"):
            asked["messages"] = [{"role": "user", "content": "one"}]
        else:
            asked["prompt"] = "one"
        given = {**asked, **(self.fields or {})}
        return json.dumps({k: v for k, v in given.items() if v is not LEFT_OUT}).encode()


LEFT_OUT = object()
CHAT = "/v1/chat/completions"


def numbers(row: int, name: str, values: list[str], says: str = "") -> list[Case]:
    """Literals as JSON has them or as it does not: 1e400, NaN."""
    return [
        Case(row, f"{name}={value[:24]}", 400, says=says or name, text=_with(name, value))
        for value in values
    ]


def _with(name: str, value: str) -> str:
    rest = {"model": "tiny", "prompt": "one", "max_tokens": 2}
    rest.pop(name, None)
    return json.dumps(rest)[:-1] + f', "{name}": {value}}}'


def schema(value: object) -> dict[str, Any]:
    """As ``response_format`` takes it."""
    wanted = {"name": "x", "schema": value}
    return {"response_format": {"type": "json_schema", "json_schema": wanted}, "max_tokens": 8}


def tool(name: str = "f", parameters: object = None) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": parameters or {"type": "object"}},
    }


NESTED = {
    "$defs": {"d0": {"type": "string"}}
    | {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i - 1}"}, {"$ref": f"#/$defs/d{i - 1}"}]}
        for i in range(1, 21)
    },
    "$ref": "#/$defs/d20",
}
SELF = {"type": "object", "properties": {"next": {"$ref": "#"}}}

CASES = [
    Case(1, "broken JSON", 400, text="{"),
    Case(1, "truncated JSON", 400, text='{"prompt": "a"'),
    Case(2, "nested lists", 400, text="[" * 100_000),
    Case(8, "lone surrogate", 400, text='{"model":"tiny","prompt":"\\ud800"}'),
    Case(9, "duplicate keys", 400, text='{"model":"tiny","prompt":"a","n":1,"n":2}'),
    *(
        Case(row, f"model {name[:20]!r}", 400, {"model": name})
        for row, names in {
            21: ["../../etc/passwd"],
            22: ["/etc/passwd", "C:\\x", "file:///etc/passwd"],
            23: ["..%2f..%2f", "a/../../b", "....//"],
            24: ["a\0b", "a\nb", "a\u202eb", "a" * 10_000, ".", "-rf"],
            31: ["http://169.254.169.254/x", "s3://other-bucket/x"],
        }.items()
        for name in names
    ),
    Case(28, "the base by its own name", 200, {"model": "__base_model__"}),
    Case(30, "unknown adapter", 404, {"model": "nobody"}, says="nobody"),
    Case(30, "and again", 404, {"model": "nobody"}, says="nobody"),
    *(
        Case(34, kind, 400, {"messages": [{"role": "user", "content": [part]}]}, path=CHAT)
        for kind, part in {
            "image": {"type": "image_url", "image_url": {"url": "http://localhost:1/x"}},
            "audio": {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        }.items()
    ),
    *numbers(35, "n", ["0", "-1", "1000000000", "1.5", '"2"', "true"]),
    *numbers(36, "best_of", ["1000000"]),
    Case(36, "best_of below n", 400, {"n": 2, "best_of": 1}, says="best_of"),
    Case(36, "n of a greedy answer", 200, {"n": 2, "temperature": 0}),
    *numbers(37, "max_tokens", ["0", "-1", str(2**31), str(2**63)]),
    *numbers(37, "max_tokens", ["1e400"], says="1e400"),
    Case(37, "null is the default", 200, {"max_tokens": None}),
    Case(38, "prompt and answer too long", 400, {"max_tokens": 100}, says=f"{MAX_SEQ_LEN}"),
    *numbers(39, "temperature", ["-1", "NaN", "Infinity", "1e308", '"hot"'], says=" "),
    *numbers(40, "top_p", ["0", "1.1", "-0"]),
    *numbers(40, "top_k", ["-5", str(2**40)]),
    *numbers(40, "min_p", ["2"]),
    *numbers(40, "typical_p", ["0"]),
    *numbers(41, "repetition_penalty", ["0", "-1", "1e-300"]),
    *numbers(41, "presence_penalty", ["3"]),
    *numbers(42, "logprobs", ["1000000"]),
    Case(42, "top_logprobs alone", 400, {"top_logprobs": 2}, path=CHAT, says="top_logprobs"),
    *numbers(42, "prompt_logprobs", ["100000"]),
    Case(43, "a bias too many", 400, {"logit_bias": {str(i): 1 for i in range(301)}}),
    *numbers(43, "logit_bias", ['{"-1": 1}', '{"99999": 1}', '{"1": 1e9}', '{"1": NaN}'], says=" "),
    *numbers(44, "stop", ["[" + ",".join(['"a"'] * 1000) + "]", '""', '[""]', "3", "[3]"]),
    Case(44, "a long stop", 400, {"stop": "x" * 1_000_000}, says="stop"),
    *numbers(45, "stop_token_ids", ["[-1]", "[99999]", '["a"]']),
    *numbers(46, "seed", [str(2**65), '"x"']),
    Case(47, "empty prompt", 400, {"prompt": ""}),
    Case(47, "no messages", 400, {"messages": []}, path=CHAT),
    Case(47, "whitespace", 200, {"prompt": "one  "}),
    *numbers(48, "prompt", ["[99999]", "[-1]", "[1.5]"], says=" "),
    Case(49, "10,000 prompts", 400, {"prompt": ["a"] * 10_000}, says="10000"),
    Case(50, "unknown role", 400, {"messages": [{"role": "x", "content": "a"}]}, path=CHAT),
    Case(50, "no content", 400, {"messages": [{"role": "user", "content": None}]}, path=CHAT),
    Case(
        50,
        "10,000 messages",
        400,
        {"messages": [{"role": "user", "content": "a"}] * 10_000},
        path=CHAT,
    ),
    Case(52, "stream_options alone", 400, {"stream_options": {"include_usage": True}}),
    Case(52, "include_usage 3", 400, {"stream": True, "stream_options": {"include_usage": 3}}),
    *numbers(53, "stream", ['"yes"', "1"]),
    Case(54, "an unknown field", 200, {"surprise": 1}),
    Case(55, "min above max", 400, {"min_tokens": 5}, says="min"),
    Case(55, "ignore_eos without an end", 400, {"ignore_eos": True, "max_tokens": 10**6}),
    Case(
        56, "echo of a long prompt", 400, {"prompt": "one " * 100_000, "echo": True, "logprobs": 1}
    ),
    Case(57, "a long user", 400, {"user": "x" * 1_000_000}),
    Case(57, "much metadata", 400, {"metadata": {str(i): "x" for i in range(10_000)}}, path=CHAT),
    Case(60, "10,000 tools", 400, {"tools": [tool(f"f{i}") for i in range(10_000)]}, path=CHAT),
    *(
        Case(60, f"parameters {fault}", 400, {"tools": [tool("f", fault)]}, path=CHAT)
        for fault in (
            {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
            {"type": "bogus"},
        )
    ),
    Case(
        60,
        "a tool that is not there",
        400,
        {
            "tools": [tool("f")],
            "tool_choice": {"type": "function", "function": {"name": "g"}},
        },
        path=CHAT,
    ),
    Case(61, "no schema", 400, schema({"properties": {"foo": "bar"}}), path=CHAT),
    Case(61, "a list for a schema", 400, schema([1]), path=CHAT),
    Case(62, "a schema that names itself", 200, schema(SELF), path=CHAT),
    Case(62, "elsewhere", 400, schema({"$ref": "http://localhost:1/x.json"}), path=CHAT),
    Case(63, "200,000 words", 400, schema({"enum": [f"w{i}" for i in range(100_000)]}), path=CHAT),
    Case(63, "a billion items", 200, schema({"type": "array", "minItems": 10**9}), path=CHAT),
    Case(63, "a billion letters", 200, schema({"type": "string", "maxLength": 10**9}), path=CHAT),
    Case(63, "a million ways", 200, schema(NESTED), path=CHAT),
    Case(64, "a huge regex", 200, {"guided_regex": ".{0,99999}{0,99999}"}),
    Case(64, "a backward reference", 400, {"guided_regex": r"(a)\1"}),
    Case(64, "a look behind", 400, {"guided_regex": r"(?<=a)b"}),
    Case(65, "a grammar without words", 400, {"guided_grammar": "start: start"}),
    Case(66, "a valid schema", 200, schema({"type": "integer"}), path=CHAT),
    Case(66, "and then a broken one", 400, schema({"type": "bogus"}), path=CHAT),
]

# "file::test" below tests/, which a test below looks up
ELSEWHERE = {
    3: "servers/test_hostile.py::test_too_large_is_413_before_and_while_reading",
    4: "servers/test_hostile.py::test_too_large_is_413_before_and_while_reading",
    5: "servers/test_hostile.py::test_other_types_and_encodings_are_415",
    6: "servers/test_hostile.py::test_other_types_and_encodings_are_415",
    7: "servers/test_hostile.py::test_malformed_json_is_400_in_each_familys_shape",
    10: "servers/test_hostile.py::test_broken_http_is_refused_and_the_connection_closed",
    11: "servers/test_hostile.py::test_broken_http_is_refused_and_the_connection_closed",
    12: "servers/test_hostile.py::test_a_body_that_stalls_is_given_up",
    13: "servers/test_bad_inputs.py::test_a_thousand_requests_in_one_breath",
    14: "servers/test_hostile.py::test_wrong_methods_and_unknown_paths",
    15: "servers/test_auth.py::test_strangers_are_401_and_reach_nothing",
    16: "servers/test_auth.py::test_a_key_does_what_its_scopes_say_and_nothing_else",
    17: "servers/test_hostile.py::test_wrong_methods_and_unknown_paths",
    18: "servers/test_auth.py::test_a_bent_host_opens_no_route",
    19: "servers/test_hosts.py::test_pages_of_other_origins_are_403",
    20: "servers/test_auth.py::test_strangers_are_401_and_reach_nothing",
    25: "adapters/test_registry.py::test_dashes_do_not_confuse_two_folders",
    26: "adapters/test_registry.py::test_links_out_of_the_root",
    27: "adapters/test_peft_refusals.py::test_no_regular_file",
    29: "servers/test_auth.py::test_anothers_adapter_is_as_unknown_as_any",
    32: "adapters/remote/test_hub.py::test_a_redirect_into_an_inner_network_is_refused",
    33: "adapters/remote/test_hub.py::test_a_lying_server",
    51: "test_chat_template.py::test_special_tokens_of_users_stay_text_wherever_they_stand",
    58: "test_wire_merges.py::test_a_wrong_merge_is_refused_by_name",
    59: "test_engine_merge.py::test_what_is_refused",
}
NUM_ROWS = 66


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    home = tmp_path_factory.mktemp("bad")
    write_model(home / "tiny")
    write_adapter(home / "root" / "one", 1)
    server = start_server(
        home,
        *("--model", str(home / "tiny"), "--cache-dir", str(home / "cache")),
        *("--adapter-root", str(home / "root"), "--max-slots", "2", "--max-batch", "4"),
        *("--max-seq-len", str(MAX_SEQ_LEN), "--adapter-bank-bytes", "8MiB", "--buckets", "4"),
    )
    yield server
    assert server.process.poll() is None, "it is alive after all of them"
    server.process.kill()
    server.process.wait()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"row-{case.row}-{case.name}")
def test_it_gets_its_status_and_the_next_request_its_answer(
    server: ServerProcess, case: Case
) -> None:
    status, _, said = server.request(case.path, case.body())
    assert status == case.status, str(said)[:300]
    if status != 200:
        assert case.says.strip() in said["error"]["message"]
    assert server.request("/v1/completions", Case(0, "good", 200).body())[0] == 200


def test_a_thousand_requests_in_one_breath(server: ServerProcess) -> None:
    """Answered one after the other, on the one connection."""
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(one * 999 + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        told = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert told.count(b"HTTP/1.1 200 OK") == 1000


def test_afterwards_all_is_back(server: ServerProcess) -> None:
    assert server.process.poll() is None
    assert server.metric("jlorax_num_running") == 0
    assert server.metric("jlorax_num_queued") == 0
    assert server.metric("jlorax_pinned_slots") == 0
    assert server.metric("jlorax_free_pages") == server.metric("jlorax_total_pages")


def test_no_row_is_missing() -> None:
    assert {case.row for case in CASES} | set(ELSEWHERE) == set(range(1, NUM_ROWS + 1))
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        kinds = ast.FunctionDef, ast.AsyncFunctionDef
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, kinds)}, place
