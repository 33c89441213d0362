"""What happens to the model when experts are taken away: effects, their chance level, their limits."""
