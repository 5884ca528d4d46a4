"""Stage 4: distil a draft for a policy, from recordings or a data set of frames."""
