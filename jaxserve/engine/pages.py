"""The KV pages of one data-parallel rank: which are free, and an audit that none is lost.

A page is an integer; the pool knows nothing of devices. Every page has exactly one owner: the free
list, the prefix tree, or one request.

Freeing a page while a launched step still writes to it is safe: steps run on the device in launch
order, so whoever gets the page next writes it in a later step, before reading it.
"""

from collections.abc import Iterable
from itertools import pairwise


class PagePool:
    """`num_pages` pages, handed out last-freed first."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages; the caller has made sure that they are there."""
        assert count <= len(self._free), f"asked for {count} pages, {len(self._free)} are free"
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken

    def free(self, pages: Iterable[int]) -> None:
        self._free.extend(pages)

    def check(self, owned: Iterable[int]) -> None:
        """Audit: the free pages and the `owned` ones are all pages, each once. Raises AssertionError."""
        seen = sorted([*self._free, *owned])
        assert seen == list(range(self.num_pages)), _difference(seen, self.num_pages)


def _difference(seen: list[int], num_pages: int) -> str:
    twice = sorted({a for a, b in pairwise(seen) if a == b})
    lost = sorted(set(range(num_pages)) - set(seen))
    foreign = sorted(set(seen) - set(range(num_pages)))
    return (
        f"pages owned twice: {twice[:10]}, pages lost: {lost[:10]} of {num_pages}, "
        f"pages that are none: {foreign[:10]}"
    )
