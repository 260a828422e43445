"""Where an adapter's files come from; for now, a folder on this machine."""

from __future__ import annotations

import hashlib

from jlorax.adapters.files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    SourceIdentity,
    identify,
    read_file,
)
from jlorax.adapters.pack import layout_fingerprint
from jlorax.adapters.peft import Adapter, max_weights_bytes, parse_adapter
from jlorax.adapters.peft_config import parse_config
from jlorax.adapters.registry import AdapterRecord
from jlorax.errors import AdapterInvalid
from jlorax.layout import BankLayout


def load_local(record: AdapterRecord, layout: BankLayout) -> tuple[str, Adapter]:
    """(digest, adapter) of the very files that the version was resolved from.

    Other files by now, or while they are read: AdapterInvalid "changed while it was loaded"; the
    next request resolves to a new version.
    """
    adapter_id, folder, root = record.version.adapter_id, record.folder, record.root
    config_data, config_file = read_file(folder, CONFIG_FILE, adapter_id, MAX_CONFIG_BYTES, root)
    limit = max_weights_bytes(layout.projections, layout.max_rank)
    weights_data, weights_file = read_file(folder, WEIGHTS_FILE, adapter_id, limit, root)
    read = SourceIdentity(config_file, weights_file)
    if not read == record.identity == identify(folder, adapter_id, root):
        raise AdapterInvalid(adapter_id, WEIGHTS_FILE, "changed while it was loaded")
    config = parse_config(config_data, adapter_id, layout.max_rank)
    adapter = parse_adapter(config, weights_data, adapter_id, layout.projections)
    return digest(config_data, weights_data, layout), adapter


def digest(config_data: bytes, weights_data: bytes, layout: BankLayout) -> str:
    """Names the packed content: equal files packed for an equal layout."""
    content = hashlib.sha256(len(config_data).to_bytes(8, "little"))
    for part in (config_data, weights_data, layout_fingerprint(layout).encode()):
        content.update(part)
    return content.hexdigest()


def source_key(record: AdapterRecord, layout: BankLayout) -> str:
    """Key of the disk tier's index: finds the digest again without reading the files."""
    return f"{record.identity.key}@{layout_fingerprint(layout)}"
