"""Reading without torch what torch wrote."""
