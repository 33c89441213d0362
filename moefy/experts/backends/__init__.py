"""What computes the experts of a mask: kernels for CPUs and GPUs, and stock mixtures of experts."""
