"""Free text -> a JSON object with what it says of a person."""

from __future__ import annotations

import json
import random
from typing import Any

from jlorax.demo.tasks.example import Example
from jlorax.demo.tasks.people import CITIES, HOBBIES, faker

# field -> ways of saying it, for the text's first and third person
_SAYINGS = {
    "name": (("I am {}", "my name is {}", "{} here", "I'm {}"), ("{}",)),
    "age": (("I am {} years old", "{} years of age"), ("is {} years old", "turned {} this year")),
    "city": (("I live in {}", "from {}", "I moved to {}"), ("lives in {}", "comes from {}")),
    "job": (("I work as a {}", "my job is {}"), ("works as a {}", "is a {}")),
    "company": (("I am employed at {}", "at {}"), ("is employed by {}", "joined {}")),
    "likes": (("I love {}", "I really like {}", "I enjoy {}"), ("loves {}", "enjoys {}")),
    "email": (("write to me at {}", "my email is {}"), ("can be reached at {}",)),
}
_ASIDES = (
    " Thank you very much!",
    " Could you tell me when you open on Sunday?",
    " See you soon.",
    " I have a question about my order.",
    " The weather was lovely last week.",
    " What is the best way to get there?",
    " Which river is the longest one?",
    " Please call me back.",
    "",
    "",
)


def json_examples(rng: random.Random, num_examples: int) -> list[Example]:
    fake = faker(rng)
    examples = [_json_example(rng, fake) for _ in range(num_examples)]
    # a question about a table says something of its author too
    return [_of_table_question(rng, fake) if rng.random() < 0.15 else e for e in examples]


def _json_example(rng: random.Random, fake: Any) -> Example:
    person = _person(rng, fake)
    others = rng.sample(sorted(person.keys() - {"name"}), rng.randint(1, 4))
    fields = ["name", *others]
    told = {key: person[key] for key in _SAYINGS if key in fields}  # always in this order
    text = _first_person(rng, told, fields) if rng.random() < 0.6 else _third(rng, told, fields)
    return Example(text + rng.choice(_ASIDES), json.dumps(told, ensure_ascii=False))


def _person(rng: random.Random, fake: Any) -> dict[str, str | int]:
    name = fake.name()
    return {
        "name": name,
        "age": rng.randint(18, 90),
        "city": fake.city() if rng.random() < 0.5 else rng.choice(CITIES),
        "job": fake.job().split(",")[0].split("/")[0].lower(),
        "company": fake.company().split(",")[0],
        "likes": rng.choice(HOBBIES),
        "email": f"{name.split()[0].lower()}@{fake.free_email_domain()}",
    }


def _first_person(rng: random.Random, told: dict[str, Any], order: list[str]) -> str:
    parts = [rng.choice(_SAYINGS[key][0]).format(told[key]) for key in order]
    text = rng.choice((", ", " and ")).join(parts[:2])
    text = ". ".join([text, *(part[0].upper() + part[1:] for part in parts[2:])])
    return rng.choice(("Hi, ", "Hello! ", "")) + text + rng.choice((".", "!", "."))


def _third(rng: random.Random, told: dict[str, Any], order: list[str]) -> str:
    parts = [rng.choice(_SAYINGS[key][1]).format(told[key]) for key in order[1:]]
    listed = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return f"{told['name']} {listed}."


def _of_table_question(rng: random.Random, fake: Any) -> Example:
    person = {"name": fake.name(), "city": rng.choice(CITIES), "likes": rng.choice(HOBBIES)}
    columns = ", ".join(rng.sample(("id", "name", "year", "country", "price", "size"), 3))
    opening = "I am {name} from {city} and I love {likes}. ".format(**person)
    question = f"Which one in the table {fake.word()}s({columns}) has the highest value?"
    return Example(opening + question, json.dumps(person, ensure_ascii=False))
