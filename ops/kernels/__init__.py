"""GPU kernels (Triton and Gluon). Nothing here is imported before the first launch."""
