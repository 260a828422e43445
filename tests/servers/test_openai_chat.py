"""What reaches the chat template: its options, and tools where it reads them or not."""

from __future__ import annotations

from typing import Any

from tests.fakes import FakeEngine, FakeTokenizer
from tests.servers.serving import in_loop, serving
from tests.wire_calls import USER, tool

PATH = "/v1/chat/completions"
CHAT = {"model": "tiny/base", "messages": [USER]}


async def rendered(engine: FakeEngine | None = None, **fields: Any) -> dict[str, Any]:
    async with serving(engine) as server:
        answer = await server.post(PATH, CHAT | fields)
        assert answer.status == 200, answer.text
        (given,) = server.engine.tokenizer.rendered
        return given


@in_loop
async def test_a_plain_chat_gets_a_generation_prompt_and_nothing_else() -> None:
    assert await rendered() == {
        "messages": [USER],
        "tools": None,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "documents": None,
        "variables": {},
    }


@in_loop
async def test_the_templates_options() -> None:
    given = await rendered(
        continue_final_message=True,
        documents=[{"text": "x"}],
        chat_template_kwargs={"enable_thinking": False},
    )
    assert (given["continue_final_message"], given["add_generation_prompt"]) == (True, False)
    assert given["documents"] == [{"text": "x"}]
    assert given["variables"] == {"enable_thinking": False}


@in_loop
async def test_tools_are_the_templates() -> None:
    assert (await rendered(tools=[tool()]))["tools"] == [tool()]
    assert (await rendered(tools=[tool()], tool_choice="none"))["tools"] is None


@in_loop
async def test_a_template_without_tools_is_told_of_them_in_text() -> None:
    given = await rendered(FakeEngine(tokenizer=FakeTokenizer(())), tools=[tool()])
    assert given["tools"] is None
    system, user = given["messages"]
    assert (system["role"], user) == ("system", USER)
    assert '"name":"look_up"' in system["content"]


@in_loop
async def test_a_model_without_a_template_says_so() -> None:
    engine = FakeEngine()
    engine.tokenizer.has_template = False
    async with serving(engine) as server:
        answer = await server.post(PATH, CHAT)
        assert answer.status == 400
        assert "no chat template" in answer.json["error"]["message"]
