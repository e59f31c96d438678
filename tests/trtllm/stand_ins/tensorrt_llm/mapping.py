"""How ranks split a model."""

from __future__ import annotations


class Mapping:
    """One rank's place."""

    __slots__ = ("gpus_per_node", "pp_size", "rank", "tp_size", "world_size")

    def __init__(
        self,
        world_size: int = 1,
        rank: int = 0,
        gpus_per_node: int = 8,
        *,
        cp_size: int = 1,
        tp_size: int = 1,
        pp_size: int = 1,
    ) -> None:
        """Raise ValueError if the sizes do not make this world, or the rank is not in it."""
        if cp_size * tp_size * pp_size != world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"rank {rank} of {world_size}, which is not {cp_size} * {tp_size} * {pp_size}"
            )
        self.world_size = world_size
        self.rank = rank
        self.gpus_per_node = gpus_per_node
        self.tp_size = tp_size
        self.pp_size = pp_size

    def has_pp(self) -> bool:
        return self.pp_size > 1

    def is_first_pp_rank(self) -> bool:
        return self._pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self._pp_rank == self.pp_size - 1

    def pp_layers(self, num_layers: int) -> list[int]:
        """Return the layers of this rank."""
        count = num_layers // self.pp_size
        return list(range(self._pp_rank * count, (self._pp_rank + 1) * count))

    @property
    def _pp_rank(self) -> int:
        return self.rank // (self.world_size // self.pp_size)
