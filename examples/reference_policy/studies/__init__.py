"""Studies that the package does not need: evidence for how it is built, and for what it is worth."""
