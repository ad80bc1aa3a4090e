"""Loads a checkpoint directory with torch's own ``torch.distributed.checkpoint``; nothing of Shardbook is imported.

python examples/plain_load.py DIRECTORY EXPECTED.pt
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def main() -> None:
    """Converts the directory with torch's converter, loads it with ``dcp.load``, and compares both."""
    directory, expected_path = sys.argv[1:3]
    converted = Path(expected_path).with_suffix(".converted.pt")
    dcp_to_torch_save(directory, converted)
    if any(name == "shardbook" or name.startswith("shardbook.") for name in sys.modules):
        raise SystemExit("shardbook was imported")
    expected = torch.load(expected_path, weights_only=False)
    state: dict[str, Any] = torch.load(converted, weights_only=False)
    for name, tensor in expected["model"].items():
        if not torch.equal(tensor, state["model"][name]):
            raise SystemExit(f"model.{name} differs")
    for name, moments in expected["optim"]["state"].items():
        for kind, tensor in moments.items():
            if not torch.equal(tensor, state["optim"]["state"][name][kind]):
                raise SystemExit(f"optim.state.{name}.{kind} differs")
    if state["step"] != expected["step"] or state["scheduler"] != expected["scheduler"]:
        raise SystemExit("step or scheduler differs")
    model = {name: torch.zeros_like(tensor) for name, tensor in expected["model"].items()}
    dcp.load({"model": model}, checkpoint_id=directory)
    for name, tensor in expected["model"].items():
        if not torch.equal(tensor, model[name]):
            raise SystemExit(f"model.{name} differs")
    print(f"plain DCP read step {state['step']}: {len(expected['model'])} tensors and their moments, equal bit for bit")


if __name__ == "__main__":
    main()
