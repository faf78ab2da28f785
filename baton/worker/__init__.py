"""What prefill and decode workers share: configuration, assembly, links, life cycle."""
