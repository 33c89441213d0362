"""What runs: MLPs and attention in experts inside transformers models, hooks, interventions, load and save."""
