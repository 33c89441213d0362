"""Which expert owns each neuron of one layer: one file a method; `partition.py` has the table."""
