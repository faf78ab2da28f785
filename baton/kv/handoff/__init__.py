"""The handoff protocol: prefill publishes KV under a lease, decode reads and releases it."""
