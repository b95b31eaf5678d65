"""The CPU half of the engine: SIMD vector types, kernels, tape and threads."""
