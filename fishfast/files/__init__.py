"""Files: atomic writes, safetensors read and written with checks, checkpoint folders."""
