"""Triton kernels without a GPU: executed by Triton's interpreter, compiled ahead of time.

The interpreter has to be chosen before Triton is imported, and it leaves `triton.language` patched;
so kernels run in a process of their own (`worker`), which repairs the interpreter's bf16
(`interpreter_bf16`) and checks every access to memory (`checker`). Compilation (`ahead_of_time`)
has processes of its own too, without the interpreter. `running.run` is what tests call.

The folder is not called triton: tests/ is on the path, and it would hide the package.
"""
