"""The file of API keys. It holds no key, only hashes; what is wrong with it is told by line number,
without quoting, because a key may have been written there by mistake."""

from __future__ import annotations

import logging
import re
import stat
from hashlib import sha256
from pathlib import Path

from jlorax.config import ApiKey, Scope
from jlorax.errors import ConfigError

log = logging.getLogger("jlorax.http")

_FORM = "SHA256-IN-HEX TENANT SCOPE[,SCOPE], scopes are " + ", ".join(s.value for s in Scope)
_LINE = re.compile(r"([0-9A-Fa-f]{64})\s+([A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+([a-z]+(?:,[a-z]+)*)")
_SCOPES = {scope.value: scope for scope in Scope}


def digest_of(key: str) -> bytes:
    """Of a key as a header brings it; sha256, 32 bytes."""
    return sha256(key.encode(errors="surrogateescape")).digest()


_NO_KEY = digest_of("")  # what hashing a variable that is not set gives


def read_keys(file: Path) -> dict[bytes, ApiKey]:
    """By digest. Raises ConfigError for a file that is malformed, empty or names a key twice."""
    try:
        text = file.read_text(encoding="utf-8")
        is_public = bool(file.stat().st_mode & stat.S_IROTH)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--api-keys {file}: cannot be read: {reason}") from None
    keys = _parsed(file, text)
    if is_public:
        log.warning("--api-keys %s can be read by every user of this machine: chmod 600", file)
    return keys


def _parsed(file: Path, text: str) -> dict[bytes, ApiKey]:
    keys: dict[bytes, ApiKey] = {}
    lines: dict[bytes, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        said = line.partition("#")[0].strip()
        if not said:
            continue
        digest, key = _parsed_line(f"--api-keys {file}: line {number}", said)
        if digest in keys:
            raise ConfigError(
                f"--api-keys {file}: line {number} has the same key as line {lines[digest]}"
            )
        keys[digest], lines[digest] = key, number
    if not keys:
        raise ConfigError(f"--api-keys {file}: it has no key; a line is {_FORM}")
    return keys


def _parsed_line(place: str, said: str) -> tuple[bytes, ApiKey]:
    match = _LINE.fullmatch(said)
    scopes = match[3].split(",") if match else []
    if match is None or not _SCOPES.keys() >= set(scopes):
        raise ConfigError(f"{place} must be {_FORM}")
    digest = bytes.fromhex(match[1])
    if digest == _NO_KEY:
        raise ConfigError(f"{place} is the hash of an empty key")
    return digest, ApiKey(match[2], frozenset(_SCOPES[scope] for scope in scopes))
