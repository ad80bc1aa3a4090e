"""The only SQL: tables, the database with its transactions, and one module of statements per noun.

May import SQLAlchemy, ``shardbook.core`` and ``shardbook.errors``. Functions take a connection inside a transaction
that ``database.Database`` opened; they judge nothing, the rules are in ``service``.
"""
