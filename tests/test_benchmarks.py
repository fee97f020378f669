"""The benchmarks' command lines, as far as they need no GPU."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITHOUT_TRITON = """
import runpy, sys
sys.modules["triton"] = None
runpy.run_module("benchmarks.decode", run_name="__main__")
"""


def decode(*arguments):
    call = [sys.executable, "-c", WITHOUT_TRITON, *map(str, arguments)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True)


def test_the_decode_benchmark_says_its_options_without_triton():
    done = decode("--help")
    assert done.returncode == 0 and "--plot" in done.stdout, done.stderr


def test_the_decode_benchmark_draws_its_tables_without_triton(tmp_path):
    pytest.importorskip("matplotlib")
    done = decode("--plot", "--out", tmp_path)
    assert done.returncode == 2 and f"--plot: nothing to draw in {tmp_path}" in done.stderr
    shutil.copy(ROOT / "benchmarks" / "results" / "decode_formats.csv", tmp_path)
    done = decode("--plot", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.glob("*.png")] == ["decode_formats.png"]
