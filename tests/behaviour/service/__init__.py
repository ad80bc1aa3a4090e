"""Behaviour of the services, called plainly, on a real SQLite file that the real migrations made."""
