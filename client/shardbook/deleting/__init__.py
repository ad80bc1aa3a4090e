"""Deletes the data files of checkpoints: those that the catalogue or a directory's own note calls deleted; no torch.

Nothing else of Shardbook deletes a data file, least of all the server. Decision 0032 has the order and why.
"""

from shardbook.deleting.api import DeletedFiles, FileList, check_reach, delete_files, list_files
from shardbook.deleting.offline import PrunedDirectories, plan_directories

__all__ = [
    "DeletedFiles",
    "FileList",
    "PrunedDirectories",
    "check_reach",
    "delete_files",
    "list_files",
    "plan_directories",
]
