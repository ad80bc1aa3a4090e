"""Which commands there are, and where each stands; one is imported when it is called.

``--help``, and a shell that completes the name of a command, need no more than this table.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Final

import typer


@dataclass(frozen=True)
class Entry:
    """A command that has not been imported.

    Attributes:
        name: What people type.
        module: Module of ``shardbook.cli`` that it stands in.
        function: Its function there.
        summary: The first sentence of its docstring, which ``shardbook --help`` lists.
        examples: Name of the text there that ends its help.
    """

    name: str
    module: str
    function: str
    summary: str
    examples: str = "EXAMPLES"

    def load(self) -> Any:
        """Returns the command, as Typer makes it; raises whatever keeps its module from being imported."""
        module = importlib.import_module(f"shardbook.cli.{self.module}")
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command(self.name, epilog=getattr(module, self.examples))(getattr(module, self.function))
        return typer.main.get_command(app)


#: By name, in the order of the help.
COMMANDS: Final = {
    one.name: one
    for one in (
        Entry(
            "demo",
            "demo",
            "demo",
            "Show the whole story on this machine, in some seconds: save, find, load, lose the server, bring it level.",
        ),
        Entry("projects", "projects", "list_projects", "List projects."),
        Entry("runs", "runs", "list_runs", "List runs: where each stands, and who writes it."),
        Entry("ls", "checkpoints", "list_checkpoints", "List the checkpoints of one run or of several.", "LS_EXAMPLES"),
        Entry("show", "checkpoints", "show_checkpoint", "Show everything about one checkpoint.", "SHOW_EXAMPLES"),
        Entry("label", "describing", "label", "Set, remove or show the labels of a checkpoint.", "LABEL_EXAMPLES"),
        Entry("metric", "describing", "metric", "Set, remove or show the metrics of a checkpoint.", "METRIC_EXAMPLES"),
        Entry("note", "describing", "note", "Keep a note with a checkpoint, or show it.", "NOTE_EXAMPLES"),
        Entry(
            "alias",
            "aliases",
            "alias",
            "List the aliases of a run, or set, move or delete one: a name for a checkpoint, as in project/run@best.",
        ),
        Entry(
            "lineage",
            "lineage",
            "lineage",
            "Show where a checkpoint comes from and what came of it, or record that by hand.",
        ),
        Entry(
            "watch",
            "watch",
            "watch",
            "Print what happens in the catalogue, as it happens; or run a command on every checkpoint that is "
            "committed.",
        ),
        Entry("tensors", "tensors", "list_tensors", "List what a committed checkpoint holds, in state-dict order."),
        Entry(
            "chunks",
            "chunks",
            "list_chunks",
            "List the chunks of a tensor: what each holds, who wrote it, and where its bytes are.",
        ),
        Entry(
            "diff",
            "diff",
            "diff_checkpoints",
            "Compare what two checkpoints hold: tensors, dtypes, shapes, chunks, bytes, world size.",
        ),
        Entry(
            "status",
            "status",
            "show_status",
            "Show where the saves of a run stand: what is open, which ranks are missing, and the last commit.",
        ),
        Entry("cat", "cat", "cat", "Print tensors of a checkpoint, or write them to a file."),
        Entry(
            "read",
            "read",
            "read",
            "Say what the values of tensors are like: least, largest, mean, deviation, and how many are zero or no "
            "number.",
        ),
        Entry(
            "export",
            "export",
            "export",
            "Write DCP's own .metadata of a checkpoint, as plain torch.distributed.checkpoint reads it.",
        ),
        Entry(
            "du",
            "du",
            "disk_usage",
            "Show how many bytes the checkpoints of runs take, largest first, as the catalogue has them.",
        ),
        Entry(
            "verify",
            "verify",
            "verify_checkpoint",
            "Check that every data file of a checkpoint is there, and long enough for all that lies in it.",
        ),
        Entry("hold", "deleting", "hold", "Keep a checkpoint from being deleted while it is read.", "HOLD_EXAMPLES"),
        Entry("release", "deleting", "release", "End a hold; one that is not there is no error.", "RELEASE_EXAMPLES"),
        Entry("prune", "pruning", "prune", "Delete the checkpoints of a run that no rule keeps; first it says which."),
        Entry(
            "policy",
            "pruning",
            "policy",
            "Show or store what `shardbook prune` keeps of a run when it is told nothing.",
            "POLICY_EXAMPLES",
        ),
        Entry(
            "rm",
            "deleting",
            "rm",
            "Delete a checkpoint from the catalogue, and with --delete-files its data.",
            "RM_EXAMPLES",
        ),
        Entry(
            "undelete",
            "deleting",
            "undelete",
            "Bring a deleted checkpoint back, with all that was said of it but its aliases.",
            "UNDELETE_EXAMPLES",
        ),
        Entry("sync", "sync", "sync", "Record what checkpoint directories hold and the catalogue lacks."),
        Entry(
            "import",
            "imports",
            "import_checkpoints",
            "Record existing checkpoints in a run: by plain DCP, or saved under another catalogue.",
        ),
        Entry(
            "gc", "gc", "collect", "List or remove the files of saves that were killed and never became checkpoints."
        ),
        Entry(
            "move",
            "move",
            "move_checkpoints",
            "Tell the catalogue that checkpoints have been copied to another store, once all of their files are there.",
        ),
        Entry(
            "stores",
            "stores",
            "list_stores",
            "List the stores that are configured here, and whether each can be reached.",
        ),
        Entry(
            "doctor",
            "doctor",
            "doctor",
            "Check what saves and loads need: packages, settings, server, token, clock, stores; say what to do.",
        ),
        Entry(
            "relay",
            "relay",
            "relay",
            "Pass the calls of this host's ranks on over one connection, until SIGTERM or Ctrl-C.",
        ),
    )
}

__all__ = ["COMMANDS", "Entry"]
