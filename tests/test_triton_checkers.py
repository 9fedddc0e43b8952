"""The checks that stand in for a GPU: planted faults are named, correct kernels pass.

Without these a green test of a kernel could mean that nothing was checked.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_cpu.running import skip_without_interpreter
from triton_cpu.worker import InWorker, worker

FAULTS = {
    "unmasked load": "load of 4 bytes out of bounds, program (1, 0, 0)",
    "guard off by one": "load of 4 bytes out of bounds, program (1, 0, 0), +80 bytes",
    "load before the start": "load of 4 bytes out of bounds, program (0, 0, 0), -4 bytes",
    "unmasked store": "store of 4 bytes out of bounds",
    "programs store to one address": "race between programs on 4 addresses",
    "reads what another program stores": "race between programs",
    "one store writes an address twice": "one store writes an address twice, program (0, 0, 0)",
    "atomic add": "deterministic, without atomics",
}


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    skip_without_interpreter()


def call(function, *args):
    return worker().call("triton_cpu.planted_faults", function, args, num_sms=1)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_named(fault) -> None:
    with pytest.raises(InWorker) as error:
        call("copy", torch.zeros(20), torch.rand(20), fault)
    assert "KernelFault" in str(error.value)
    assert FAULTS[fault] in str(error.value)


def test_correct_kernel_passes_and_is_counted() -> None:
    x = torch.rand(20)
    _, (out, *_), checked = call("copy", torch.zeros(20), x, "")
    assert torch.equal(out, x)
    assert checked == {"launches": 1, "loads": 20, "stores": 20}


def test_bounds_are_those_of_the_view() -> None:
    """A view's neighbours are out of bounds, though they are in the same allocation."""
    whole = torch.zeros(60)
    call("copy", whole[20:40], torch.rand(20), "")
    with pytest.raises(InWorker, match="out of bounds"):
        call("copy", whole[20:40], torch.rand(20), "unmasked store")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_load_without_other_is_poisoned(dtype) -> None:
    """On a GPU what a mask leaves out is undefined where other= is missing; here it shows."""
    x = torch.ones(50, dtype=dtype)
    assert call("masked_sum", torch.zeros(1), x, True)[1][0].item() == 50
    assert call("masked_sum", torch.zeros(1), x, False)[1][0].isnan().all()
    integers = torch.ones(50, dtype=torch.int32)
    assert call("masked_sum", torch.zeros(1), integers, False)[1][0].item() > 1e9


def test_uninitialised_memory_is_nan() -> None:
    assert call("uninitialised", torch.zeros(8))[1][0].isnan().all()


def test_kernel_that_fails_says_why() -> None:
    with pytest.raises(InWorker, match="AttributeError"):
        call("no_such_function")


def test_bf16_is_repaired() -> None:
    """All 65536 values widen; fp32 narrows to nearest even; a product equals torch's in fp32."""
    a = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    x = torch.randn(256, 256)
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1 + 2**-8])  # the last is a tie
    finite = torch.randn(256, 256).bfloat16()
    wide, narrow, product = torch.zeros(256, 256), torch.zeros_like(a), torch.zeros(256, 256)
    (wide, narrow, _), (_, _, product) = (
        call("bf16", wide, narrow, product, operand, finite, x)[1][:3] for operand in (a, finite)
    )
    np.testing.assert_array_equal(wide.numpy(), a.float().numpy())
    assert torch.equal(narrow.isnan(), x.isnan())
    assert torch.equal(narrow.nan_to_num(), x.bfloat16().nan_to_num())
    expected = finite.double() @ finite.double().abs()
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)
