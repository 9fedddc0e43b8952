"""The command ``fishfast``: one file for each of its commands."""

from __future__ import annotations

from typing import Any

import click

from fishfast._version import __version__
from fishfast.cli.checkpoints import apply, diff
from fishfast.cli.demo import demo
from fishfast.cli.info import info
from fishfast.cli.inspect_file import inspect
from fishfast.cli.score import score

__all__ = ["main"]


_STOPPED = 130  # 128 + SIGINT, as shells have it


class _Commands(click.Group):
    """Its commands, stopped by Ctrl-C, say so and end with an exit code of their own."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            ctx.exit(_STOPPED)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="fishfast")
def main() -> None:
    """Train only the weights that matter: FISH masks for PyTorch."""


for command in (score, inspect, diff, apply, demo, info):
    main.add_command(command)
