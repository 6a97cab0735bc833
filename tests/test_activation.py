"""Activations: the reference against fp64, the kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch

import lowp
from lowp.ops.activation_grad import activation_grad
from lowp.reference import activation as reference
from tests import cases, tolerances
from tests.targets import CPU
from tests.tensors import FLOATS, same_bits, strided_forms

SMOOTH = ("gelu", "gelu_tanh", "silu")
ALL = ("none", "relu", *SMOOTH)


def exact(x: torch.Tensor, activation: str) -> torch.Tensor:
    """fp64, written so that the left tail does not cancel."""
    x = x.double()
    if activation == "gelu":
        return x * 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
    u = x if activation == "silu" else math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)
    return x * torch.sigmoid(u)


def test_exp():
    x = torch.linspace(-87.3, 88.7, 1_000_001)
    got, want = reference.exp(x), x.double().exp()
    assert ((got - want).abs() / tolerances.ulp(want, torch.float32)).max() <= tolerances.EXP_ULP
    edges = torch.tensor([-math.inf, -87.4, 88.8, math.inf, math.nan, 0.0, -0.0])
    found = reference.exp(edges)
    assert found[:4].tolist() == [0.0, 0.0, math.inf, math.inf]
    assert found[4].isnan() and found[5:].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("activation", SMOOTH)
def test_accuracy(activation):
    x = cases.activation_inputs(200_000)
    x = x[x.isfinite()]
    y, want = reference.activate(x, activation), exact(x, activation)
    scale = torch.maximum(want.abs(), x.double().abs() * tolerances.UNIT)
    error = (y - want).abs() / scale.clamp_min(2.0**-126)
    assert error.max() <= tolerances.ACTIVATION
    z = x[x.abs() < 1e4].double().requires_grad_()
    (slope,) = torch.autograd.grad(exact(z, activation).sum(), z)
    found = reference.derivative(z.detach().float(), activation)
    assert (found - slope).abs().max() <= tolerances.DERIVATIVE


@pytest.mark.parametrize("activation", ALL)
def test_limits(activation):
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, -3e38])
    y = reference.activate(x, activation)
    assert y[0] == math.inf and y[2].isnan()
    assert y[3:5].tolist() == [0.0, 0.0]
    if activation == "none":
        return
    assert y[1] == 0 and y[5] == 0
    slope = reference.derivative(x, activation)
    assert slope[0] == 1 and slope[1] == 0 and slope[5] == 0
    assert torch.equal(slope[3:5], torch.full((2,), 0.0 if activation == "relu" else 0.5))


@pytest.mark.parametrize("activation", ALL)
@pytest.mark.parametrize("dtype", FLOATS)
def test_kernel_equals_reference(isa, dtype, activation):
    for op, args in cases.activation_grad_calls(dtype, activation, 200_000):
        cases.assert_bits(CPU, op, *args)


@pytest.mark.parametrize("activation", ALL)
def test_strides_threads_and_mixed_types(threads, activation):
    for dtype in FLOATS:
        for _, dy in strided_forms(torch.randn(130, 1030)):
            preact = torch.randn(dy.shape).to(dtype)
            with lowp.backend("reference"):
                want = activation_grad(dy, preact, activation)
            assert same_bits(activation_grad(dy, preact, activation), want)


def test_errors():
    x = torch.randn(3)
    with pytest.raises(ValueError, match=r"activation must be one of .*got 'swish'"):
        activation_grad(x, x, "swish")
    with pytest.raises(ValueError, match=r"dy and preact must have one shape, got \(3,\) and \(2"):
        activation_grad(x, x[:2], "relu")
    with pytest.raises(TypeError, match=r"dy must be float32, .*, got torch\.int64"):
        activation_grad(x.long(), x, "relu")


def test_opcheck():
    x = torch.randn(5, 7)
    for dtype in FLOATS:
        for form in (x, x.t(), x[:0]):
            arguments = (form.to(dtype), form.to(dtype), "gelu")
            torch.library.opcheck(torch.ops.lowp.activation_grad.default, arguments)
