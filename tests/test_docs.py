"""The guide's snippets run as they are written, and do what its text says of them."""

from __future__ import annotations

import copy
import re
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fishfast as ff

_GUIDE = Path(__file__).parents[1] / "docs" / "fisher.md"
SNIPPETS = {
    part.partition("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    for part in re.split(r"^## ", _GUIDE.read_text(), flags=re.MULTILINE)
}
SETTING, COST, STOPPING = (
    "# fishfast.fisher on its own", "What it costs", "Stop, go on, add, share"
)  # fmt: skip
USES = [
    "Elastic weight consolidation", "Consolidation of a tuned model", "Merging models", "Pruning",
    "Laplace posterior",
]  # fmt: skip
SEEDS = range(3)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small nets, many steps: threads that wait for each other take minutes on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*titles, seed=0):
    """Run the snippets under these titles after the setting; return the names they define."""
    torch.manual_seed(seed)
    names = {}
    for title in (SETTING, *titles):
        (code,) = SNIPPETS[title]
        exec(compile(code, f"{_GUIDE.name}, {title}", "exec"), names)
    return names


def test_no_snippet_is_left_out():
    assert [title for title, code in SNIPPETS.items() if code] == [SETTING, COST, STOPPING, *USES]


def test_cost(capsys):
    names = run(COST)
    printed = capsys.readouterr()
    assert re.search(r"0\.weight +\(64, 64\) .* batched", printed.out)
    assert "1000 samples" in printed.err
    fisher, mean = names["fisher"], names["mean"]
    assert fisher.passes["forward"] == fisher.passes["backward"] == len(names["batches"]) == 10
    assert not fisher.fallback
    # The first lines of the page, word by word.
    total, weight = torch.zeros(10, 64), names["model"].get_parameter("2.weight")
    for x, y in zip(names["x_train"].split(1), names["y_train"].split(1), strict=True):
        loss = F.cross_entropy(names["model"](x), y)
        total += torch.autograd.grad(loss, weight)[0].square()
    torch.testing.assert_close(mean["2.weight"], total / 1000, rtol=1e-4, atol=1e-9)


def test_stop_go_on_add():
    names = run(COST, STOPPING)
    fisher, total, again, resumed = (names[n] for n in ("fisher", "total", "again", "resumed"))
    assert fisher.num_samples == total.num_samples == resumed.num_samples == 1000
    for name, score in fisher.items():
        torch.testing.assert_close(total[name], score)
        assert torch.equal(total[name], again[name])
        assert torch.equal(resumed[name], score)
    assert Path("running.safetensors").exists()
    once_more = run(COST, STOPPING)["resumed"]
    assert all(torch.equal(once_more[name], score) for name, score in resumed.items())


def test_elastic_weight_consolidation_forgets_less():
    plain, elastic, new = [], [], []
    for seed in SEEDS:
        names = run("Elastic weight consolidation", seed=seed)
        accuracy, x_test = names["accuracy"], names["x_test"]
        plain.append(accuracy(names["plain"], x_test))
        elastic.append(accuracy(names["elastic"], x_test))
        new.append(accuracy(names["elastic"], x_test[:, names["shuffle"]]))
        assert accuracy(names["old"], x_test) > 0.94
        assert names["consolidation"](names["old"]) == 0
    assert statistics.mean(elastic) > statistics.mean(plain) + 0.1
    assert statistics.mean(new) > 0.85


def test_the_penalty_is_half_lambda_f_times_the_squared_distance():
    names = run("Elastic weight consolidation")
    model, fisher = names["elastic"], names["fisher"]
    by_hand = sum(
        0.5 * 7 * (fisher[name] / 1000 * (p - names["anchor"][name]) ** 2).sum()
        for name, p in model.named_parameters()
    )
    torch.testing.assert_close(names["consolidation"](model, strength=7), by_hand)


def test_the_penalty_on_compact_parameters_is_that_of_the_dense_model_under_the_mask():
    names = run("Elastic weight consolidation", "Consolidation of a tuned model")
    tuned, dense = names["tuned"], copy.deepcopy(names["old"])
    with torch.no_grad():
        for values in tuned.parameters():
            values.add_(0.5)
    names["masked"].state_dict()  # reads
    dense.load_state_dict(names["masked"].state_dict())
    names["on_values"](names["masked"], strength=7).backward()
    names["consolidation"](dense, strength=7).backward()
    for name, values in tuned.named_parameters():
        name = name.removesuffix("_values")
        expected = dense.get_parameter(name).grad.flatten()[tuned.mask[name].long()]
        torch.testing.assert_close(values.grad, expected)


def test_merging_beats_the_plain_average_and_both_models():
    merged, averaged, alone = [], [], []
    for seed in SEEDS:
        names = run("Merging models", seed=seed)
        accuracy, x_test = names["accuracy"], names["x_test"]
        merged.append(accuracy(names["merged"], x_test))
        averaged.append(accuracy(names["averaged"], x_test))
        alone.append(max(accuracy(model, x_test) for model in names["models"]))
        # The other camera never used these weights, and has no say in them.
        own, used = names["models"][0], names["fishers"][0]["0.weight"] > 1.0
        chosen = used & names["left"].bool()
        assert chosen.sum() > 100
        found, expected = (m.get_parameter("0.weight")[chosen] for m in (names["merged"], own))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert statistics.mean(merged) > statistics.mean(averaged) + 0.005
    assert min(averaged) > 0.9
    assert statistics.mean(merged) > statistics.mean(alone) + 0.03


def test_pruning_by_saliency_beats_pruning_by_size():
    by_saliency, by_size = [], []
    for seed in SEEDS:
        names = run("Pruning", seed=seed)
        for kind, found in (("by_saliency", by_saliency), ("by_size", by_size)):
            weights = torch.cat([p.detach().flatten() for p in names[kind].parameters()])
            assert weights.count_nonzero() <= 0.3 * weights.numel()
            found.append(names["accuracy"](names[kind], names["x_test"]))
        assert isinstance(names["fisher"], ff.Fisher)
    assert statistics.mean(by_saliency) > statistics.mean(by_size) + 0.04
    assert min(by_saliency) > 0.8


def test_the_laplace_posterior_is_less_sure_where_there_is_no_data():
    losses, confidence = {"model": [], "posterior": []}, {"model": [], "posterior": []}
    for seed in SEEDS:
        names = run("Laplace posterior", seed=seed)
        model, y_test = names["model"], names["y_test"]
        right = {}
        for kind, predict in (
            ("model", lambda x, model=model: model(x).softmax(1).detach()),
            ("posterior", names["posterior_mean"]),
        ):
            images = predict(names["x_test"])
            losses[kind].append(F.nll_loss(images.log(), y_test).item())
            confidence[kind].append(predict(names["noise"]).amax(1).mean().item())
            right[kind] = (images.argmax(1) == y_test).float().mean().item()
        assert abs(right["posterior"] - right["model"]) < 0.02
    assert statistics.mean(losses["posterior"]) < statistics.mean(losses["model"])
    assert statistics.mean(confidence["posterior"]) < statistics.mean(confidence["model"]) - 0.05
