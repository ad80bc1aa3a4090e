"""Rules and transactions, as plain synchronous Python.

May import ``shardbook_server.storage``, ``shardbook.core`` and ``shardbook.errors``. Knows no messages, no status
codes and no SQL: requests and answers are the frozen dataclasses of ``types`` and ``views``, refusals are the errors
of ``shardbook.errors`` with field paths as in the protos. Every service can be used from several threads.
"""
