"""State dicts in memory that another process can read: what travels, and at what cost."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from shardbook.dcp.handover import pack, unpack
from shardbook.errors import InvalidArgumentError
from tests.torch.harness import Rank
from tests.torch.layouts import fill, objects, wrong_pieces


def test_tensors_and_objects_travel(tmp_path: Path) -> None:
    """Bit for bit, of every dtype, nested and empty ones included."""
    state = fill(objects(Rank(0, 1)))
    there = unpack(pack({"state_dict": state}))["state_dict"]
    assert [] == wrong_pieces(there)
    assert (state["words"], state["int"], None) == (there["words"], there["int"], there["none"])


def test_odd_tensors_travel() -> None:
    """Views, strides, sparse ones, parameters, and those without memory."""
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "whole": whole,
        "view": whole[1:3, ::2],
        "transposed": whole.T,
        "sparse": torch.eye(3).to_sparse(),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "meta": torch.zeros(3, device="meta"),
        "result": torch.ones(2, requires_grad=True) * 2,
    }
    there = unpack(pack({"state_dict": state}))["state_dict"]
    for name in ("whole", "view", "transposed", "parameter", "result"):
        assert torch.equal(state[name], there[name])
        assert state[name].stride() == there[name].stride()
    assert torch.equal(state["sparse"].to_dense(), there["sparse"].to_dense())
    assert ("meta", torch.Size((3,))) == (there["meta"].device.type, there["meta"].shape)
    there["whole"][1, 0] = -1
    assert -1 == there["view"][0, 0], "what shared memory shares it no more"
    assert 6 == whole[1, 0], "the copy is the original"


def test_thousands_of_tensors_take_one_descriptor() -> None:
    """Torch's own way takes one a tensor, and 1,024 are what a shell allows."""
    before, shared = len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))  # noqa: PTH208 - counted, not walked
    packed = pack({"state_dict": {str(n): torch.full((3,), n) for n in range(2000)}})
    assert before + 1 == len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert shared >= set(os.listdir("/dev/shm"))  # noqa: PTH208
    there = unpack(packed)["state_dict"]
    assert [1999] * 3 == there["1999"].tolist()
    del there
    assert before == len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.parametrize("field", ["state_dict", "planner"])
def test_what_cannot_be_pickled_is_named(field: str) -> None:
    """By the argument, and by its place in the state dict; the descriptor is not left open."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(InvalidArgumentError, match=r"'model\.deep\.1'") as caught:
        pack({"a": 1, field: {"model": {"fine": torch.ones(1), "deep": [0, threading.Lock()]}}})
    assert ("UNPICKLABLE", field) == (caught.value.reason, caught.value.violations[0].field)
    assert {"fqn": "model.deep.1"} == caught.value.metadata
    assert before == len(os.listdir("/proc/self/fd"))  # noqa: PTH208
