"""Arrays that are made block by block."""

import numpy as np
import pytest

from jaxserve.row_blocks import BLOCK_ROWS, in_row_blocks

ROWS = np.arange(6 * BLOCK_ROWS).reshape(-1, 2)


@pytest.mark.parametrize("rows", [slice(0, 0), slice(3, 9), slice(7, 2 * BLOCK_ROWS + 8)], ids=str)
def test_blocks_come_in_order_and_cover_the_rows(rows):
    asked = []

    def make(part):
        asked.append(part)
        return ROWS[part]

    np.testing.assert_array_equal(in_row_blocks(make, rows), ROWS[rows])
    assert sum(part.stop - part.start for part in asked) == rows.stop - rows.start


def test_error_in_a_block_is_raised():
    def make(part):
        if part.start:
            raise ValueError("a damaged block")
        return ROWS[part]

    with pytest.raises(ValueError, match="a damaged block"):
        in_row_blocks(make, slice(0, 2 * BLOCK_ROWS))
