"""Tensors of checkpoints as numpy arrays, without torch: ``read`` and ``read_many``.

``finding`` says where chunks lie, ``filling`` reads them; between them stand the formats (``torch_save`` with
``tensor_pickle``, ``safetensors_file``, ``plain_metadata``, ``transforms``) and ``ranges``, which reads bytes. Nothing
that a file holds is ever executed. May import the client and core; never torch, and numpy's other dtypes
(``ml_dtypes``) and fsspec only when they are needed.
"""

from __future__ import annotations

from shardbook.reading.api import read, read_many
from shardbook.reading.region import Region

__all__ = ["Region", "read", "read_many"]
