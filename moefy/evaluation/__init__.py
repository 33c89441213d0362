"""How far a moefied model is from its dense self, with intervals over documents."""
