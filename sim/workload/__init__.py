"""What a simulated cluster is asked: recorded traces, generated ones, and what is in them."""
