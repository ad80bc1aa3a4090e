"""The Shardbook server: rules and storage behind a gRPC edge.

Never imports torch; from the client only ``shardbook.core``, ``shardbook.errors`` and ``shardbook.v1``. Imports point
down: ``rpc`` and ``web`` call ``service``, ``service`` calls ``storage``, ``app`` wires.
"""
