"""Behaviour through gRPC: a server in this process on SQLite, a real client."""
