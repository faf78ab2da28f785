"""A simulation of this machine, held against a real cluster on it."""
