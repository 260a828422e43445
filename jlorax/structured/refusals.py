"""llguidance's messages as a user should read them: what is wrong, without its own notes."""

from __future__ import annotations

import re

from jlorax.types import Constraint, ConstraintKind

MAX_CHARACTERS = 300
NO_TOKEN = "no token may follow"
_SOURCE_LISTING = re.compile(r"\n +\d+ \| .*", re.DOTALL)
_NOTES = re.compile(r"\n?<(non-verbose|backtrace|state)/?>.*", re.DOTALL)
_PLACE = re.compile(r"^(at )?\d+\(\d+\): ")
_ABOUT_LARK = re.compile(
    r'failed to (compile JSON schema|parse "%json"): |invalid regex ".*" \(in regex\): ', re.DOTALL
)
_REGEX_LISTING = re.compile(r"(regex parse error):\n.*\nerror", re.DOTALL)
_HINTS = re.compile(r" Enable '\w+' option to [^.\n]*|; either increase limits\.[^.\n]*")


def in_words(constraint: Constraint, message: str) -> str:
    """Why the constraint is refused, to follow the name of its kind."""
    if message.startswith("is too complex"):  # our own
        return message
    if constraint.kind is not ConstraintKind.GRAMMAR:  # the others have no Lark of their own
        message = _ABOUT_LARK.sub("", _PLACE.sub("", message))
    message = plain(message)
    return "admits no answer" if message == NO_TOKEN else f"cannot be used: {message}"


def plain(message: str) -> str:
    """On one line, without its listings, and not too long."""
    for junk in (_NOTES, _SOURCE_LISTING, _HINTS):
        message = junk.sub("", message)
    message = " ".join(_REGEX_LISTING.sub(r"\1", message).split())
    if message == "NoExtensionBias":
        return NO_TOKEN
    return message if len(message) <= MAX_CHARACTERS else message[:MAX_CHARACTERS] + "..."
