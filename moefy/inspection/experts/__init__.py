"""What one expert contributes, on which tokens, and what it is told apart by."""
