"""Mixed load on real processes for a long time, with random kills. `python -m bench.soak --help`"""
