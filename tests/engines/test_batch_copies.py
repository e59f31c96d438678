"""What can be shown of batches without a GPU; tests/gpu has the copies."""

from __future__ import annotations

import torch

from engines.batch_copies import piece_addresses


def test_a_piece_begins_at_the_first_of_its_layers() -> None:
    """A block of 3 layers of 8 numbers is 96 bytes; layer 1 begins 32 bytes in."""
    pool = torch.zeros(5, 3, 2, 4)

    addresses = piece_addresses(pool, (4, 0), slice(1, 3))

    assert addresses.tolist() == [pool[4, 1].data_ptr(), pool[0, 1].data_ptr()]
    assert addresses[1] - pool.data_ptr() == 32
