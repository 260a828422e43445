"""A contestant without a model: row i's tokens are its prompt's first token, counted up."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.contestants.protocol import Setup, serve


class Stub:
    def __init__(self, setup: Setup) -> None:
        print("a library greets on stdout")
        self._prompts = setup.prompts

    def run(self, adapters: Sequence[str | None], num_out: int) -> list[list[int]]:
        if "broken" in adapters:
            sys.exit("this adapter is broken")
        firsts = [prompt[0] for prompt in self._prompts[: len(adapters)]]
        return [[first + i for i in range(num_out)] for first in firsts]

    def notes(self) -> dict[str, str]:
        return {"kind": "stub"}


if __name__ == "__main__":
    serve(Stub)
