"""What is timed: engines by name, and how each computes a layer or runs a model."""
