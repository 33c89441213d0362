"""What every expert adds, token by token, while a model runs."""
