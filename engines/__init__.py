"""Implementations of core.ports.Engine."""

import os

# GNU OpenMP reads this when torch is imported. Threads that wait then sleep; by default they
# spin, and where an engine shares its cores with anything else, the waiting half of a step keeps
# the working half off the processor: on two cores beside another busy process, one decode took
# 550 ms spinning and 90 ms sleeping, and 70 against 70 on a quiet machine (SmolLM2-135M, float32).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
