"""Triton kernels of fishfast, installed as ``fishfast.kernels``: one file per operation.

The room is empty until the Fisher kernels arrive; ``fishfast.build_info()["triton"]`` says whether
Triton on this machine could run them. Nothing is imported here, so a machine without Triton can
import the package.
"""
