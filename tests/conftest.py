"""Fixtures every test file shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: interpret its kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lowp import native
from lowp.backend import status
from lowp.key import clock
from tests.targets import Target

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def pytest_sessionstart() -> None:
    """A suite that silently tested the reference against itself would prove nothing."""
    if os.environ.get("LOWP_REQUIRE_NATIVE") == "1" and native.cpu is None:
        pytest.exit(f"LOWP_REQUIRE_NATIVE=1, but {native.cpu_refusal}", returncode=3)


@pytest.fixture(params=ISAS[:3])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU runs, forced."""
    yield from _forced(request.param)


@pytest.fixture(params=ISAS)
def product_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same with those that only the products use."""
    yield from _forced(request.param)


def _forced(name: str) -> Iterator[str]:
    extension = native.cpu_extension()
    best = extension.best_isa()
    if ISAS.index(name) > ISAS.index(best):
        pytest.skip(f"this CPU runs instruction sets up to {best}")
    before = extension.isa()
    extension.set_isa(name)
    yield name
    extension.set_isa(before)


TARGETS = {
    "triton interpreted": Target("triton", "cpu"), "triton": Target("triton", "cuda"),
    "cuda": Target("cuda", "cuda"),
}


def _target(name: str) -> Target:
    found = TARGETS[name]
    reason = {entry.name: entry.reason for entry in status()}[found.backend]
    if found.device == "cuda" and not torch.cuda.is_available():
        reason = "no CUDA GPU"
    elif found.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = "the kernels run on the GPU of this machine"
    if reason:
        pytest.skip(f"{name}: {reason}")
    return found


_ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")]


@pytest.fixture(params=["triton interpreted", *_ON_GPU])
def target(request: pytest.FixtureRequest) -> Target:
    """Each family of device kernels: Triton interpreted on CPU tensors, and both on a GPU."""
    return _target(request.param)


@pytest.fixture(params=_ON_GPU)
def gpu_target(request: pytest.FixtureRequest) -> Target:
    """Both families on a GPU, for what an interpreter cannot show."""
    return _target(request.param)


@pytest.fixture(params=(1, 2, 3))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Thread counts, an odd one among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For matrices that are too small to share; whatever number a test sets is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Every test starts with the same seed and clock, and leaves the clock as it found it."""
    torch.manual_seed(0)
    step = clock.step
    clock.set(1)
    yield
    clock.step = step
