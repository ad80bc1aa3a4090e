"""The edge: gRPC messages in, service calls through one bridge, messages out.

May import ``shardbook_server.service``, ``shardbook.core``, ``shardbook.errors`` and ``shardbook.v1``. Runs on one
event loop and holds no rules and no SQL: a handler checks, converts, calls and converts. What is here besides the
handlers is what a service cannot see: admission, batching, waiting, deadlines, cancellation, and the wire form of
errors.
"""
