"""What becomes of a cluster that is asked for many times what it can do."""
