"""What the experts are compared with: random partitions and weights, other seeds, other texts."""
