"""What lies between the transformer's matrix products, and the image decoder's convolutions: fused kernels in Triton,
each of which passes over memory once."""
