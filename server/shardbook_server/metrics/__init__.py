"""Prometheus metrics of one server: the only place that knows the library.

``recorder`` counts what happens, ``state`` shows how things are when somebody asks. Each server has a registry of its
own, so that several in one process do not mix. May import ``shardbook_server.observer`` and ``service``'s views.
"""
