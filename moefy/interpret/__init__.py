"""What the experts of a moefied model do: descriptions, causes, controls, as plain tables."""
