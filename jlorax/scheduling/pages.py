"""The KV page pool's books. Page 0 belongs to padding and is never handed out."""

from __future__ import annotations


class PagePool:
    """Free list over pages 1 .. num_pages - 1, last freed first used."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.num_usable = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def grow(self, pages: list[int], num_tokens: int) -> bool:
        """Extends ``pages`` to hold num_tokens tokens; False, and nothing taken, when short."""
        missing = self.pages_for(num_tokens) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            pages.append(self._free.pop())
        return True

    def free(self, pages: list[int]) -> None:
        """Takes all of ``pages`` back and empties the list."""
        self._free.extend(reversed(pages))
        pages.clear()

    def check(self, held: list[list[int]]) -> None:
        """Asserts that every page is free or held exactly once."""
        everything = sorted([*self._free, *(page for pages in held for page in pages)])
        assert everything == list(range(1, self.num_usable + 1)), everything
