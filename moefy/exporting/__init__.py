"""Checkpoints that need no moefy any more: stock mixtures of experts, and GGUF files."""
