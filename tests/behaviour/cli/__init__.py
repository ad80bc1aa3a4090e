"""The `shardbook` command, run as people run it."""
