"""Rules and codecs by plain calls: no process, no database, no network."""
