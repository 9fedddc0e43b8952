"""The gradient tap gives the dense gradient's entries, and the compact parameters survive all."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import mask_of, same_bits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fishfast as ff

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def mask_over_all(model: nn.Module, density: float = 0.3) -> ff.SparseMask:
    """Return a mask with some entries of every parameter."""
    generator = torch.Generator().manual_seed(7)
    indices = {}
    for name, p in model.named_parameters():
        order = torch.randperm(p.numel(), generator=generator)
        indices[name] = order[: max(1, int(density * p.numel()))].sort().values.int()
    return mask_of(model, indices)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- dW[indices], exactly, whatever the module does with its weight ---


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh())


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class Bare(nn.Module):
    """Parameters used directly: expanded, indexed, transposed, as a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(numbers(6))
        self.cls = nn.Parameter(numbers(1, 1, 6, seed=1))
        self.position = nn.Parameter(numbers(9, 6, seed=2))
        self.experts = nn.Parameter(numbers(2, 6, 5, seed=3))
        self.zero_dim = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position[: x.shape[1] + 1]
        return (x * self.scale * self.zero_dim) @ self.experts[1] + x @ self.experts[0]


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(numbers(6, 6, seed=i)) for i in range(3)])
        self.named = nn.ParameterDict(
            {"a": nn.Parameter(numbers(6)), "b": nn.Parameter(numbers(6))}
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = (x @ part).tanh()
        return x * self.named["a"] + sum(self.named.values())


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return checkpoint(self.second, x, use_reentrant=self.use_reentrant)


class Recurrent(nn.Module):
    def __init__(self, cls: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = cls(6, 5, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2))


def old_weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2))


def channels_last_conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)


TOKENS = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(5))
SEQUENCE = numbers(4, 7, 6)
IMAGES = numbers(2, 3, 8, 8)
ENCODER = {"batch_first": True, "dropout": 0.0}

MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), SEQUENCE),
    "bilinear": (lambda: PairOfSelf(nn.Bilinear(6, 6, 3)), SEQUENCE),
    "conv1d": (lambda: nn.Conv1d(7, 4, 3, groups=1), SEQUENCE),
    "conv2d, groups": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), IMAGES),
    "conv2d, channels_last": (channels_last_conv, IMAGES),
    "conv transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), IMAGES),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGES),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), SEQUENCE),
    "group norm": (lambda: nn.GroupNorm(3, 3), IMAGES),
    "prelu": (lambda: nn.PReLU(7), SEQUENCE),
    "embedding": (lambda: nn.Embedding(11, 6), TOKENS),
    "embedding, padding": (lambda: nn.Embedding(11, 6, padding_idx=int(TOKENS[0, 0])), TOKENS),
    "embedding bag": (lambda: nn.EmbeddingBag(11, 6), TOKENS),
    "tied": (TiedNet, TOKENS),
    "called twice": (CalledTwice, SEQUENCE),
    "bare parameters": (Bare, SEQUENCE),
    "lists and dicts": (Containers, SEQUENCE),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), SEQUENCE),
    "lstm, projection": (lambda: Recurrent(nn.LSTM, proj_size=3), SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE),
    "rnn": (lambda: Recurrent(nn.RNN, bias=False), SEQUENCE),
    "lstm cell": (lambda: Cell(nn.LSTMCell(6, 5)), SEQUENCE[:, 0]),
    "attention": (Attention, SEQUENCE),
    "attention, kdim": (lambda: Attention(kdim=6, vdim=6, add_bias_kv=True), SEQUENCE),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, **ENCODER), SEQUENCE),
    "encoder layer, eval": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, **ENCODER).eval(),
        SEQUENCE,
    ),
    "encoder, eval": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, **ENCODER), 2).eval(),
        SEQUENCE,
    ),
    "weight_norm": (weight_normed, SEQUENCE),
    "weight_norm by hooks": (old_weight_normed, SEQUENCE),
    "checkpoint, reentrant": (lambda: Checkpointed(True), SEQUENCE),
    "checkpoint": (lambda: Checkpointed(False), SEQUENCE),
}


