"""A worker process that can prefill and decode: one at a time, as the conductor's planner wants."""
