"""Native kernels for CPUs: C++ that the system's compiler builds at first use."""
