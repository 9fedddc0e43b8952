"""``fishfast apply`` and ``fishfast diff``: deltas and checkpoints on disk."""

from __future__ import annotations

from pathlib import Path

import click

import fishfast as ff
from fishfast.cli.common import (
    FILE,
    PATH,
    PROGRESS,
    check_output,
    clean_errors,
    wants_progress,
)

__all__ = ["apply", "diff"]

# From here on a copy of the checkpoint is as good, and the user should know.
_DENSE = 0.1


@click.command(short_help="Put a delta on a checkpoint on disk.")
@click.argument("base", type=PATH)
@click.argument("delta", type=FILE)
@click.option("-o", "--out", type=PATH, required=True, help="The new checkpoint, like BASE.")
@click.option(
    "--no-check-base", is_flag=True, help="Take a BASE that is not the one DELTA was trained from."
)
@PROGRESS
def apply(base: Path, delta: Path, out: Path, no_check_base: bool, progress: bool | None) -> None:
    """Write the checkpoint that BASE and DELTA give, bit for bit.

    BASE is a safetensors file, or a folder of a transformers model, in shards or not; OUT is the
    same again, with the other files of the folder (config, tokenizer). Tensors pass through
    one piece at a time: a model larger than memory is fine. BASE is hashed on the way, and any but
    the one that DELTA was trained from is refused; OUT appears when it is whole.
    """
    with clean_errors():
        done = ff.apply_to_checkpoint(
            base, delta, out, check_base=not no_check_base, progress=wants_progress(progress)
        )
    click.echo(
        f"{out}: {done.num_selected:,} weights set, {done.num_tensors:,} tensors, "
        f"{done.nbytes:,} bytes"
    )
    for what, names in (
        ("added, as only the delta has them", done.created),
        ("kept as they are, as the delta's model does not have them", done.unknown),
        ("not copied, as the delta does not change these weights", done.left_out),
    ):
        if names:
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            click.echo(f"{what}: {', '.join(names[:5])}{more}")


@click.command(short_help="Make a delta of two checkpoints on disk.")
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@click.option("-o", "--out", type=FILE, required=True, metavar="DELTA", help="The new delta.")
@click.option(
    "--buffer",
    "buffers",
    multiple=True,
    metavar="NAME",
    help="A path or glob of tensors that are buffers of the model, not parameters; may be given "
    "several times. BatchNorm's and integer tensors are known.",
)
@click.option("--allow-large", is_flag=True, help="Write a delta that is larger than TUNED too.")
@PROGRESS
def diff(
    base: Path,
    tuned: Path,
    out: Path,
    buffers: tuple[str, ...],
    allow_large: bool,
    progress: bool | None,
) -> None:
    """Write as a delta what differs between two checkpoints, bit for bit.

    BASE and TUNED are safetensors files or folders with the same names, shapes and dtypes, read one
    piece at a time. The delta is one for `fishfast apply` and for fishfast.load_delta. An entry
    differs when one bit does: 0.0 and -0.0 too.
    """
    with clean_errors():
        check_output(out, base, tuned)
        delta = ff.diff_checkpoints(
            base,
            tuned,
            buffers=buffers,
            allow_large=allow_large,
            progress=wants_progress(progress),
        )
        delta.save(out)
    n, k = delta.mask.num_params, delta.num_selected
    density = delta.mask.density
    click.echo(
        f"{out}: {k:,} of {n:,} weights differ ({100 * density:.3g} %) and {len(delta.buffers)} "
        f"buffers; {out.stat().st_size:,} bytes"
    )
    if density > _DENSE:
        click.echo(
            f"note: {100 * density:.0f} % is much for a delta, which takes 4 bytes more per weight "
            "than a checkpoint; was TUNED trained with a mask?"
        )
