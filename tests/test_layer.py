"""lowp.Linear and lowp.linear: nn.Linear in every way, with products inside the recipe's bound."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowp
from lowp.key import clock
from lowp.ops.library import OPS
from lowp.ops.product import ACTIVATIONS
from lowp.recipe import RECIPES
from tests.tensors import FLOATS, same_bits, strided_forms
from tests.tolerances import RECIPE_ERROR as ERROR

NAMES = tuple(RECIPES)


def pair(precision, dtype=torch.float32, activation="none", bias=True):
    """A lowp layer and the nn.Linear of the same weights."""
    layer = lowp.Linear(256, 192, bias, dtype=dtype, precision=precision, activation=activation,
                        name="layer")
    plain = nn.Linear(256, 192, bias, dtype=dtype)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


def activate(z, activation):
    if activation == "gelu_tanh":
        return functional.gelu(z, approximate="tanh")
    return z if activation == "none" else getattr(functional, activation)(z)


def grads(layer, x, dy):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return [y, x.grad, *[p.grad for p in layer.parameters()]]


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_against_fp64(name, activation):
    layer, plain = pair(name, activation=activation)
    x, dy = torch.randn(3, 80, 256), torch.randn(3, 80, 192)
    plain.double()
    wide = x.double().requires_grad_()
    want = activate(plain(wide), activation)
    want.backward(dy.double())
    found = grads(layer, x, dy)
    truth = [want, wide.grad, plain.weight.grad, plain.bias.grad]
    # An activation's slope adds its own error. relu's jumps where an error e turns a sign, for a
    # share of about e / pi of the elements, whose gradient is then wrong by all of itself.
    bound = ERROR[name] * (1.0 if activation == "none" else 2.5)
    if activation == "relu":
        bound = ERROR[name] ** 0.5
    for got, exact in zip(found, truth, strict=True):
        assert got.dtype == torch.float32 and got.shape == exact.shape
        assert error(got, exact) < bound


@pytest.mark.parametrize("dtype", FLOATS)
def test_fp32_recipe_takes_operands_as_they_come(dtype):
    layer, plain = pair("fp32", dtype)
    x, dy = torch.randn(40, 256).to(dtype), torch.randn(40, 192).to(dtype)
    for got, want in zip(grads(layer, x, dy), grads(plain, x, dy), strict=True):
        assert got.dtype == dtype
        assert error(got, want.double()) < {torch.float32: 1e-5, torch.bfloat16: 1e-2,
                                            torch.float16: 1e-3}[dtype]


def test_is_an_nn_linear():
    torch.manual_seed(3)
    plain = nn.Linear(64, 32)
    torch.manual_seed(3)
    layer = lowp.Linear(64, 32)
    assert isinstance(layer, nn.Linear)
    assert same_bits(layer.weight.detach(), plain.weight.detach())
    assert same_bits(layer.bias.detach(), plain.bias.detach())
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert repr(layer) == repr(plain)
    assert "precision=int8" in repr(lowp.Linear(64, 32, precision=8))
    plain.load_state_dict(lowp.Linear(64, 32, precision="int8").state_dict(), strict=True)
    lowp.Linear(64, 32, precision="int8").load_state_dict(plain.state_dict(), strict=True)
    assert lowp.Linear(4, 3, bias=False).bias is None
    assert lowp.Linear(4, 3, device="meta").weight.is_meta
    assert lowp.Linear(4, 3, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_copies_compute_the_same_bits(name):
    layer, _ = pair(name, activation="gelu")
    x, dy = torch.randn(8, 256), torch.randn(8, 192)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)),
              torch.load(buffer, weights_only=False)]
    want = grads(layer, x, dy)
    for other in copies:
        assert repr(other) == repr(layer)
        assert all(map(same_bits, grads(other, x, dy), want))


def test_hooks():
    seen = []
    layer, _ = pair("int8")
    layer.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    layer.register_forward_hook(lambda m, a, y: seen.append("forward"))
    layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    layer(torch.randn(2, 256, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "backward"]


@pytest.mark.parametrize("name", NAMES)
def test_second_backward_repeats_the_bits(name):
    layer, _ = pair(name, activation="silu")
    x = torch.randn(20, 256, requires_grad=True)
    y = layer(x)
    first = torch.autograd.grad(y.sum(), [x, *layer.parameters()], retain_graph=True)
    clock.advance()  # the forward's step counts, whatever happens in between
    second = torch.autograd.grad(y.sum(), [x, *layer.parameters()], retain_graph=True)
    assert all(map(same_bits, first, second))


@pytest.mark.parametrize("name", NAMES)
def test_several_losses_over_one_forward(name):
    layer, plain = pair(name)
    x = torch.randn(64, 256)
    y = layer(x)
    losses = y.square().mean(), y.sin().mean()
    losses[0].backward(retain_graph=True)
    losses[1].backward()
    z = plain(x)
    (z.square().mean() + z.sin().mean()).backward()
    assert error(layer.weight.grad, plain.weight.grad.double()) < 2.5 * ERROR[name]


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_keeps_the_bits(name, reentrant):
    model = nn.Sequential(pair(name, activation="gelu")[0],
                          lowp.Linear(192, 8, precision=name, name="second"))
    x, dy = torch.randn(33, 256), torch.randn(33, 8)
    want = grads(model, x, dy)
    model.zero_grad()
    x.requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).backward(dy)
    assert same_bits(x.grad, want[1])
    assert all(same_bits(p.grad, g) for p, g in zip(model.parameters(), want[2:], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parts_change_no_other_bit(name):
    layer, _ = pair(name, activation="relu")
    x, dy = torch.randn(16, 256), torch.randn(16, 192)
    full = grads(layer, x, dy)
    for x_needs, w_needs, b_needs in itertools.product((False, True), repeat=3):
        if not (x_needs or w_needs or b_needs):
            continue
        layer.weight.requires_grad_(w_needs)
        layer.bias.requires_grad_(b_needs)
        layer.zero_grad()
        leaf = x.clone().requires_grad_(x_needs)
        layer(leaf).backward(dy)
        found = leaf.grad, layer.weight.grad, layer.bias.grad
        for grad, need, want in zip(found, (x_needs, w_needs, b_needs), full[1:], strict=True):
            assert same_bits(grad, want) if need else grad is None
    with torch.no_grad():
        assert same_bits(layer(x), full[0].detach())


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_strides(name):
    layer, plain = pair(name)
    for shape in ((256,), (1, 256), (2, 3, 5, 256)):
        x = torch.randn(shape)
        assert layer(x).shape == plain(x).shape
        assert error(layer(x), plain(x).double()) < ERROR[name]
    for lead in ((0,), (3, 0)):
        x = torch.randn(*lead, 256, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (*lead, 192) and x.grad.shape == x.shape
        assert not layer.weight.grad.any() and not layer.bias.grad.any()
        layer.zero_grad()
    for _, x in strided_forms(torch.randn(256, 256)):
        if x.shape[-1] == 256:
            y = layer(x)
            assert same_bits(y, layer(x.contiguous()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cast", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("dtype", FLOATS)
def test_autocast_follows_f_linear(dtype, cast, name):
    layer, plain = pair(name, dtype)
    x, dy = torch.randn(40, 256).to(dtype), torch.randn(40, 192)
    with torch.autocast("cpu", cast):
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = layer(leaf), plain(other)
        assert y.dtype == z.dtype == cast
    y.backward(dy.to(y.dtype))
    z.backward(dy.to(z.dtype))
    bound = max(ERROR[name], ERROR["bf16"])
    for got, want in ((y, z), (leaf.grad, other.grad), (layer.weight.grad, plain.weight.grad),
                      (layer.bias.grad, plain.bias.grad)):
        assert got.dtype == want.dtype
        assert error(got, want.double()) < 1.5 * bound
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == dtype


def test_second_derivative():
    for activation in ACTIVATIONS:
        layer, plain = pair("fp32", activation=activation)
        results = []
        for module in (layer, plain):
            leaf = (torch.arange(10 * 256).view(10, 256) * 0.7).sin().requires_grad_()
            y = module(leaf)
            if module is plain:
                y = activate(y, activation)
            (g,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
            module.zero_grad()
            g.square().sum().backward()
            results.append([leaf.grad, module.weight.grad, module.bias.grad])
        for got, want in zip(*results, strict=True):
            # fp32 sums; at relu's kink a rounding may turn the sign of one of 1,920 slopes
            assert error(got, want.double()) < (1e-3 if activation == "relu" else 1e-5)
    for name in ("fp16", "bf16"):
        layer, plain = pair(name)
        x = torch.randn(5, 256, requires_grad=True)
        (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        g.sum().backward()
        assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()
    layer, _ = pair("int8")
    x = torch.randn(5, 256, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="recipe 'int8' has no second derivative"):
        g.sum().backward()


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_second_derivative_of_a_frozen_layer(name):
    """x is not kept then, and a gradient penalty needs none of it."""
    layer, plain = pair(name)
    results = []
    for module in (layer, plain):
        module.requires_grad_(False)
        leaf = (torch.arange(10 * 256).view(10, 256) * 0.7).sin().requires_grad_()
        (g,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
        g.square().sum().backward()
        results.append(leaf.grad)
    # every product rounds its operands once more than nn.Linear's
    assert error(results[0], results[1].double()) < 4 * ERROR[name]
    layer.activation = "gelu"
    (g,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"'gelu' has no second derivative.* x is then not kept"):
        g.sum().backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_kept_for_the_backward(dtype, name):
    """Of what is not the caller's or a parameter: the codes and scales of x, or nothing."""
    layer, _ = pair(name, dtype)
    x = torch.randn(64, 256).to(dtype).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    step = clock.step.nbytes
    assert sum(kept.values()) == step + (64 * 256 + 4 * 256 if name == "int8_full" else 0)


