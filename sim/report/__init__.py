"""What a simulation's result says: one HTML file to look at, and tables that compare results."""
