"""A stock checkpoint as one GGUF file, which llama.cpp runs: read `write.py` first."""
