"""The README's examples run as they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

import fishfast as ff

_README = Path(__file__).parents[1] / "README.md"


def _model() -> torch.nn.Module:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        vocab_size=100, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def _examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", _README.read_text(), re.DOTALL)


def test_the_example_trains_and_its_delta_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _ = _examples()
    # Four batches of four: num_samples=256 is cut to what this loader has, with a warning.
    loader = [
        {"input_ids": torch.randint(3, 100, (4, 12)), "labels": torch.tensor([0, 1, 0, 1])}
        for _ in range(4)
    ]
    model = _model()
    base = _model()
    base.load_state_dict(model.state_dict())
    # The two labels' head is 66 weights; 0.5 % of this small model is 106.
    with pytest.warns(UserWarning, match="gave only 16 samples"):
        exec(code, {"model": model, "loader": loader})
    ff.load_delta(tmp_path / "task.safetensors").apply_(base)
    trained = model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in base.state_dict().items())


def test_masks_for_workers_from_files_and_over_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, code = _examples()
    scores = {"body": torch.rand(4000), "classifier.weight": torch.rand(2, 5)}
    fisher = ff.Fisher(scores, num_samples=1)
    fisher.save("fisher.safetensors")
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        names: dict[str, Any] = {"ff": ff, "fisher": fisher, "shards": scores}
        # The last two lines give the same mask.
        *before, together = code.splitlines()
        exec("\n".join([*before, "of_file = mask", together]), names)
    finally:
        dist.destroy_process_group()
    assert names["mask"] == names["of_file"] == ff.top_k_mask(fisher, density=0.005)
    assert [mask.num_selected for mask in names["masks"]] == [20] * 4
    assert all(len(mask["classifier.weight"]) == 10 for mask in names["masks"])
    assert len(torch.cat([mask["body"] for mask in names["masks"]]).unique()) == 4 * 10
