"""How a family of models writes its tool calls, and which family a model belongs to.

Hermes, Qwen   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, once for each call
Mistral        [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
Llama 3        {"name": ..., "parameters": {...}}; ..., and nothing else in the answer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jlorax.tokenizer import Tokenizer
from jlorax.types import Token


@dataclass(frozen=True)
class ToolFormat:
    """``opening`` is in front of the first call, where it is "" the answer begins with it.

    Calls stand between ``begin`` and ``end``, with a ``separator`` between two, or each of them in
    an opening of its own. ``special`` holds the marks that are special tokens: they have an id, and
    the answer's text does not show them.
    """

    opening: str
    begin: str
    separator: str | None
    end: str
    arguments_key: str
    special: Mapping[str, int] = field(default_factory=dict)

    def text_of(self, token: Token) -> str:
        """What the token says to a parser of calls: its text, or the mark that it is."""
        marks = [mark for mark, token_id in self.special.items() if token_id == token.id]
        return marks[0] if marks else token.text


HERMES = ToolFormat("<tool_call>", "", None, "</tool_call>", "arguments")
MISTRAL = ToolFormat("[TOOL_CALLS]", "[", ",", "]", "arguments")
LLAMA3 = ToolFormat("", "", ";", "", "parameters")

# what only that family's chat template says
_SIGNS = (
    ("<tool_call>", HERMES),
    ("[TOOL_CALLS]", MISTRAL),
    ("<|python_tag|>", LLAMA3),
    ('{"name": function name, "parameters":', LLAMA3),
)


def tool_format_of(tokenizer: Tokenizer) -> ToolFormat:
    """By what the chat template says; Hermes' when it says nothing of tools."""
    template = tokenizer.chat_template or ""
    said = template if isinstance(template, str) else "\n".join(template.values())  # several, named
    chosen = next((family for sign, family in _SIGNS if sign in said), HERMES)
    special = {}
    for mark in filter(None, (chosen.opening, chosen.end)):
        ids = tokenizer.encode(mark, add_special_tokens=False)
        if len(ids) == 1 and tokenizer.is_special(ids[0]):
            special[mark] = ids[0]
    return replace(chosen, special=special)
