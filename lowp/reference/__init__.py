"""The definition of every op in plain PyTorch: what all kernels must equal, bit for bit."""
