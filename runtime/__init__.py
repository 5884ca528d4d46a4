"""Stage 2: run a policy. Sessions launch the parts; `speculate` decides; `policy` joins them."""
