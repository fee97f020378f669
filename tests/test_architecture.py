"""The shape of the code itself: imports run one way, and the optional libraries stay optional."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kivicache

PACKAGE = Path(kivicache.__file__).parent
ORDER = [  # a module imports only from those above it
    "files",
    "config",
    "policy",
    "memory",
    "packing",
    "quantization",
    "rotation",
    "buffer",
    "triton",
    "triton.launch",
    "triton.operands",
    "triton.tuning",
    "triton.tile",
    "triton.tile_nvidia",
    "triton.rotate",
    "triton.combine",
    "triton.decode_portable",
    "triton.decode_nvidia",
    "triton.decode",
    "triton.store",
    "triton.pack",
    "triton.least_squares",
    "triton.append",
    "triton.unpack",
    "backends.base",
    "backends.native",
    "backends.mse",
    "backends.hqq",
    "backends.quanto",
    "backends",
    "packed",
    "states",
    "fixed_states",
    "attention",
    "fixed_attention",
    "layer",
    "fixed",
    "cache",
    "",
    "caches",
    "fidelity",
    "models",
    "estimate",
    "data",
    "tasks.base",
    "tasks.fidelity",
    "tasks.gsm8k",
    "tasks.longbench",
    "tasks.retrieval",
    "tasks",
    "evaluation",
    "evaluation_report",
    "lm_eval",
    "demo",
    "objectives",
    "sensitivity",
    "search",
    "tuning",
    "tuning_report",
    "__main__",
]


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kivicache":
            base = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield inner if inner in ORDER else base
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}: relative import"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_run_one_way(path):
    name = module_name(path)
    assert name in ORDER, f"{name}: say in ORDER where it stands"
    for imported in imports_of(path):
        assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_import_needs_no_optional_library():
    code = """
import sys
for name in ("triton", "hqq", "optimum", "rich", "gguf", "matplotlib", "optuna", "sklearn", "lm_eval", "datasets"):
    sys.modules[name] = None
import torch, kivicache
from kivicache import KIVICache, KIVIConfig
cache = KIVICache(KIVIConfig(nbits=2))
states = torch.randn(1, 2, 300, 64)
cache.update(states, states, 0)
assert cache.update(states[:, :, :1], states[:, :, :1], 0)[0].shape == (1, 2, 301, 64)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert all(hasattr(kivicache, name) for name in kivicache.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_nothing_is_unpickled():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert (
            "pickle" not in text
            and "yaml.unsafe" not in text
            and "UnsafeLoader" not in text
            and "FullLoader" not in text
            and "torch.load(" not in text
        ), path.name
