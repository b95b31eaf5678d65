"""The engine on a GPU: numba.cuda twins of the CPU kernels, and what launches them; imported only where one is used."""
