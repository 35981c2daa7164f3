"""Triton kernels. This room imports triton, never autograd and never ops."""
