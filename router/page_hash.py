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
    pack = struct.Struct(f"<Q{page_size}I").pack
    for at in range(0, len(token_ids) - page_size + 1, page_size):
        parent = xxh3_64_intdigest(pack(parent, *token_ids[at : at + page_size]))
        hashes.append(parent)
    return hashes
