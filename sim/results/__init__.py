"""The published figures of the Mooncake papers, simulated: docs/results/mooncake.md."""
