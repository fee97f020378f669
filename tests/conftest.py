import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is first imported, by whomever
torch.set_num_threads(1)  # the tensors are tiny, and the workers of pytest-xdist share the cores
with torch.device("meta"):
    torch.empty(0)  # from now on such a context knows the true torch.empty, which the fixture below replaces


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item.module, "DEVICE", "cpu") == "cuda":  # the kernels' tests, which the interpreter runs elsewhere
            item.add_marker(pytest.mark.gpu)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Fill every uninitialized tensor with NaN or the largest integer, so that reading unwritten memory shows."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_meta or tensor.dtype == torch.bool:
                return tensor
            with torch.no_grad():
                return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def fresh_seed():
    torch.manual_seed(torch.seed() % 2**31)
    seed = torch.initial_seed()
    yield
    print(f"torch seed {seed}")  # shown by pytest when the test fails
