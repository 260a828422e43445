"""Regular expressions by chance, of what Python's re and the automata both read.

What repeats without end is a single character, or a random answer would not end, nor would
Python's re go through a group of them in a lifetime. Nothing of letters and non-digits: Unicode's
own idea of a letter is a little wider than Python's, and a digit is one of 0 to 9 here.
"""

from __future__ import annotations

import random

_CLASSES = (r"\d", "[a-zä_]", r"\s", "[a-f]", "[^xyz]", ".", "[äöü]", r"[\d.,-]")
_LITERALS = ("a", " ", r"\.", r"\/", "/", r"\\", '"', "ß", r"\n", "-", "#", "日")
_BOUNDED = ("", "", "?", "{2}", "{1,4}", "{0,3}")
_UNBOUNDED = ("*", "+", "{3,}")


def random_regex(chance: random.Random, depth: int = 1) -> str:
    alternatives = [_sequence(chance, depth) for _ in range(chance.choice([1, 1, 2, 3]))]
    return "|".join(alternatives)


def _sequence(chance: random.Random, depth: int) -> str:
    return "".join(_item(chance, depth) for _ in range(chance.randint(1, 3)))


def _item(chance: random.Random, depth: int) -> str:
    if depth > 0 and chance.random() < 0.4:
        item = f"({random_regex(chance, depth - 1)})"
    elif chance.random() < 0.6:
        item = chance.choice(_CLASSES)
    else:
        return chance.choice(_LITERALS) + chance.choice(_BOUNDED + _UNBOUNDED)
    return item + chance.choice(_BOUNDED)
