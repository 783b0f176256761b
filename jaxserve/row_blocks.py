"""Arrays on the host that are made block by block of their rows, by all cores."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BLOCK_ROWS = 256


def in_row_blocks(make: Callable[[slice], np.ndarray], rows: slice) -> np.ndarray:
    """make(rows), of blocks of them. numpy holds no lock where it computes and copies."""
    blocks = [slice(at, min(at + BLOCK_ROWS, rows.stop)) for at in range(rows.start, rows.stop, BLOCK_ROWS)]
    if len(blocks) < 2:
        return make(rows)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(make, blocks)))
