#!/usr/bin/env bash
# Prefix tuning of a BERT classifier: peft 0.21.2 works with transformers 5.23.0, and with 5.24.0 it
# raises "Model does not support past key values", although the model takes them.
#
# transformers 5.24.0 calls the argument of forward `cache`, and a decorator still accepts
# `past_key_values`. peft looks for the old name in forward's signature, where it no longer is.
#
#   bash findings/peft_prefix_tuning.sh       # installs into a temporary folder; TORCH: which torch
#
# Seen with Python 3.11.7 and torch 2.13.0 (CPU):
#   transformers 5.23.0, peft 0.21.2: trained, the loss went down
#   transformers 5.24.0, peft 0.21.2: ValueError: Model does not support past key values which are required for prefix tuning.
#   transformers 5.24.0, the model alone with past_key_values=: accepted
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/tune.py" <<'PYTHON'
import warnings

import peft
import torch
import transformers

warnings.simplefilter("ignore")
torch.manual_seed(0)
config = transformers.BertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
)
model = transformers.BertForSequenceClassification(config)
prefix = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
batch = {"input_ids": torch.randint(5, 100, (8, 12)), "labels": torch.arange(8) % 2}
told = f"transformers {transformers.__version__}, peft {peft.__version__}"
try:
    tuned = peft.get_peft_model(model, prefix)
    optimizer = torch.optim.Adam((p for p in tuned.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for _ in range(20):
        loss = tuned(**batch, attention_mask=torch.ones(8, 12)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    print(f"{told}: trained, the loss went {'down' if losses[-1] < losses[0] else 'up'}")
except ValueError as error:
    print(f"{told}: ValueError: {error}")
    cache = transformers.DynamicCache(config=config)
    model.bert(batch["input_ids"], past_key_values=cache)
    print(f"transformers {transformers.__version__}, the model alone with past_key_values=: accepted")
PYTHON

python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet "${TORCH:-torch==2.13.0}" peft==0.21.2
for version in 5.23.0 5.24.0; do
  "$python" -m pip install --quiet "transformers==$version"
  "$python" "$folder/tune.py" 2>/dev/null | tee -a "$folder/seen"
done
sed -n 's/^#   \(transformers 5.*\)/\1/p' "$0" | diff - "$folder/seen" && echo "As when it was written."
