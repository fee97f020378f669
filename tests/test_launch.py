"""What the launcher keeps of a kernel, with a kernel that only notes how it was called."""

import pytest
import torch

pytest.importorskip("triton")

from kivicache.buffer import TokenBuffer
from kivicache.triton.launch import Launcher


class Kernel:
    """Stands in for a Triton kernel and for what it is compiled to."""

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            if constants:
                self.compiled.append((grid, arguments, constants))
                return self
            self.launched.append((grid, arguments))
            return None

        return launch


def test_a_kernel_is_compiled_once_for_a_kind_and_then_given_addresses():
    kernel = Kernel()
    launcher = Launcher(kernel, {"D": 64}, num_warps=2)
    tensor, buffer = torch.zeros(3), TokenBuffer.of(torch.zeros(1, 2, 8, 16))
    buffer.start = 3
    for numbers in ((1, 2.0), (5, 2.0), (7, 3.0)):
        launcher((1, 2, 3), (tensor, buffer), numbers, kind="bfloat16")
    ((grid, arguments, constants),) = kernel.compiled
    assert (grid, constants, arguments[2:]) == ((1, 2, 3), {"D": 64, "num_warps": 2}, (1, 2.0))
    assert torch.equal(arguments[1], buffer.read())
    addresses = tensor.data_ptr(), buffer.read().data_ptr()
    assert kernel.launched == [((1, 2, 3), (*addresses, 5, 2.0, 64)), ((1, 2, 3), (*addresses, 7, 3.0, 64))]
    launcher((1, 2, 3), (tensor, buffer), (1, 2.0), kind="float16")
    assert len(kernel.compiled) == 2


def test_a_number_beyond_32_bits_is_another_kernel():
    kernel = Kernel()
    launcher = Launcher(kernel, {"D": 64})
    for number in (2**31 - 1, 2**31, 2**33, 5):
        launcher((1, 1, 1), (), (number, 0.5), kind="bfloat16")
    assert [arguments[0] for _, arguments, _ in kernel.compiled] == [2**31 - 1, 2**31]
    assert [arguments[0] for _, arguments in kernel.launched] == [2**33, 5]
