"""What is simulated, next to what is published: rows of specs, columns of figures.

Published figures are of Mooncake's papers (FAST'25, and its technical report for early rejection),
most of them read off the coordinates of their plots.
"""

from sim.results.experiments.caches import CACHES
from sim.results.experiments.capacity import CAPACITY, HIGHEST
from sim.results.experiments.overload import OVERLOAD
from sim.results.experiments.policies import POLICIES
from sim.results.experiments.prefill import PREFILL
from sim.results.experiments.sweeps import NETWORK, RATIO, REUSE

EXPERIMENTS = (PREFILL, POLICIES, CAPACITY, HIGHEST, CACHES, OVERLOAD, RATIO, NETWORK, REUSE)
