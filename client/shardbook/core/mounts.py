"""Which file systems are shared between machines, by the kernel's table of mounts."""

from __future__ import annotations

from typing import Final

#: File systems whose locks or shared memory do not hold between machines, or cost a call each.
_NETWORK_TYPES: Final = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "coda", "gfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs",
        "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "virtiofs", "vboxsf", "wekafs",
    }
)  # fmt: skip
#: FUSE file systems that are local disks after all.
_LOCAL_FUSE: Final = frozenset({"fuseblk", "fuse.ext2", "fuse.ntfs-3g", "fuse.fuse-overlayfs"})


def network_type(real_path: str, mount_table: str) -> str | None:
    """Returns the type of the network file system that a path lies on; None when it is local or not known.

    Args:
        real_path: Absolute path without links, of a file that need not exist yet.
        mount_table: Content of ``/proc/self/mountinfo``.
    """
    best, kind = "", ""
    for line in mount_table.splitlines():
        fields = line.split(" ")
        if "-" not in fields or len(fields) < fields.index("-") + 2:
            continue
        mount = fields[4].encode().decode("unicode_escape")
        # Of two mounts on one point the later one counts.
        inside = mount in {"/", real_path} or real_path.startswith(mount + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, fields[fields.index("-") + 1]
    if kind in _NETWORK_TYPES or (kind.startswith("fuse") and kind not in _LOCAL_FUSE):
        return kind
    return None
