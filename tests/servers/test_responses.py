"""/v1/responses over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from jlorax.errors import Overloaded, Unavailable
from jlorax.types import FinishReason
from tests.fakes import FakeEngine
from tests.servers.serving import in_loop, serving

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "tiny/base", "input": "hi", "instructions": "Be kind."}


@in_loop
async def test_a_whole_response() -> None:
    async with serving() as server:
        answer = await server.post(PATH, BODY | {"max_output_tokens": 9})
        response = answer.json
        assert (response["object"], response["status"]) == ("response", "completed")
        assert response["id"].startswith("resp_")
        assert response["model"] == "tiny/base"
        assert response["output"][0]["content"][0]["text"] == "Hello, world"
        assert (response["store"], response["instructions"]) == (False, "Be kind.")
        assert response["usage"]["output_tokens"] == 4
        assert answer.headers["x-generated-tokens"] == "4"
        (request,) = server.engine.seen
        assert request.max_new_tokens == 9
        assert request.prompt == tuple(map(ord, "<system>Be kind.<user>hi"))


@in_loop
async def test_a_stream_has_named_events() -> None:
    async with serving(FakeEngine(finish=FinishReason.LENGTH)) as server:
        answer = await server.post(PATH, BODY | {"stream": True})
        names = [line[7:] for line in answer.text.split("\n") if line.startswith("event: ")]
        assert names == [event["type"] for event in answer.events]
        assert names[:3] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
        ]
        deltas = [event["delta"] for event in answer.events if "delta" in event]
        assert deltas == ["Hello", ",", " ", "world"]
        last = answer.events[-1]
        assert last["type"] == "response.incomplete"
        assert last["response"]["output"][0]["content"][0]["text"] == "Hello, world"
        assert answer.events[0]["response"]["output"] == []


@in_loop
async def test_log_probabilities_are_shown_when_they_are_asked_for() -> None:
    async with serving() as server:
        body = BODY | {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
        part = (await server.post(PATH, body)).json["output"][0]["content"][0]
        assert [entry["logprob"] for entry in part["logprobs"]] == [-0.25, -0.5, -0.75, -1.0]
        assert part["logprobs"][0]["top_logprobs"][0]["logprob"] == -1.0


@pytest.mark.parametrize("name", ["previous_response_id", "conversation", "background"])
@in_loop
async def test_what_needs_storing_is_refused_by_name(name: str) -> None:
    async with serving() as server:
        answer = await server.post(PATH, BODY | {name: "x"})
        assert (answer.status, answer.json["error"]["param"]) == (400, name)
        assert not server.engine.seen


@in_loop
async def test_an_error_before_the_first_event_has_its_status() -> None:
    async with serving(FakeEngine(error=Overloaded("full"))) as server:
        assert (await server.post(PATH, BODY | {"stream": True})).status == 429


@in_loop
async def test_an_error_after_it_is_the_last_event() -> None:
    async with serving(FakeEngine(error=Unavailable("dead"), fail_at=1)) as server:
        last = (await server.post(PATH, BODY | {"stream": True})).events[-1]
        assert (last["type"], last["message"]) == ("error", "dead")
        assert last["error"]["code"] == last["code"] == "unavailable"
