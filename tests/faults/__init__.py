"""Faults injected for real: killed processes, full disks, silent servers."""
