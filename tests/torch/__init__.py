"""Saves and loads by real torch ranks."""
