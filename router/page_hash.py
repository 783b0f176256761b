"""Page hashes of PROTOCOL.md, section 3.1: equal hashes mean equal tokens from position 0 on."""

import struct
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest


def root_hash(adapter: str = "", cache_salt: str = "") -> int:
    """The parent of a sequence's first page."""
    return xxh3_64_intdigest(adapter.encode() + b"\0" + cache_salt.encode())


def page_hashes(token_ids: Sequence[int], page_size: int, root: int) -> list[int]:
    """One hash for each whole page of `page_size` tokens; a partial last page has none.

    Raises struct.error for ids outside 0..2^32-1.
    """
    hashes = []
    parent = root
    whole = len(token_ids) // page_size * page_size
    data = struct.pack(f"<{whole}I", *token_ids[:whole])
    for at in range(0, 4 * whole, 4 * page_size):
        parent = xxh3_64_intdigest(parent.to_bytes(8, "little") + data[at : at + 4 * page_size])
        hashes.append(parent)
    return hashes
