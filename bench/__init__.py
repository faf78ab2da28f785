"""Measures baton next to its peers: same model, same cores, same load, in turns.

`python -m bench --list` says what there is; `python -m bench.models` makes the models.
"""
