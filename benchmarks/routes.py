"""Which connection each simulated rank uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

#: Ranks that share a connection: the hosts of a real job have one for each rank, at a cost told elsewhere.
RANKS_PER_CHANNEL: Final = 256


@dataclass(frozen=True)
class Routes:
    """How ranks reach the service.

    Attributes:
        addresses: Where; each for the same number of neighbours.
        ranks_per_address: That number.
        ranks_per_channel: Neighbours that share a connection.
    """

    addresses: tuple[str, ...]
    ranks_per_address: int = 1 << 30
    ranks_per_channel: int = RANKS_PER_CHANNEL

    def groups(self, ranks: range) -> Iterator[tuple[str, int]]:
        """Yields the address of each connection that these ranks need, and how many ranks share it."""
        low = ranks.start
        while low < ranks.stop:
            at = low // self.ranks_per_address
            high = min(low + self.ranks_per_channel, (at + 1) * self.ranks_per_address, ranks.stop)
            yield self.addresses[at], high - low
            low = high
