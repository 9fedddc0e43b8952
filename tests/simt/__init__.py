"""Execute the project's CUDA kernels on a CPU; see README.md."""
