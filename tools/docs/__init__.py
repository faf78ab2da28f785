"""Makes the generated parts of the documentation and checks its links; see `__main__.py`."""
