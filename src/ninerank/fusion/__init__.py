"""Operators and graph passes that make one model run fast on CPU, CUDA and Ascend.

`kernels` holds the operators (contract, reference and one kernel per kind of device).
"""
