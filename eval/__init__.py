"""Stage 3: measure a policy on LIBERO, and compare runs."""
