"""JSON schemas by chance, of the features that are served."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
_NAMES = ("a", "b", "name", "the list", "ü", 'q"uote', "x_1", "empty", "$ref", "properties")
_WORDS = ("", "red", "grün", "a b", "\n", '"', "\\", "日本", "0", "true")
_PATTERNS = (r"^[a-z]{2,5}$", r"^\d{3}-\d{4}$", r"^(yes|no)$", r"^x*y+$", r"^.{0,3}ab")
_FORMATS = ("uuid", "ipv4", "ipv6")


def random_schema(chance: random.Random) -> Schema:
    """Its top is an object or an array; it may refer to itself."""
    maker = _Maker(chance)
    top = maker.object(2) if chance.random() < 0.7 else maker.array(2)
    return top | {"$defs": {"node": maker.node(), "leaf": maker.leaf()}}


class _Maker:
    """``depth``: how many levels of objects and arrays may follow."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def node(self) -> Schema:
        """A list linked by references to itself."""
        following = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        properties = {"value": self.leaf(), "next": following}
        return self._closed(properties, ["value", "next"])

    def leaf(self) -> Schema:
        makers = (self._string, self._integer, self._number, self._enum, self._plain)
        return self._chance.choice(makers)()

    def object(self, depth: int) -> Schema:
        names = self._chance.sample(_NAMES, self._chance.randint(0, 4))
        properties = {name: self._any(depth - 1) for name in names}
        required = [name for name in names if self._chance.random() < 0.6]
        if self._chance.random() < 0.7:
            return self._closed(properties, required)
        schema = {"type": "object", "properties": properties, "required": required}
        return schema | {"additionalProperties": self.leaf()}

    def array(self, depth: int) -> Schema:
        low = self._chance.randint(0, 2)
        schema: Schema = {"type": "array", "minItems": low}
        if self._chance.random() < 0.3:
            schema["prefixItems"] = [self.leaf() for _ in range(2)]
        if self._chance.random() < 0.7:
            schema["maxItems"] = low + self._chance.randint(0, 3)
        return schema | {"items": self._any(depth - 1)}

    def _any(self, depth: int) -> Schema:
        makers = [self.leaf, self.leaf, self._reference, lambda: self._either(depth)]
        if depth > 0:
            makers += [lambda: self.object(depth), lambda: self.array(depth)]
        return self._chance.choice(makers)()

    def _closed(self, properties: Schema, required: list[str]) -> Schema:
        """As OpenAI's strict schemas are."""
        schema = {"type": "object", "properties": properties, "required": required}
        return schema | {"additionalProperties": False}

    def _either(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth - 1), self.leaf(), {"type": "null"}]}

    def _reference(self) -> Schema:
        return {"$ref": self._chance.choice(["#/$defs/node", "#/$defs/leaf"])}

    def _string(self) -> Schema:
        match self._chance.randrange(4):
            case 0:
                return {"type": "string", "pattern": self._chance.choice(_PATTERNS)}
            case 1:
                return {"type": "string", "format": self._chance.choice(_FORMATS)}
            case 2:
                low = self._chance.randint(0, 5)
                high = low + self._chance.randint(0, 20)
                return {"type": "string", "minLength": low, "maxLength": high}
        return {"type": "string"}

    def _integer(self) -> Schema:
        low = self._chance.randint(-1000, 1000)
        schema: Schema = {"type": "integer", "minimum": low}
        if self._chance.random() < 0.5:
            schema["maximum"] = low + self._chance.randint(20, 5000)
        if self._chance.random() < 0.3:
            schema["multipleOf"] = self._chance.randint(1, 20)
        return schema

    def _number(self) -> Schema:
        low = round(self._chance.uniform(-100, 100), 2)
        return {"type": "number", "exclusiveMinimum": low, "maximum": low + 50}

    def _enum(self) -> Schema:
        if self._chance.random() < 0.3:
            return {"const": self._chance.choice(_WORDS)}
        values: list[Any] = [*self._chance.sample(_WORDS, 3), 1, None, True, {"k": [1, 2]}]
        return {"enum": self._chance.sample(values, 3)}

    def _plain(self) -> Schema:
        return self._chance.choice([{"type": "boolean"}, {"type": ["null", "boolean", "integer"]}])
