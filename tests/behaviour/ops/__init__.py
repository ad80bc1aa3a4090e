"""What operators see of a running server: pages over HTTP, metrics, log lines, spans, settings."""
