"""``python -m fishfast`` is the command ``fishfast``."""

from fishfast.cli import main

main(prog_name="fishfast")
