"""The engine: graph, tape, kernels, KV cache, sampling, and the LLM class."""
