"""Many runs of one question, on one machine or on a Ray cluster."""
