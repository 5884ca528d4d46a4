"""The backbone as it is run fast: fused, in E4M3, with kernels of our own."""
