"""What is scored: models of common shapes with random weights, and batches of full length.

Nothing is downloaded: a configuration is enough. Dropout is 0, so that train and eval mode agree
(Opacus hooks modules in train mode only). BatchNorm has the statistics of one batch of noise,
without which a deep random net overflows.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import short_set
from shapes import FISHER_MODELS, size_set
from torch import Tensor, nn

__all__ = ["WORKLOADS", "Workload", "build", "load", "names"]

Batch = dict[str, Tensor]

# ReLU and max pooling take another branch where a value is within rounding of the kink: a loop over
# single samples in fp32 is 5e-3 from the same loop in float64 on ResNet-18.
_KINKS = 1e-2


@dataclasses.dataclass(eq=False)
class Workload:
    """A model in eval mode, the batches to score, and the losses.

    Args:
        title: what a figure belongs to: model, sizes, batch, dtype.
        model: in eval mode.
        batches: tensors of one leading size B each.
        loss_fn: ``loss_fn(model, batch)`` -> [B]; ``model`` may be a wrapper that a peer needs.
        rounding: the relative difference that rounding alone can make in fp32.
    """

    title: str
    model: nn.Module
    batches: list[Batch]
    loss_fn: Callable[[Callable[..., Any], Batch], Tensor]
    rounding: float = 1e-4

    @property
    def num_samples(self) -> int:
        """Number of samples in all batches."""
        return sum(len(next(iter(batch.values()))) for batch in self.batches)

    @property
    def sizes(self) -> dict[str, int]:
        """What a figure is drawn against: B and, of sequences, T."""
        first = self.batches[0]
        sizes = {"batch": len(next(iter(first.values())))}
        if "input_ids" in first:
            sizes["length"] = first["input_ids"].shape[1]
        return sizes

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return next(self.model.parameters()).dtype

    @functools.cached_property
    def head(self) -> Workload:
        """The first batch alone, for contenders whose cost per sample no other batch changes."""
        return dataclasses.replace(self, batches=self.batches[:1])

    def samples(self) -> Iterator[Batch]:
        """Yield the samples as batches of one."""
        for batch in self.batches:
            for b in range(len(next(iter(batch.values())))):
                yield {name: values[b : b + 1] for name, values in batch.items()}


def names(device: torch.device) -> list[str]:
    """Return the workloads of a device, what matters most first.

    Args:
        device: where they run.
    """
    return list(FISHER_MODELS[size_set(device)])


@functools.lru_cache(maxsize=1)
def load(name: str, device: torch.device, **sizes: int) -> Workload:
    """Build a workload on a device; the one that was built before is let go.

    Args:
        name: one of `names`.
        device: where it runs; a GPU gets the large sizes in bf16.
        sizes: other than those of ``name`` on this device, such as ``length``.

    Raises:
        ImportError: the models of transformers are not installed.
    """
    size = size_set(device)
    dtype = torch.bfloat16 if size == "gpu" else torch.float32
    return build(name, device, dtype, **{**FISHER_MODELS[size][name], **_fewer(), **sizes})


def build(name: str, device: torch.device, dtype: torch.dtype, **sizes: Any) -> Workload:
    """Build a workload of any size, always with the same random weights.

    Args:
        name: one of `WORKLOADS`.
        device: where it is made: a large model would be slow to make on a CPU.
        dtype: of weights and images.
        **sizes: what the function of that name takes.

    Raises:
        ImportError: the models of transformers are not installed.
    """
    torch.manual_seed(0)
    with device:
        workload = WORKLOADS[name](**sizes)
    workload.model.to(dtype).eval()
    for batch in workload.batches:
        for key, values in batch.items():
            batch[key] = values.to(dtype if values.is_floating_point() else None)
    if any(isinstance(module, nn.BatchNorm2d) for module in workload.model.modules()):
        _set_statistics(workload)
    workload.title += (
        f" B={workload.sizes['batch']} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
    )
    return workload


def _fewer() -> dict[str, int]:
    """Fewer batches where minutes count: only the share of the first one changes with them."""
    return {"batches": 4} if short_set() else {}


def _set_statistics(workload: Workload) -> None:
    for module in workload.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average of what is seen, and nothing was seen yet
    workload.model.train()
    with torch.no_grad():
        workload.loss_fn(workload.model, workload.batches[0])
    workload.model.eval()


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


def _classify(model: Callable[..., Any], batch: Batch) -> Tensor:
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    return _cross_entropy(model(**inputs).logits, batch["labels"])


def _classify_images(model: Callable[..., Any], batch: Batch) -> Tensor:
    return _cross_entropy(model(batch["pixel_values"]), batch["labels"])


def _next_token(model: Callable[..., Any], batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    return _cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()).view(
        len(logits), -1
    ).mean(1)  # fmt: skip


def _bert(
    layers: int, hidden: int, heads: int, vocab: int, length: int, batch_size: int, batches: int
) -> Workload:
    tf = _transformers()
    config = tf.BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        intermediate_size=4 * hidden, vocab_size=vocab, max_position_embeddings=length,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip

    def batch() -> Batch:
        ids = (batch_size, length)
        return {
            # Never token 0: it is the padding, whose row has no gradient in torch, and has one in
            # Opacus.
            "input_ids": torch.randint(1, vocab, ids),
            "token_type_ids": torch.zeros(ids, dtype=torch.int64),
            # Opacus needs them for every sample, not [1, T] for all.
            "position_ids": torch.arange(length).repeat(batch_size, 1),
            "labels": torch.randint(0, 3, (batch_size,)),
        }

    title = f"BERT {layers}x{hidden} T={length}"
    model = tf.BertForSequenceClassification(config)
    return Workload(title, model, [batch() for _ in range(batches)], _classify)


def _llama(
    layers: int, hidden: int, heads: int, intermediate: int, vocab: int, length: int,
    batch_size: int, batches: int,
) -> Workload:  # fmt: skip
    tf = _transformers()
    config = tf.LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8), intermediate_size=intermediate, vocab_size=vocab,
        max_position_embeddings=length, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    data = [{"input_ids": torch.randint(3, vocab, (batch_size, length))} for _ in range(batches)]
    title = f"Llama {layers}x{hidden} T={length}"
    return Workload(title, tf.LlamaForCausalLM(config), data, _next_token)


def _images(batches: int, batch_size: int, side: int, classes: int) -> list[Batch]:
    return [
        {
            "pixel_values": torch.randn(batch_size, 3, side, side),
            "labels": torch.randint(0, classes, (batch_size,)),
        }
        for _ in range(batches)
    ]


def _resnet(
    layer: str, depths: list[int], widths: list[int], side: int, batch_size: int, batches: int
) -> Workload:
    tf = _transformers()
    config = tf.ResNetConfig(
        layer_type=layer, depths=depths, hidden_sizes=widths, embedding_size=min(64, widths[0]),
        num_labels=1000,
    )  # fmt: skip
    blocks = 2 if layer == "basic" else 3
    title = f"ResNet-{blocks * sum(depths) + 2} {side}px"
    model = tf.ResNetForImageClassification(config)
    return Workload(title, model, _images(batches, batch_size, side, 1000), _classify, _KINKS)


def _vit(
    layers: int, hidden: int, heads: int, side: int, batch_size: int, batches: int
) -> Workload:
    tf = _transformers()
    config = tf.ViTConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, image_size=side,
        intermediate_size=4 * hidden, num_labels=1000,
    )  # fmt: skip
    images = _images(batches, batch_size, side, 1000)
    title = f"ViT {layers}x{hidden} {side}px"
    return Workload(title, tf.ViTForImageClassification(config), images, _classify)


def _convnet(widths: list[int], side: int, batch_size: int, batches: int) -> Workload:
    """Only layers that every contender knows: no norm, no addition."""
    layers: list[nn.Module] = []
    for position, (before, after) in enumerate(zip([3, *widths], widths, strict=False)):
        layers += [nn.Conv2d(before, after, 3, 1 + position % 2, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                          nn.Linear(16 * widths[-1], 100))  # fmt: skip
    title = f"convnet {len(widths)}x{widths[-1]} {side}px"
    images = _images(batches, batch_size, side, 100)
    return Workload(title, model, images, _classify_images, _KINKS)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "bert": _bert,
    "llama": _llama,
    "resnet": _resnet,
    "vit": _vit,
    "convnet": _convnet,
}
