"""Triton kernels for Mixture-of-Experts layers, behind `dmoe.ops`.

One family a file. A function here launches kernels on contiguous tensors and returns tensors. It
has no autograd, checks nothing that its caller has checked, and never waits for the GPU.
"""