class PairOfSelf(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


class Cell(PairOfSelf):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, data = MODULES[name]
    return make(), data


def copy_without_tap(model: nn.Module, name: str) -> nn.Module:
    # Made again rather than copied: old weight_norm's computed weights cannot be deep-copied.
    twin = built(name)[0] if name in MODULES else copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    return twin


def dense_gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_tap_is_exact(
    tuned: ff.SparseTuning, expected: dict[str, Tensor], run: Callable[[nn.Module], Tensor]
) -> None:
    run(tuned.model).backward()
    compared = 0
    for name, values in tuned.named_parameters():
        name = name.removesuffix("_values")
        if name not in expected:
            assert values.grad is None or not values.grad.any(), name
            continue
        assert same_bits(values.grad, expected[name].flatten()[tuned.mask[name].long()]), name
        compared += bool(values.grad.any())
    assert compared > 0
    for name, parameter in tuned.model.named_parameters():
        assert name.endswith("_values") or parameter.grad is None


def square_loss(data: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(data).square().sum()


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_the_dense_ones(name: str) -> None:
    model, data = built(name)
    expected = dense_gradients(copy_without_tap(model, name), square_loss(data))
    tuned = ff.train_only(model, mask_over_all(model))
    assert_tap_is_exact(tuned, expected, square_loss(data))


@pytest.mark.parametrize("name", ["encoder layer, eval", "encoder, eval", "attention", "lstm"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_is_as_before(name: str, context: Any) -> None:
    model, data = built(name)
    model.eval()
    with context():
        expected = model(data)
        ff.train_only(model, mask_over_all(model))
        assert same_bits(model(data), expected)


@pytest.mark.parametrize("name", ["linear", "tied", "conv2d, channels_last", "bare parameters"])
def test_backward_through_a_compiled_model(name: str) -> None:
    model, data = built(name)
    expected = dense_gradients(copy_without_tap(model, name), square_loss(data))
    tuned = ff.train_only(model, mask_over_all(model))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_tap_is_exact(tuned, expected, lambda _: square_loss(data)(compiled))
    # A step changes the weights in place: the compiled model must see the new ones.
    ff.SGD(tuned.parameters(), lr=0.1).step()
    assert same_bits(compiled(data), model(data))


def test_functional_call_and_per_sample_gradients() -> None:
    model, data = built("linear")
    data = data[:, 0]
    tuned = ff.train_only(model, mask_over_all(model))
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (sample,)).square().sum()

    loss(parameters, data).backward()
    expected = {name: p.grad for name, p in tuned.named_parameters()}
    whole = torch.func.grad(loss)(parameters, data)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, data)
    for name, grad in expected.items():
        assert same_bits(whole[name], grad)
        torch.testing.assert_close(each[name].sum(0), grad)


def test_replaced_weight_in_functional_call() -> None:
    model, data = built("linear")
    other = numbers(5, 6, seed=9).requires_grad_()
    ff.train_only(model, mask_over_all(model))
    out = torch.func.functional_call(model, {"weight": other}, (data,))
    assert same_bits(out, F.linear(data, other, model.bias))


def test_autocast() -> None:
    model, data = built("called twice")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(data)
        tuned = ff.train_only(model, mask_over_all(model))
        assert same_bits(model(data), out)
        model(data).float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in tuned.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_arrive_in_fp32(dtype: torch.dtype) -> None:
    model, data = built("linear")
    model, data = model.to(dtype), data.to(dtype)
    expected = dense_gradients(copy.deepcopy(model), square_loss(data))
    tuned = ff.train_only(model, mask_over_all(model))
    square_loss(data)(model).backward()
    for name, values in tuned.named_parameters():
        name = name.removesuffix("_values")
        assert same_bits(values.grad, expected[name].flatten()[tuned.mask[name].long()].float())


def test_embedding_with_sparse_gradients() -> None:
    model = nn.Embedding(11, 6, sparse=True)
    expected = dense_gradients(copy.deepcopy(model), square_loss(TOKENS))["weight"].to_dense()
    tuned = ff.train_only(model, mask_over_all(model))
    square_loss(TOKENS)(model).backward()
    (values,) = tuned.parameters()
    assert same_bits(values.grad, expected.flatten()[tuned.mask["weight"].long()])


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
}


def tiny_transformer(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    import transformers as tf

    torch.manual_seed(0)
    tokens = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    if name == "bert":
        model = tf.BertForSequenceClassification(tf.BertConfig(**TINY))
        labels = torch.tensor([0, 1, 0])
    elif name == "gpt2":
        config = tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, **ends)
        model, labels = tf.GPT2LMHeadModel(config), tokens
        assert model.lm_head.weight is model.transformer.wte.weight
    else:
        experts = {"num_key_value_heads": 1, "num_local_experts": 3, "pad_token_id": 0}
        model = tf.MixtralForCausalLM(
            tf.MixtralConfig(**TINY, **ends, **experts, max_position_embeddings=32)
        )
        labels = tokens
    return model.eval(), lambda m: m(input_ids=tokens, labels=labels).loss


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral"])
def test_transformer(name: str) -> None:
    model, loss = tiny_transformer(name)
    keys = list(model.state_dict())
    expected = dense_gradients(copy.deepcopy(model), loss)
    tuned = ff.train_only(model, mask_over_all(model))
    assert list(model.state_dict()) == keys
    assert_tap_is_exact(tuned, expected, loss)
    before = loss(model).item()
    ff.SGD(tuned.parameters(), lr=0.01).step()
    assert loss(model).item() < before


def test_transformer_with_gradient_checkpointing() -> None:
    model, loss = tiny_transformer("bert")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = dense_gradients(copy.deepcopy(model), loss)
    tuned = ff.train_only(model, mask_over_all(model))
    assert_tap_is_exact(tuned, expected, loss)


def test_transformer_save_pretrained(tmp_path: Any) -> None:
    import transformers as tf

    model, loss = tiny_transformer("gpt2")
    tuned = ff.train_only(model, mask_over_all(model))
    loss(model).backward()
    ff.SGD(tuned.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path)
    loaded = tf.GPT2LMHeadModel.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert same_bits(tensor, model.state_dict()[name]), name


# --- what must hold around the compact parameters ---


class Net(nn.Module):
    """A little of everything: conv, norm with buffers, a layer that is tied, one without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 6)
        self.again = nn.Linear(4, 6)
        self.again.weight = self.first.weight
        self.free = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).mean((2, 3))
        return self.free(self.first(x).tanh() + self.again(x))


def net() -> nn.Module:
    torch.manual_seed(1)
    return Net()


def net_mask(model: nn.Module) -> ff.SparseMask:
    whole = mask_over_all(model)
    return mask_of(model, {n: found for n, found in whole.items() if not n.startswith("free")})


def tuned_net() -> ff.SparseTuning:
    model = net()
    return ff.train_only(model, net_mask(model))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        model(numbers(5, 3, 6, 6, seed=seed).to(dtype)).float().square().sum().backward()
        optimizer.step()


def compact(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if n.endswith("_values")]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(state[name], tensor), name


def assert_masters_match(model: nn.Module) -> None:
    for parameter in compact(model):
        assert parameter.dtype == torch.float32
        weights = parameter.target.gather()
        assert same_bits(parameter.detach().to(weights.dtype), weights)


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def pickled_with_protocol_0(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing, protocol=0))


def saved_by_torch(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, pickled, pickled_with_protocol_0, saved_by_torch]


@pytest.mark.parametrize("copied", COPIES, ids=lambda f: f.__name__)
def test_copy_of_the_model_trains_alone(copied: Callable[[Any], Any]) -> None:
    straight, original = tuned_net(), tuned_net()
    train(straight.model, ff.AdamW(straight.parameters(), lr=0.1))
    before = state_of(original.model)
    other = copied(original.model)
    assert type(other.conv).__name__ == "Conv2d"
    assert isinstance(other.conv, nn.Conv2d)
    assert other.again.weight_values is other.first.weight_values
    assert other.again._parameters["weight"] is other.first._parameters["weight"]
    train(other, ff.AdamW(compact(other), lr=0.1))
    assert_state(other, state_of(straight.model))
    assert_state(original.model, before)
    assert all(p.grad is None for p in original.parameters())


def test_copy_of_a_trained_lstm_trains_alone() -> None:
    # nn.LSTM keeps references to its weights in a list.
    model, data = built("lstm")
    tuned = ff.train_only(model, mask_over_all(model))
    other = copy.deepcopy(model)
    before = state_of(model)
    square_loss(data)(other).backward()
    ff.SGD(compact(other), lr=0.1).step()
    assert_state(model, before)
    with torch.no_grad():
        assert not torch.equal(other(data), model(data))
    assert all(p.grad is None for p in tuned.parameters())


@pytest.mark.parametrize("copied", [*COPIES, copy.copy], ids=lambda f: f.__name__)
def test_copy_of_one_compact_parameter(copied: Callable[[Any], Any]) -> None:
    tuned = tuned_net()
    parameter = next(tuned.parameters())
    other = copied(parameter)
    assert type(other) is type(parameter)
    assert other.requires_grad
    assert same_bits(other, parameter)
    assert torch.equal(other.target.indices, parameter.target.indices)
    assert same_bits(other.target.gather(), parameter.target.gather())


def test_copy_of_a_submodule() -> None:
    tuned = tuned_net()
    before = state_of(tuned.model)
    other = copy.deepcopy(tuned.model.conv)
    other(numbers(2, 3, 6, 6)).square().sum().backward()
    ff.SGD(compact(other), lr=0.1).step()
    assert not torch.equal(other.weight, tuned.model.conv.weight)
    assert_state(tuned.model, before)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.to("cpu"),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.share_memory(),
        lambda m: m.requires_grad_(True),
        lambda m: m.train().eval().train(),
    ],
    ids=[
        "to bf16",
        "bfloat16",
        "half",
        "float",
        "to cpu",
        "channels_last",
        "share",
        "grad",
        "mode",
    ],
)
def test_moved_model_keeps_fp32_masters_and_trains(move: Callable[[nn.Module], Any]) -> None:
    tuned = tuned_net()
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    train(tuned.model, optimizer)
    masters = [p.detach().clone() for p in tuned.parameters()]
    assert all(p.grad is not None for p in tuned.parameters())
    move(tuned.model)
    assert len(list(tuned.parameters())) == len(masters)
    for parameter, master in zip(tuned.parameters(), masters, strict=True):
        assert same_bits(parameter, master)
        assert parameter.grad.dtype == torch.float32
    assert_masters_match(tuned.model)
    train(tuned.model, optimizer)
    assert_masters_match(tuned.model)
    assert not same_bits(next(tuned.parameters()), masters[0])
    for name, found in tuned.mask.items():
        assert not len(found) or dict(tuned.model.named_parameters())[name].grad is None


def test_parameters_of_the_model() -> None:
    tuned = tuned_net()
    trainable = [p for p in tuned.model.parameters() if p.requires_grad]
    assert [id(p) for p in trainable] == [id(p) for p in tuned.parameters()]
    assert sum(p.numel() for p in trainable) == tuned.num_selected == tuned.mask.num_selected
    assert all(p.dtype == torch.float32 and p.dim() == 1 and p.is_leaf for p in trainable)
    names = [name for name, _ in tuned.named_parameters()]
    assert names == [
        "conv.weight_values", "conv.bias_values", "norm.weight_values", "norm.bias_values",
        "first.weight_values", "first.bias_values", "again.bias_values",
    ]  # fmt: skip


def test_state_dict_and_buffers_are_those_of_the_base() -> None:
    plain, tuned = net(), tuned_net()
    assert_state(tuned.model, plain.state_dict())
    assert [n for n, _ in tuned.model.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert repr(tuned.model) == repr(plain)
    assert repr(tuned) == f"SparseTuning(Net, {tuned.mask!r})"


def test_strict_load_of_a_base_checkpoint_takes_the_masters_along() -> None:
    tuned = tuned_net()
    base = state_of(tuned.model)
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    train(tuned.model, optimizer)
    assert not same_bits(tuned.model.state_dict()["conv.weight"], base["conv.weight"])
    keys = tuned.model.load_state_dict(base, strict=True)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert_masters_match(tuned.model)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # no gradient: writes the masters back
    assert_state(tuned.model, base)


def test_load_of_a_wrong_checkpoint_still_fails() -> None:
    tuned = tuned_net()
    base = state_of(tuned.model)
    masters = [p.detach().clone() for p in tuned.parameters()]
    with pytest.raises(RuntimeError, match="Unexpected key.*extra"):
        tuned.model.load_state_dict({**base, "extra": torch.ones(1)})
    del base["conv.weight"]
    with pytest.raises(RuntimeError, match="Missing key.*conv.weight"):
        tuned.model.load_state_dict(base)
    assert all(same_bits(p, m) for p, m in zip(tuned.parameters(), masters, strict=True))


def untied_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))


def test_load_with_assign_is_noticed() -> None:
    model = untied_net()
    tuned = ff.train_only(model, mask_over_all(model))
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    base = state_of(model)
    train(model, optimizer)
    model.load_state_dict({n: t.clone() for n, t in base.items()}, assign=True)
    assert_masters_match(model)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    expected = {n: t for n, t in base.items() if "running" not in n and "num_b" not in n}
    for name, tensor in expected.items():
        assert same_bits(model.state_dict()[name], tensor), name
    before = state_of(model)
    train(model, optimizer)  # the assigned tensors are the ones that are trained
    assert not same_bits(model.state_dict()["0.weight"], before["0.weight"])
    assert_masters_match(model)


def test_load_with_assign_of_a_tied_weight_is_refused_by_name() -> None:
    tuned = tuned_net()
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    train(tuned.model, optimizer)
    base = state_of(net())
    tuned.model.load_state_dict(copy.deepcopy(base), assign=True)
    with pytest.raises(RuntimeError, match="tied weight 'weight'.* was untied after train_only"):
        train(tuned.model, optimizer)
    # Tied again, it trains on from the loaded weights, not from the masters of before.
    with torch.no_grad():
        tuned.model.again.weight = tuned.model.first.weight
    for parameter in tuned.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ff.SGD(tuned.parameters(), lr=0.1).step()
    for name in ("conv.weight", "first.weight", "again.weight"):
        assert same_bits(tuned.model.state_dict()[name], base[name]), name


def test_transformer_tied_again_as_the_error_says() -> None:
    model, loss = tiny_transformer("gpt2")
    tuned = ff.train_only(model, mask_over_all(model))
    base = {name: tensor + 1.0 for name, tensor in model.state_dict().items()}
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    model.load_state_dict(copy.deepcopy(base), assign=True)
    loss(model).backward()
    with pytest.raises(RuntimeError, match=r"model\.tie_weights\(\) in no_grad mode"):
        optimizer.step()
    with torch.no_grad():
        model.tie_weights()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert_state(model, base)


def test_weight_replaced_by_hand_is_followed() -> None:
    model = nn.Linear(4, 3)
    tuned = ff.train_only(model, mask_over_all(model))
    other = numbers(3, 4, seed=3)
    model.weight = nn.Parameter(other.clone(), requires_grad=False)
    for parameter in tuned.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ff.SGD(tuned.parameters(), lr=0.1).step()
    assert same_bits(model.state_dict()["weight"], other)


def test_lstm_assigned_and_released_uses_the_loaded_weights() -> None:
    model, data = built("lstm")
    tuned = ff.train_only(model, mask_over_all(model))
    other, _ = built("lstm")
    state = {name: tensor + 0.1 for name, tensor in other.state_dict().items()}
    other.load_state_dict(state)
    model.load_state_dict(state, assign=True)
    tuned.release()
    with torch.no_grad():
        assert same_bits(model(data), other(data))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_attach_writes_the_values_of_any_torch_optimizer(make: Any) -> None:
    tuned = tuned_net()
    base = state_of(tuned.model)
    optimizer = make(tuned.parameters(), lr=0.1)
    handle = tuned.attach(optimizer)
    train(tuned.model, optimizer)
    assert_masters_match(tuned.model)
    for name, found in tuned.mask.items():
        now, before = tuned.model.state_dict()[name].flatten(), base[name].flatten()
        outside = torch.ones(now.numel(), dtype=torch.bool).index_fill(0, found.long(), False)
        assert same_bits(now[outside], before[outside])
        if len(found):
            assert not torch.equal(now, before)
    handle.remove()
    before = state_of(tuned.model)
    for parameter in tuned.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert_state(tuned.model, before)


def test_attach_refuses_an_optimizer_of_something_else() -> None:
    tuned, other = tuned_net(), net()
    with pytest.raises(
        ValueError, match="optimizer must hold compact parameters of this model; got"
    ):
        tuned.attach(torch.optim.SGD(other.parameters(), lr=0.1))


def test_release_gives_the_plain_module_back() -> None:
    model = net()
    model.free.weight.requires_grad_(False)
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    tensors = {name: id(p) for name, p in model.named_parameters()}
    tuned = ff.train_only(model, net_mask(model))
    train(model, ff.SGD(tuned.parameters(), lr=0.1))
    trained = state_of(model)
    assert tuned.release() is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    assert_state(model, trained)
    assert not list(tuned.parameters())
    again = ff.train_only(model, net_mask(model))  # and can be masked anew
    assert again.num_selected == tuned.mask.num_selected


def test_released_lstm_trains_densely() -> None:
    model, data = built("lstm")
    twin = copy.deepcopy(model)
    ff.train_only(model, mask_over_all(model)).release()
    expected = dense_gradients(twin, square_loss(data))
    found = dense_gradients(model, square_loss(data))
    assert expected.keys() == found.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_weights_that_were_frozen_before_can_be_masked() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    tuned = ff.train_only(model, mask_over_all(model))
    model(numbers(2, 4)).sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())
    tuned.release()
    assert not any(p.requires_grad for p in model.parameters())


# --- DistributedDataParallel ---


def ddp_net() -> tuple[nn.Module, ff.SparseTuning]:
    # Integers, so that the sum over the batch does not depend on how it is split.
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.arange(parameter.numel()) % 5 - 2).view_as(parameter))
    return model, ff.train_only(model, mask_over_all(model, 0.5))


DDP_DATA = torch.arange(48).remainder(7).sub(3).float().view(8, 6)


def ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    model, tuned = ddp_net()
    if rank == 1:  # the first rank's weights count
        with torch.no_grad():
            model[0]._parameters["weight"].add_(1.0)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = ff.SGD(tuned.parameters(), lr=2.0**-10, momentum=0.5)
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(DDP_DATA[rank::2]).square().sum().backward()
        optimizer.step()
        history.append(state_of(model))
    torch.save(history, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ddp_ranks_equal_one_process_on_the_joined_batch(tmp_path: Any) -> None:
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=ddp_worker, args=(r, str(tmp_path))) for r in range(2)]
    for worker in workers:
        worker.start()
    model, tuned = ddp_net()
    optimizer = ff.SGD(tuned.parameters(), lr=2.0**-10, momentum=0.5)
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        (model(DDP_DATA).square().sum() / 2).backward()  # DDP averages over the ranks
        optimizer.step()
        history.append(state_of(model))
    for worker in workers:
        worker.join(timeout=100)
        assert worker.exitcode == 0
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    for name in history[0]:
        assert same_bits(first[0][name], history[0][name]), name  # exact in the first step
        torch.testing.assert_close(first[2][name], history[2][name])
        assert same_bits(first[2][name], second[2][name]), name


# --- refusals leave the model as it was ---


class Clash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.weight_values = torch.ones(4)


def picture(model: nn.Module) -> list[Any]:
    """Everything that a refusal must leave alone."""
    return [
        (
            name,
            type(module),
            module.training,
            sorted(vars(module)),
            list(module._forward_hooks),
            [(n, id(p), p.requires_grad, id(p.grad)) for n, p in module.named_parameters()],
        )
        for name, module in model.named_modules()
    ]


def expanded() -> nn.Module:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.ones(1, 4).expand(3, 4))
    return model


def overlapping() -> nn.Module:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.ones(12).as_strided((3, 4), (2, 1)))
    return model


def mixed(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(dtype), requires_grad=False)
    return model


def meta_head() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, device="meta"))


def renamed(model: nn.Module) -> ff.SparseMask:
    return ff.SparseMask({"nothing": torch.arange(2)}, {"nothing": (4,)})


def reshaped(model: nn.Module) -> ff.SparseMask:
    return ff.SparseMask({"weight": torch.arange(2)}, {"weight": (4, 3)})


REFUSALS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], type[Exception], str]] = {
    "no mask": (
        lambda: nn.Linear(4, 3),
        lambda m: {"weight": torch.arange(2)},
        TypeError,
        "mask must be a SparseMask; got dict",
    ),
    "empty mask": (
        lambda: nn.Linear(4, 3),
        lambda m: mask_of(m, {}),
        ValueError,
        "mask must select at least one weight; got an empty mask",
    ),
    "unknown name": (
        lambda: nn.Linear(4, 3),
        renamed,
        ValueError,
        "mask must fit the model; it names 'nothing'",
    ),
    "other shape": (
        lambda: nn.Linear(4, 3),
        reshaped,
        ValueError,
        r"'weight' has shape \(4, 3\) in the mask and \(3, 4\)",
    ),
    "float64": (
        lambda: mixed(torch.float64),
        mask_over_all,
        ValueError,
        "masked weights must be float32, bfloat16 or float16; got torch.float64 for '1.weight'",
    ),
    "int": (
        lambda: mixed(torch.int32),
        mask_over_all,
        ValueError,
        "got torch.int32 for '1.weight'",
    ),
    "meta": (meta_head, mask_over_all, ValueError, "'1.weight' is on the meta device"),
    "meta, not masked": (
        meta_head,
        lambda m: mask_of(m, {"0.weight": torch.arange(3)}),
        ValueError,
        "'1.weight' is on the meta device",
    ),
    "expanded": (
        expanded,
        mask_over_all,
        ValueError,
        "must not be expanded; 'weight' has stride 0",
    ),
    "overlapping": (overlapping, mask_over_all, ValueError, "must not overlap in memory; 'weight'"),
    "attribute in the way": (
        Clash,
        mask_over_all,
        ValueError,
        "must not have an attribute 'weight_values' beside 'weight'",
    ),
    "scripted": (
        lambda: torch.jit.script(nn.Linear(4, 3)),
        mask_over_all,
        TypeError,
        "torch.jit",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_changes_nothing(name: str) -> None:
    make, make_mask, error, message = REFUSALS[name]
    model = make().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    mask = make_mask(model)
    before = picture(model)
    with pytest.raises(error, match=message):
        ff.train_only(model, mask)
    assert picture(model) == before


class NotToBeDerived(nn.Linear):
    def __init_subclass__(cls) -> None:
        raise TypeError("cannot be derived from")


def test_failure_half_way_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 3), NotToBeDerived(3, 2))
    before = picture(model)
    with pytest.raises(TypeError, match="cannot be derived from"):
        ff.train_only(model, mask_over_all(model))
    assert picture(model) == before


def test_second_train_only_is_refused() -> None:
    tuned = tuned_net()
    before = picture(tuned.model)
    with pytest.raises(RuntimeError, match=r"model has a mask already; call release\(\)"):
        ff.train_only(tuned.model, tuned.mask)
    assert picture(tuned.model) == before


def test_something_that_is_no_module_is_refused() -> None:
    mask = mask_over_all(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got dict"):
        ff.train_only({}, mask)
