"""Which experts run for which tokens, and what explains it."""
