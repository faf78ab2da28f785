"""The cheapest fleet for a trace: an estimate, then simulations around it."""
