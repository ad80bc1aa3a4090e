"""The client over real sockets against servers that a test scripts. May import shardbook, never the server."""
