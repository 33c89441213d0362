"""What every description is held against: random partitions, weights, seeds, other texts."""
