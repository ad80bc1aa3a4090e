"""Whether everything that a checkpoint's metadata names is still on storage, file by file: ``verify``.

Sizes come from listings, a directory at a time, and are held against all extents at once. Data files are opened only to
compare their bytes with the checksums that were kept of them. May import the client and core; never torch, which only
``trusted`` needs, inside a function.
"""

from __future__ import annotations

from shardbook.verifying.api import Progress, verify
from shardbook.verifying.flagging import flag
from shardbook.verifying.report import FaultKind, FileFault, Source, VerifyReport

__all__ = ["FaultKind", "FileFault", "Progress", "Source", "VerifyReport", "flag", "verify"]
