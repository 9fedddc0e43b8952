"""``fishfast inspect``: what a mask, a delta or a file of scores holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from fishfast.cli.common import FILE, JSON, check_output, clean_errors
from fishfast.report.inspection import Inspection, inspect_file
from fishfast.report.plots import draw_layers, new_figure, save_png

__all__ = ["inspect"]


@click.command(short_help="Say what a mask, a delta or scores hold.")
@click.argument("file", type=FILE)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only the N parameters with the largest density (of scores: mean), largest first.",
)
@click.option("--png", type=FILE, metavar="OUT.PNG", help="Draw it, layer by layer.")
@JSON
def inspect(file: Path, top: int | None, png: Path | None, as_json: bool) -> None:
    """Say what a mask, a delta or a file of scores holds, layer by layer.

    FILE is checked like any that fishfast loads: a damaged or foreign one is an error.
    """
    with clean_errors():
        if png is not None:
            check_output(png, file)
            new_figure(1, 1)  # what is missing is told now, not after a large file was read
        found = inspect_file(file)
        if png is not None:
            _draw(found, png)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
        return
    click.echo(tabulate(_facts(found), tablefmt="plain", disable_numparse=True) + "\n")
    click.echo(_table(found, top))
    if png is not None:
        click.echo(f"\n{png} shows it")


def _facts(found: Inspection) -> list[tuple[str, str]]:
    facts = found.facts
    rows = [(found.kind, f"{found.path}, {found.file_bytes:,} bytes")]
    if found.kind == "scores":
        what = "squares" if facts["power"] == 2 else "absolute values"
        return [
            *rows,
            ("Fisher", f"{facts['fisher_type']}, sums of {what}"),
            ("samples", f"{facts['num_samples']:,} in {facts['num_batches']:,} batches"),
            ("weights", f"{facts['num_params']:,} in {len(found.layers)} tensors"),
            ("scores of 0", f"{facts['num_zero']:,}"),
            ("fallback", f"{len(facts['fallback'])} tensors one sample at a time"),
        ]
    touched = sum(bool(layer.num_selected) for layer in found.layers)
    share = f"{facts['num_selected']:,} of {facts['num_params']:,} ({100 * facts['density']:.4g} %)"
    rows.append(("weights", f"{share} in {touched} of {len(found.layers)} tensors"))
    if found.kind == "delta":
        dense = facts["dense_bytes"]
        share = 100 * found.file_bytes / max(1, dense)
        rows += [
            ("dtypes", ", ".join(facts["dtypes"]) or "none"),
            ("buffers", f"{len(facts['buffers'])}"),
            ("size", f"{share:.3g} % of the {dense:,} bytes of all weights"),
            ("base", f"structure {facts['base_structure']}"),
            ("", f"content {facts['base_content']}"),
        ]
    elif facts["num_zero_score"] is not None:
        rows.append(("score 0", f"{facts['num_zero_score']:,} of the selected weights"))
    rows.append(("fingerprint", facts["fingerprint"]))
    return rows


def _table(found: Inspection, top: int | None) -> str:
    layers = found.layers
    if top is not None:
        layers = sorted(layers, key=lambda layer: -layer.share)[:top]
    rows: list[list[Any]] = []
    for layer in layers:
        row = [layer.name, "x".join(map(str, layer.shape)) or "scalar"]
        if found.kind == "scores":
            row += [f"{layer.share:.3e}", f"{layer.num_zero:,}"]
        else:
            row += [f"{layer.num_selected:,}", f"{100 * layer.share:.3f}"]
        rows.append(row + ([layer.dtype or ""] if found.kind == "delta" else []))
    headers = ["parameter", "shape"]
    headers += (
        ["mean score per sample", "scores of 0"]
        if found.kind == "scores"
        else ["selected", "density %"]
    )
    headers += ["dtype"] if found.kind == "delta" else []
    align = ["left", "right", "right", "right", "left"][: len(headers)]
    return tabulate(rows, headers=headers, colalign=align if rows else None, disable_numparse=True)


def _draw(found: Inspection, png: Path) -> None:
    of_scores = found.kind == "scores"
    facts, scale = found.facts, 1 if of_scores else 100
    overall = (
        None
        if of_scores
        else (100 * facts["density"], f"whole model: {100 * facts['density']:.3g} %")
    )
    figure = draw_layers(
        [layer.name for layer in found.layers],
        [scale * layer.share for layer in found.layers],
        is_matrix=[len(layer.shape) > 1 for layer in found.layers],
        title=(
            f"{Path(found.path).name}: mean score of a weight per "
            f"sample, {facts['num_samples']:,} samples"
            if of_scores
            else f"{Path(found.path).name}: {facts['num_selected']:,} of {facts['num_params']:,} "
            "weights selected"
        ),
        label="mean score per sample"
        if of_scores
        else "density: selected weights in % of the tensor",
        overall=overall,
    )
    save_png(figure, png)
