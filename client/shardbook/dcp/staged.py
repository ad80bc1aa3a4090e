"""Copies of state dicts, made as another stager makes them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager


class StagedByAnother(AsyncStager):
    """A stager that has another one copy: the storage writer that it stands for, as torch's ``async_save`` would.

    While there is none yet, it copies as DCP's writers do.
    """

    _usual: BlockingAsyncStager | None = None

    @property
    def _stager(self) -> AsyncStager | None:
        """The other one; None while there is none."""
        return None

    @property
    def should_synchronize_after_execute(self) -> bool:
        """As the other one has it."""
        return self._another.should_synchronize_after_execute

    def stage(self, state_dict: dict[str, Any]) -> Future[dict[str, Any]] | dict[str, Any]:
        """Copies a state dict."""
        return self._another.stage(state_dict)

    def synchronize_staging(self) -> None:
        """Waits for the copy."""
        self._another.synchronize_staging()

    def close(self) -> None:
        """Ends what copying needs."""
        self._another.close()

    @property
    def _another(self) -> AsyncStager:
        if self._stager is not None:
            return self._stager
        if self._usual is None:
            self._usual = BlockingAsyncStager()
        return self._usual


__all__ = ["StagedByAnother"]
