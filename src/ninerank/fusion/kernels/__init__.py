"""Operators in namespace `ninerank`, one package each: contract and reference in `__init__`, kernels beside it.

`cpu.py` holds Numba kernels, `triton.py` the one Triton source for CUDA and Ascend. `registry` chooses among them.
Importing an operator declares it; a kernel's module (and with it Numba or Triton) loads when it is first chosen.
"""
