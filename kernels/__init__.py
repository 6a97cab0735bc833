"""Triton kernels, one file an op; installed as ``lowp.kernels``. Importing this needs no Triton."""
