"""HTTP beside gRPC, in the same event loop: what operators and their machines ask for.

May import ``shardbook_server.service`` and ``shardbook_server.listening``; ``shardbook_server.operations`` wires
it. ``ops`` has the routes, ``http`` the server.
"""
