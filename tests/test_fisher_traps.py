"""Traps: what scores wrongly in other tools is exact here, or refused, and then nothing changed."""

from __future__ import annotations

import copy

import models
import oracle
import pytest
import torch
import torch.nn.functional as F
from fisher_checks import assert_as_exact_as_a_loop, assert_same_state, score, state_of, truth
from models import CASES, Calls, Case, classify, huggingface, per_sample
from torch import nn

import fishfast as ff

# ---- modes --------------------------------------------------------------------------------------


def test_batch_norm_and_dropout_in_train_mode_are_scored_in_eval_mode():
    case = CASES["convnet_with_norms"]()
    expected = score(Case(copy.deepcopy(case.model).eval(), case.batches, case.loss_fn))
    case.model.load_state_dict(copy.deepcopy(case.model.state_dict()))
    before = state_of(case.model.train())
    fisher = ff.estimate_fisher(case.model, case.batches, loss_fn=case.loss_fn)
    assert_same_state(before, state_of(case.model))
    assert len(expected) == len(fisher)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))


# ---- losses that couple samples -----------------------------------------------------------------


def contrastive(model, batch):
    """As in CLIP: the other samples of the batch are what a sample is told apart from."""
    images, texts = (F.normalize(out, dim=1) for out in model(*batch))
    logits = images @ texts.T
    labels = torch.arange(len(logits))
    return sum(F.cross_entropy(z, labels, reduction="none") for z in (logits, logits.T))


def two_encoders():
    return Calls(
        lambda self, x, y: (self.image(x), self.text(self.tokens(y).mean(1))),
        image=nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), tokens=nn.Embedding(11, 6),
        text=nn.Linear(6, 5),
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [(4, 4), (1, 4)], ids=["at-once", "after-a-batch-of-one"])
def test_a_contrastive_loss_is_refused(sizes):
    model = two_encoders()
    batches = [(torch.randn(b, 3, 4), torch.randint(0, 11, (b, 5))) for b in sizes]
    before = state_of(model)
    with pytest.raises(ValueError, match="losses that depend on one sample each"):
        ff.estimate_fisher(model, batches, loss_fn=contrastive)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("power", [2, 1])
def test_samples_that_mix_below_a_batched_head_are_not_taken_apart(power):
    """``x - x.mean(0)``: each loss's own gradient in its batch; what mixes is not batched as is."""
    case = models.mixed_samples_before_a_batched_head()
    fisher = score(case, power=power)
    expected = oracle.fisher_by_backwards(case.model, case.batches, case.loss_fn, power=power)
    for name, values in expected.items():
        torch.testing.assert_close(fisher[name].double().numpy(), values, rtol=1e-5, atol=1e-9)
    assert fisher.roads["body.weight"] != "batched" == fisher.roads["head.weight"]


def test_batch_statistics_written_by_hand_are_not_taken_apart():
    def run(self, x):
        x = self.first(x)
        x = (x - x.mean(0)) * torch.rsqrt(x.var(0, correction=0) + 1e-5) * self.scale
        return self.head(torch.tanh(x))

    model = Calls(
        run, first=nn.Linear(6, 6), scale=nn.Parameter(torch.rand(6)), head=nn.Linear(6, 4)
    )  # fmt: skip
    case = Case(model, [(torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0]))], classify)
    fisher = score(case)
    expected = oracle.fisher_by_backwards(model, case.batches, classify)
    for name, values in expected.items():
        torch.testing.assert_close(fisher[name].double().numpy(), values, rtol=1e-4, atol=1e-9)
    assert fisher.roads["first.weight"] != "batched"


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [4, 1], ids=["T-equals-B", "one-token"])
def test_a_first_batch_that_fits_several_layouts_decides_nothing(length):
    """[T, B] or [B, T]? With T == B sizes do not tell, and the next batch is another one."""
    model = Calls(
        lambda self, x: self.head(torch.tanh(self.inner(x)).mean(0)), inner=nn.Linear(6, 5),
        head=nn.Linear(5, 4),
    )  # fmt: skip
    batches = [
        (torch.randn(t, b, 6), torch.randint(0, 4, (b,))) for t, b in ((length, 4), (3, 3), (2, 5))
    ]

    def take(batch, b):
        x, y = batch
        return (x[:, b : b + 1], y[b : b + 1]) if b < len(y) else None

    case = Case(model, batches, classify, take=take)
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


@pytest.mark.parametrize("first", ["no_labels", "one_label"])
def test_a_first_batch_without_labels_decides_nothing(first):
    case = CASES["positions"]()
    labels = [tokens.roll(-1, 1) for tokens in case.batches]
    labels[0][0 if first == "one_label" else slice(None)] = -100
    case.batches = list(zip(case.batches, labels, strict=True))

    def loss_fn(model, batch):
        tokens, labels = batch
        losses = F.cross_entropy(model(tokens).transpose(1, 2), labels, reduction="none")
        return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)

    case.loss_fn = loss_fn
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert not fisher.fallback


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_losses_far_apart_do_not_hide_each_other(scale):
    """A sample whose loss is tiny or huge beside the others' has rows and a score of its own."""
    case = CASES["experts_in_a_loop"]()

    def loss_fn(model, batch):
        x, factors = batch
        return per_sample(model, x) * factors

    case.batches = [(x, torch.tensor([1, scale, 1, 1])[: len(x)]) for x in case.batches]

    case.loss_fn = loss_fn
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert not fisher.fallback


