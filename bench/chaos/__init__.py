"""Real processes, real signals: what dies, when, and what clients see of it."""
