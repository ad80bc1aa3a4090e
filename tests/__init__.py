"""Tests of Shardbook: one package, so that spawned processes find its helpers by name."""
