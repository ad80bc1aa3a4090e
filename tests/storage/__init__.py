"""Statements, transactions and migrations against real databases."""
