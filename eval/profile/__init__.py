"""How long it takes: components, stages and whole queries, beside what the hardware allows."""
