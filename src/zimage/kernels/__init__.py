"""What lies between the transformer's matrix products, each in one pass over memory: fused kernels in Triton."""
