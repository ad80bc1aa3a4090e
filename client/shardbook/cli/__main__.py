"""``python -m shardbook.cli`` is the ``shardbook`` command."""

from __future__ import annotations

from shardbook.cli import main

if __name__ == "__main__":
    main()
