"""Triton kernels of fishfast, installed as ``fishfast.kernels``: one file per operation.

The room is empty until the Fisher kernels arrive; ``fishfast.build_info()["unavailable"]`` says
under ``"triton"`` why Triton could not run them, where it could not. Nothing is imported here, so a
machine without Triton can import the package.
"""
