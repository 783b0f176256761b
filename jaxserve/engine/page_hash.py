"""Names of cached pages that mean the same in every process (PROTOCOL.md, section 3.1).

A page's hash covers its tokens and, through its parent's hash, everything before them.
"""

import struct
from collections.abc import Sequence
from functools import cache

from xxhash import xxh3_64_intdigest


def root_hash(adapter: str = "", cache_salt: str = "") -> int:
    """The parent of a sequence's first page."""
    return xxh3_64_intdigest(b"%b\0%b" % (adapter.encode(), cache_salt.encode()))


def chain_hashes(parent: int, chunks: Sequence[Sequence[int]]) -> list[int]:
    """The hashes of consecutive pages below `parent`; each chunk holds the tokens of a page."""
    if not chunks:
        return []
    pack, hashes = _packer(len(chunks[0])), []
    for chunk in chunks:
        parent = xxh3_64_intdigest(pack(parent, *chunk))
        hashes.append(parent)
    return hashes


@cache
def _packer(page_size: int):
    return struct.Struct(f"<Q{page_size}I").pack