def test_reference_backend_gives_the_same_bits():
    """int8 products are exact and everything around them is bitwise, so whole layers are."""
    layer, _ = pair("int8_full", activation="gelu")
    x, dy = torch.randn(70, 256), torch.randn(70, 192)
    with lowp.backend("cpu"):
        found = grads(layer, x, dy)
    with lowp.backend("reference"):
        want = grads(layer, x, dy)
    assert all(map(same_bits, found, want))


def test_gradient_noise_is_unbiased():
    """The mean of the stochastic dx over many steps approaches dy times the quantized weight."""
    layer, _ = pair("int8_full", bias=False)
    x, dy = torch.randn(16, 256), torch.randn(16, 192)
    total, squares, count = torch.zeros(16, 256).double(), torch.zeros(16, 256).double(), 400
    for step in range(1, count + 1):
        clock.set(step)
        dx = grads(layer, x, dy)[1].double()
        total += dx
        squares += dx.square()
    weight = lowp.dequantize(lowp.quantize(layer.weight.detach(), "column"))
    mean = total / count
    sigma = ((squares / count - mean.square()) / count).sqrt()
    z = ((mean - dy.double() @ weight.double()) / sigma).abs()
    # 4,096 z values: 6.5 is passed by chance once in 3 million runs; the 2^-16 bias of a draw and
    # the fp32 rounding of a sum of 192 stay below 0.2 sigma of 400 draws.
    assert z.max() < 6.5
    assert 0.6 < z.square().mean().sqrt() < 1.4


