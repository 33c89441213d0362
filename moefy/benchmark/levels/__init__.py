"""What a sweep walks through: the experts alone, a layer, a whole model."""
