"""Code that both sides of the wire share: geometry, codecs, digests, assembly.

May import numpy, zstandard and ``shardbook.errors``. No I/O, no torch, no gRPC.
"""
