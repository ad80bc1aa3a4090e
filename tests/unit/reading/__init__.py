"""Reading without torch: what needs neither files of torch nor a server."""
