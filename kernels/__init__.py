"""Triton kernels of fishfast, installed as ``fishfast.kernels``: one file per operation.

Nothing is imported here, so a machine without Triton can import the package;
``fishfast.build_info()["unavailable"]`` says under ``"triton"`` why Triton could not run, where it
could not. The kernels have the names and signatures of the torch operations of
``fishfast.fisher.accumulate``, which calls them. Imports between them are relative: the folder is
``fishfast.kernels`` only once it is installed.
"""