def test_functional_errors():
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    cases = [
        (ValueError, r"expected x \[..., K\] and weight \[N, K\], got \(3, 8\) and \(8, 5\)",
         lambda: lowp.linear(x, w.t())),
        (ValueError, r"lowp.linear: expected bias of shape \(5,\), got \(3,\)",
         lambda: lowp.linear(x, w, torch.zeros(3))),
        (ValueError, "lowp.linear: activation must be one of none, relu",
         lambda: lowp.linear(x, w, activation="swish")),
        (ValueError, "precision must be one of fp32, fp16, bf16, int8, int8_full.*got 'int4'",
         lambda: lowp.Linear(4, 3, precision="int4")),
        (TypeError, "x is torch.float32 and weight torch.bfloat16; recipe 'fp32' multiplies",
         lambda: lowp.linear(x, w.bfloat16(), recipe="fp32")),
        (TypeError, "must be float32, bfloat16 or float16, got torch.float64",
         lambda: lowp.linear(x.double(), w.double(), recipe="int8")),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


class Quantizations(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("lowp::quantize"):
            self.seen.append((func.name(), tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


def test_one_reading_gives_the_codes_by_row_and_by_column():
    """Of the input in the forward pass and of the gradient in the backward; the weight's codes by
    column are made when they are needed."""
    layer, x, dy = pair("int8_full")[0], torch.randn(8, 256), torch.randn(8, 192)
    with Quantizations() as mode:
        grads(layer, x, dy)
    both, one = "lowp::quantize_row_col", "lowp::quantize"
    assert mode.seen == [(both, (8, 256)), (one, (192, 256)), (both, (8, 192)), (one, (192, 256))]


def test_fp32_forward_is_torchs_unless_a_backend_is_asked_for(monkeypatch):
    """The call that the op's kernel would make, made without the op; with its bits."""
    asked = []
    kernels = OPS["linear"].kernels
    for name in ("cpu", "reference"):
        def run(*args, kernel=kernels[name], name=name):
            asked.append(name)
            return kernel(*args)
        monkeypatch.setitem(kernels, name, run)
    layer, x = lowp.Linear(8, 4), torch.randn(3, 8)
    y = layer(x)
    assert not asked
    with lowp.backend("cpu"):
        assert torch.equal(layer(x), y)
    with lowp.backend("reference"):
        layer(x)
    assert asked == ["cpu", "reference"]
