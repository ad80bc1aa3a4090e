"""The edge as clients meet it: a real grpc.aio server in this process, on a temporary SQLite database."""
