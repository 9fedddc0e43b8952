#!/usr/bin/env bash
# torch.distributed.checkpoint's ignore_frozen_params keeps a frozen weight that is tied: under the
# second of its names, while the first is left out.
#
# get_model_state_dict drops the names that model.named_parameters() gives for frozen parameters, and
# that gives each tensor once. So a checkpoint of a language model whose frozen embedding is tied to
# its head holds the largest tensor, under the head's name.
#
#   bash findings/dcp_frozen_tied.sh          # installs into a temporary folder; TORCH: which torch
#
# Seen with Python 3.11.7:
#   torch 2.13.0, frozen embedding, its own head frozen: body.weight, body.bias
#   torch 2.13.0, frozen embedding tied to the head: body.weight, body.bias, head.weight
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/keep.py" <<'PYTHON'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

version = torch.__version__.partition("+")[0]
for tied in (False, True):
    model = nn.ModuleDict(
        {"embed": nn.Embedding(1000, 64), "body": nn.Linear(64, 64), "head": nn.Linear(64, 1000, bias=False)}
    )
    if tied:
        model["head"].weight = model["embed"].weight
    model["embed"].requires_grad_(False)
    model["head"].requires_grad_(False)
    kept = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    what = "tied to the head" if tied else "its own head frozen"
    print(f"torch {version}, frozen embedding{'' if tied else ','} {what}: {', '.join(kept)}")
PYTHON

python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet "${TORCH:-torch==2.13.0}" numpy
"$python" "$folder/keep.py" 2>/dev/null | tee "$folder/seen"
sed -n 's/^#   \(torch 2.*\)/\1/p' "$0" | diff - "$folder/seen" && echo "As when it was written."
