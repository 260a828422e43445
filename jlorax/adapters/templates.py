"""The chat template that an adapter ships with its weights, as its trainer's tokenizer saved it."""

from __future__ import annotations

import json
from pathlib import Path

from jlorax.adapters.files import read_file
from jlorax.errors import AdapterInvalid

_TEMPLATE_FILE = "chat_template.jinja"  # transformers since 4.52
_TOKENIZER_FILE = "tokenizer_config.json"
_MAX_BYTES = 1 << 20
_DEFAULT = "default"  # of several templates by name


def read_chat_template(folder: Path, adapter_id: str, root: Path | None = None) -> str | None:
    """None: the adapter brings none. AdapterInvalid when what it brings cannot be read."""
    if (folder / _TEMPLATE_FILE).exists():
        return _text(folder, _TEMPLATE_FILE, adapter_id, root)
    if not (folder / _TOKENIZER_FILE).exists():
        return None
    try:
        template = json.loads(_text(folder, _TOKENIZER_FILE, adapter_id, root)).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise AdapterInvalid(adapter_id, _TOKENIZER_FILE, f"is no JSON object: {error}") from None
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get(_DEFAULT)
    if template is None or isinstance(template, str):
        return template
    raise AdapterInvalid(adapter_id, _TOKENIZER_FILE, "has a chat_template that is no text")


def _text(folder: Path, name: str, adapter_id: str, root: Path | None) -> str:
    data, _ = read_file(folder, name, adapter_id, _MAX_BYTES, root)
    try:
        return bytes(data).decode()
    except UnicodeDecodeError as error:
        raise AdapterInvalid(adapter_id, name, f"is not UTF-8: {error}") from None
