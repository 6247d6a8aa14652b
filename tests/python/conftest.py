"""Tests that take `place` run on the CPU, over NumPy, and on a GPU, over CuPy, where there is one."""

import numpy as np
import pytest

import thriftattn as ta


class Place:
    """A device, and how arrays get there and back."""

    def __init__(self, device):
        self.device = device
        self.on_gpu = device != "cpu"
        if self.on_gpu:
            import cupy

            self.xp = cupy

    def put(self, x):
        return self.xp.asarray(x) if self.on_gpu else x

    def get(self, x):
        return self.xp.asnumpy(x) if self.on_gpu else x

    def tolerance(self, on_the_cpu):
        """Of values of order 1: a GPU rounds q and p to 16 bit."""
        return max(on_the_cpu, 3e-3) if self.on_gpu else on_the_cpu


@pytest.fixture(scope="session", params=["cpu", "cuda:0"])
def place(request):
    if request.param != "cpu":
        pytest.importorskip("cupy")
        if not ta.gpus():
            pytest.skip("no GPU, or a build without CUDA")
    return Place(request.param)


@pytest.fixture(scope="session", params=["cpu", "cuda:0"])
def device(request):
    """The same for PyTorch."""
    if request.param != "cpu":
        torch = pytest.importorskip("torch")
        if not ta.gpus() or not torch.cuda.is_available():
            pytest.skip("no GPU, or a build without CUDA")
    return request.param
