"""A policy in LIBERO: episodes in simulators of their own, and the results file."""
