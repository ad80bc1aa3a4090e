"""A small transformer trained with FSDP2 and saved with Shardbook: what a training script has to say.

    torchrun --nproc-per-node 4 examples/train.py demo/tiny --root /tmp/ckpt --steps 3
    torchrun --nproc-per-node 2 examples/train.py demo/tiny --root /tmp/ckpt --steps 1 --resume demo/tiny@latest
    python examples/train.py demo/tiny --root /tmp/ckpt --steps 1 --resume demo/tiny@latest --no-save

The options with ``demo:`` in their help are the demo's: they compare, and they stop at the right moment.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import shardbook.dcp as dcp

VOCABULARY, WIDTH, CONTEXT, BATCH = 256, 64, 32, 8


class TinyTransformer(nn.Module):
    """Two encoder layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=4 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits of the next token, (batch, context, vocabulary)."""
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


class Trainer:
    """Model, optimizer and schedule, sharded over the ranks if there are any."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = TinyTransformer()
        if dist.is_initialized():
            for layer in self.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.9)
        self.step = 0

    def train_step(self) -> float:
        """Trains on one batch; returns the loss."""
        self.step += 1
        tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(self.step))
        logits = self.model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return float(loss)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds: DTensors under FSDP, plain tensors in a single process."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer, "scheduler": self.scheduler.state_dict(), "step": self.step}

    def load(self, source: str) -> None:
        """Loads a ref or a directory."""
        state = self.state()
        dcp.load(state, source)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]

    def whole_state(self) -> dict[str, Any]:
        """Returns the unsharded state, on rank 0: what the demo compares bit for bit."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optim": optimizer, "scheduler": self.scheduler.state_dict(), "step": self.step}


def parse_arguments() -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("run", help="project/run")
    parser.add_argument("--root", type=Path, required=True, help="where checkpoints go: ROOT/step-N")
    parser.add_argument("--steps", type=int, required=True, help="steps to train")
    parser.add_argument("--resume", help="ref or directory to load first")
    parser.add_argument("--no-save", action="store_true", help="train without saving")
    parser.add_argument("--async-step", type=int, help="save this step in the background")
    parser.add_argument("--keep", type=Path, help="demo: write the whole state after each save to KEEP/step-N.pt")
    parser.add_argument("--expect", type=Path, help="demo: compare the loaded state with this file, bit for bit")
    parser.add_argument("--wait-before", type=int, help="demo: before this step, write ROOT/ready, wait for ROOT/go")
    return parser.parse_args()


def main() -> None:
    """Trains, saves and loads as the command line says."""
    arguments = parse_arguments()
    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if not arguments.no_save:
        dcp.init(run=arguments.run, resumed_from=arguments.resume)
    train(arguments, rank)
    if dist.is_initialized():
        # What holds the group goes first, so that gloo's threads end here: one that still lets go of a collective's
        # buffers while the interpreter ends takes the process down.
        gc.collect()
        dist.destroy_process_group()


def train(arguments: argparse.Namespace, rank: int) -> None:
    """Trains from the beginning, or from what is to be loaded."""
    trainer = Trainer()
    if arguments.resume:
        trainer.load(arguments.resume)
        say(rank, f"loaded {arguments.resume} at step {trainer.step} on {world_size()} rank(s)")
        compare(trainer, arguments.expect, rank)
    for _ in range(arguments.steps):
        wait_for_the_demo(arguments, trainer.step + 1, rank)
        loss = trainer.train_step()
        say(rank, f"step {trainer.step}: loss {loss:.4f}")
        if not arguments.no_save:
            save(trainer, arguments, rank)


def save(trainer: Trainer, arguments: argparse.Namespace, rank: int) -> None:
    """Saves one step, in the background when asked."""
    path = arguments.root / f"step-{trainer.step}"
    begin = time.perf_counter()
    if trainer.step == arguments.async_step:
        pending = dcp.async_save(trainer.state(), checkpoint_id=path)
        say(rank, f"step {trainer.step}: training may go on after {time.perf_counter() - begin:.2f} s")
        result = pending.upload_completion.result()
    else:
        result = dcp.save(trainer.state(), checkpoint_id=path)
    took_s = time.perf_counter() - begin
    print(
        f"[rank {rank}] step {trainer.step}: {result.state.name} {result.ref} in {took_s:.2f} s, "
        f"sent {result.stats.sent_bytes} bytes" + (f" ({result.reason})" if result.reason else ""),
        flush=True,
    )
    if arguments.keep:
        whole = trainer.whole_state()
        if rank == 0:
            torch.save(whole, arguments.keep / f"step-{trainer.step}.pt")


def compare(trainer: Trainer, expected: Path | None, rank: int) -> None:
    """Ends the process with an error unless the loaded state equals the file, bit for bit."""
    if expected is None:
        return
    whole = trainer.whole_state()
    if rank == 0:
        count = assert_equal(torch.load(expected, weights_only=False), whole, "state")
        say(rank, f"compared {count} values with what was saved: equal bit for bit")


def assert_equal(expected: Any, actual: Any, where: str) -> int:
    """Returns the number of leaves compared; raises where two states differ."""
    if isinstance(expected, dict):
        if expected.keys() != actual.keys():
            raise SystemExit(f"{where}: keys differ: {sorted(map(str, expected.keys() ^ actual.keys()))[:5]}")
        return sum(assert_equal(expected[key], actual[key], f"{where}.{key}") for key in expected)
    if isinstance(expected, (list, tuple)):
        if len(expected) != len(actual):
            raise SystemExit(f"{where}: lengths differ")
        pairs = zip(expected, actual, strict=True)
        return sum(assert_equal(one, other, f"{where}[{i}]") for i, (one, other) in enumerate(pairs))
    if isinstance(expected, torch.Tensor):
        same = expected.dtype == actual.dtype and torch.equal(expected.cpu(), actual.cpu())
    else:
        same = bool(expected == actual)
    if not same:
        raise SystemExit(f"{where}: differs from what was saved")
    return 1


def wait_for_the_demo(arguments: argparse.Namespace, step: int, rank: int) -> None:
    """Lets the demo do something between two steps."""
    if step != arguments.wait_before:
        return
    if rank == 0:
        (arguments.root / "ready").touch()
    deadline = time.monotonic() + 60
    while not (arguments.root / "go").exists():
        if time.monotonic() > deadline:
            raise SystemExit("nobody said go")
        time.sleep(0.05)


def world_size() -> int:
    """Returns the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(rank: int, text: str) -> None:
    """Prints on rank 0."""
    if rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
