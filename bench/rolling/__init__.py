"""A rolling restart of every process under load, by SIGTERM: what clients see of it."""
