"""What is read: documents, their tokens, and the tables that point at them."""
