"""Code that both sides of the wire share: geometry, codecs, digests, assembly. numpy and zstandard only, no I/O, no torch."""