@pytest.mark.parametrize("scale", [1, 64, 1024, 8192])
def test_large_losses_of_a_model_in_half_precision(scale):
    """The search's powers of two times such gradients overflow fp16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).half()
    samples = torch.tensor([0, 2, 1, 0, 2, 1, 1])  # in no order that a layout has

    def losses(model, x):
        out = model(x).float().square().sum(1)
        return scale * torch.zeros(3).index_add(0, samples, out)

    batches = [torch.randn(7, 4, dtype=torch.half) for _ in range(2)]
    fisher = ff.estimate_fisher(model, batches, loss_fn=losses)
    exact = ff.estimate_fisher(copy.deepcopy(model).float(), [x.float() for x in batches],
                               loss_fn=losses)  # fmt: skip
    for name, expected in exact.items():
        torch.testing.assert_close(fisher[name], expected, rtol=2e-2, atol=1e-2 * expected.max())


class OnlyOnes(torch.autograd.Function):
    """Has a gradient where that of its output is 1: in no backward with other weights."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.where(grad == 1, grad, 0)


def test_gradients_that_the_search_does_not_see():
    """As of rounding, which is 0 in one backward and not in another: one sample at a time."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def losses(model, x):
        return OnlyOnes.apply(model(x).sum((1, 2)))

    batches = [torch.randn(3, 5, 4) for _ in range(2)]
    case = Case(model, batches, losses)
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


class Pushes(nn.Module):
    """As MoCo: a queue of what came before, in a buffer; a table that is looked up once."""

    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(4, 5), nn.Embedding(4, 1)
        self.register_buffer("queue", torch.randn(6, 5))

    def forward(self, x):
        x = x + self.table(torch.arange(4)).T
        keys = F.normalize(self.linear(x), dim=1)
        logits = keys @ self.queue.clone().T
        with torch.no_grad():
            self.queue.copy_(torch.cat([keys.detach(), self.queue])[:6])
        return logits


def test_a_forward_that_runs_again_starts_from_the_same_buffers():
    model, batches = Pushes(), [torch.randn(3, 4) for _ in range(3)]

    def losses(model, x):
        return -model(x).log_softmax(1)[:, 0]

    exact = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    loop = copy.deepcopy(model)
    for x in batches:
        for loss in losses(loop, x):
            grads = torch.autograd.grad(loss, list(loop.parameters()), retain_graph=True)
            for total, grad in zip(exact.values(), grads, strict=True):
                total += grad.square()
    before = model.queue.clone()
    fisher = ff.estimate_fisher(model, batches, loss_fn=losses)
    assert fisher.passes["forward"] > len(batches)
    for name, expected in exact.items():
        torch.testing.assert_close(fisher[name], expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(model.queue, before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(5,), (5, 2)], ids=["3d", "4d"])
def test_calls_in_place_behind_a_layer(sizes, bias):
    """``ReLU(inplace=True)`` and ``x += ...`` behind a linear layer over positions."""

    def run(self, x):
        x = self.first(x)
        x += 1
        x = self.second(self.relu(x))
        x *= 2
        return x.flatten(1).square().sum(1)

    model = Calls(run, first=nn.Linear(4, 6, bias=bias), relu=nn.ReLU(inplace=True),
                  second=nn.Linear(6, 3, bias=bias))  # fmt: skip
    case = Case(model, [torch.randn(3, *sizes, 4)], lambda model, x: model(x))
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


def test_a_parameter_without_a_gradient_in_a_batch_keeps_its_score():
    case = CASES["experts_without_tokens"]()
    fisher = score(case)
    assert not fisher["up"][2, 1:].any() or fisher["up"][2].any()
    first = ff.estimate_fisher(case.model, case.batches[:1], loss_fn=case.loss_fn)
    assert not first["up"][2].any()  # the expert that no token of this batch chose
    assert fisher["up"][2].any()


# ---- adapters -----------------------------------------------------------------------------------


def adapted(method):
    peft = pytest.importorskip("peft", reason="peft is not installed; the test extra has it")
    targets = {"target_modules": ["query", "value"]}
    config = {
        "lora": lambda: peft.LoraConfig(r=2, lora_dropout=0.1, task_type="SEQ_CLS", **targets),
        "dora": lambda: peft.LoraConfig(r=2, use_dora=True, task_type="SEQ_CLS", **targets),
        "ia3": lambda: peft.IA3Config(
            target_modules=["key", "output.dense"], feedforward_modules=["output.dense"],
            task_type="SEQ_CLS",
        ),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    }[method]()  # fmt: skip
    case = huggingface("bert")
    case.model = peft.get_peft_model(case.model, config)
    return case


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prompt", "prefix"])
def test_adapters_of_peft_are_batched_and_exact(method):
    case = adapted(method)
    fisher = ff.estimate_fisher(case.model, case.batches)
    trained = [name for name, p in case.model.named_parameters() if p.requires_grad]
    assert list(fisher) == trained
    exact = truth(case)
    assert_as_exact_as_a_loop(fisher, exact, truth(case, torch.float32), rounding=2e-6)
    assert not fisher.fallback
    if method == "lora":  # B starts at zero: A has no gradient, B has
        for name, values in fisher.items():
            assert bool(values.any()) == ("lora_A" not in name)
        for name, p in case.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        fisher = ff.estimate_fisher(case.model, case.batches)
        assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32), rounding=2e-6)
        assert all(values.any() for values in fisher.values())
