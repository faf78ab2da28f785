"""Scripts of development; not installed."""
