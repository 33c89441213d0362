"""What a recipe names: partitions, routers, selections, compensations, each a file and a row.

No model is run here: a method sees one MLP as numbers (`moefy.models.mlp`) and its inputs.
"""
