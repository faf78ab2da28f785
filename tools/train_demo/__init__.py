"""Trains the demo model that ships in `baton/demo/model`: `python -m tools.train_demo --help`."""
