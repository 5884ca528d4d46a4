"""Is it computed right? The backbone and every backend, checked against a reference."""
