"""adamw, sgd and lion: the kernels equal the reference bit for bit, whatever they are given."""

from __future__ import annotations

import itertools

import pytest
import torch

from lowp.ops.adamw import adamw
from lowp.ops.lion import lion
from lowp.ops.sgd import sgd
from tests.tensors import FLOATS, random_bits, same_bits, special_values, strided_forms
from tests.update_cases import OPS, STATES, adamw_case, lion_case, sgd_case, still_case
from tests.updates import assert_equal, cloned, masters_of


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPS)
def test_kernel_equals_reference(isa, name, dtype, kind):
    op, make = OPS[name]
    params = [torch.randn(257, 401).to(dtype), torch.randn(5).to(dtype), torch.randn(()).to(dtype)]
    grads = [torch.randn(p.shape) for p in params]
    for rounding in ("nearest", "stochastic"):
        assert_equal(op, make(params, grads, kind, rounding))


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", OPS)
def test_special_values(isa, name, kind):
    op, make = OPS[name]
    special = special_values()
    for dtype in FLOATS:
        grid = special.repeat(len(special)).to(dtype)
        grads = [special.repeat_interleave(len(special)), random_bits(3000, seed=2).view(30, 100)]
        params = [grid, random_bits(3000, seed=3).view(30, 100).to(dtype)]
        assert_equal(op, make(params, grads, kind))


SIZES = (31, 32, 33, 63, 64, 65, 127, 128, 130, 255, 256, 257, 320, 1025)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", OPS)
def test_sizes_and_offsets_around_vectors(isa, name, kind):
    """Also where the draws' 32-bit group counter carries, in the middle of a tensor or before."""
    op, make = OPS[name]
    for dtype in FLOATS:
        params = [torch.randn(n).to(dtype) for n in SIZES for _ in range(3)]
        grads = [torch.randn(p.shape).to(dtype) for p in params]
        carry = 8 * 2**32
        offsets = [(0, 1 + i % 9, carry - i % 300)[i % 3] for i in range(len(params) - 1)]
        assert_equal(op, make(params, grads, kind, offsets=[*offsets, carry + 12_345]))


@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
@pytest.mark.parametrize("name", OPS)
def test_short_blocks_beside_larger_rows(isa, name, rounding):
    """Last blocks of some vectors, but not of whole steps: no code or scale is the next row's."""
    op, make = OPS[name]
    for dtype in FLOATS:
        params = [torch.randn(6, n).to(dtype) for n in (16, 32, 48, 96, 160, 224, 272, 288, 352)]
        factors = torch.logspace(-3, 3, 6).unsqueeze(1)
        grads = [torch.randn(p.shape) * factors for p in params]
        assert_equal(op, make(params, grads, "int8", rounding))


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", OPS)
def test_one_special_value_a_vector(isa, name, kind):
    """In every lane in turn, of each tensor that is read; what is beside it stays ordinary."""
    op, make = OPS[name]
    values = torch.cat([special_values(), torch.tensor([2.0**62, -(2.0**63), 2.0**64, 2.0**100])])
    lanes = torch.arange(0, 64 * len(values) * 4, 64) + torch.arange(len(values) * 4) * 5 % 64
    moment = "exp_avgs" if name != "sgd" else "momentum_buffers"
    for dtype in FLOATS:
        for where in ("params", "grads", moment, "exp_avg_sqs"):
            params = [torch.randn(4 * len(values), 64).to(dtype)]
            grads = [torch.randn(params[0].shape).to(dtype)]
            case = make(params, grads, kind)
            if where in case and case[where][0].is_floating_point():
                x = case[where][0].view(-1)
                x[lanes] = values.repeat(4).to(x.dtype)
                assert_equal(op, case)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", OPS)
def test_rows_without_gradients(isa, name, kind):
    """As an embedding has for tokens that have not come yet: gradients and moments of 0."""
    op, make = OPS[name]
    for dtype, zero in itertools.product(FLOATS, (0.0, -0.0)):
        params = [torch.randn(12, 300).to(dtype)]
        grads = [torch.randn(12, 300)]
        grads[0][::2] = zero
        case = make(params, grads, kind)
        for key in ("exp_avgs", "exp_avg_sqs", "momentum_buffers"):
            for moment in case.get(key, ()):
                moment[::2] = 0
        assert_equal(op, case)


@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
@pytest.mark.parametrize("name", OPS)
def test_codes_of_any_magnitude(isa, name, rounding):
    """Blocks whose scales go from 0 to Inf, with codes of every size, zeros, and one tiny value."""
    op, make = OPS[name]
    factors = torch.logspace(-150, 127, 140, base=2.0).unsqueeze(1)
    for dtype in FLOATS:
        spread = torch.randn(140, 512) * torch.logspace(-40, 0, 512, base=2.0)
        grads = [spread * factors, spread * factors]
        grads[1][:, 7] = 1e-42
        grads[1][::3] = 0
        params = [torch.randn(g.shape).to(dtype) for g in grads]
        case = make(params, grads, "int8", rounding)
        for key in [k for k in case if k.endswith("scales")]:
            for scale in case[key]:
                scale.mul_(factors.clamp_max(2.0**100))
        case[next(k for k in case if k.endswith("scales"))][1][::3] = 0
        assert_equal(op, case)


@pytest.mark.parametrize("master", ("remainder", "kahan"))
@pytest.mark.parametrize("name", OPS)
def test_masters(isa, name, master):
    op, make = OPS[name]
    coupled = ({"coupled": True}, {"coupled": False}) if name == "adamw" else ({},)
    special = special_values()
    shapes = [torch.randn(57, 401), torch.randn(()), torch.randn(0, 3),
              special.repeat(len(special)), random_bits(3000, seed=3)]
    for dtype, rounding, options, kind in itertools.product(
            FLOATS, ("nearest", "stochastic"), coupled, (torch.float32, "int8")):
        params = [p.to(dtype) for p in shapes]
        grads = [torch.randn(p.shape) for p in shapes[:3]]
        grads += [special.repeat_interleave(len(special)), random_bits(3000, seed=2)]
        case = make(params, grads, kind, rounding, **options)
        assert_equal(op, {**case, "masters": masters_of(params, master)})


@pytest.mark.parametrize("name", OPS)
def test_a_step_of_0_keeps_every_remainder(isa, name):
    case = still_case(name)
    after = assert_equal(OPS[name][0], case)
    assert all(same_bits(after[key][0], case[key][0]) for key in ("params", "masters"))


def test_options(threads):
    params = [torch.randn(90, 300).bfloat16(), torch.randn(70_000)]
    grads = [torch.randn(90, 300).half(), torch.randn(70_000).bfloat16()]
    for amsgrad, maximize, kind in itertools.product((False, True), (False, True), STATES):
        case = adamw_case(params, grads, kind, amsgrad=amsgrad, maximize=maximize,
                          grad_scale=torch.tensor(1024.0), found_inf=torch.tensor(0.0))
        assert_equal(adamw, case)
    for maximize, kind in itertools.product((False, True), STATES):
        assert_equal(lion, lion_case(params, grads, kind, maximize=maximize, weight_decay=0.0,
                                     grad_scale=torch.tensor(3.0)))
        assert_equal(adamw, adamw_case(params, grads, kind, maximize=maximize, coupled=True))
    for nesterov, kind in itertools.product((False, True), STATES):
        assert_equal(sgd, sgd_case(params, grads, kind, nesterov=nesterov, dampening=0.0,
                                   grad_scale=torch.tensor(3.0)))
    assert_equal(sgd, sgd_case(params, grads, torch.float32, momentum_buffers=[],
                               momentum_scales=[], weight_decay=0.0))


@pytest.mark.parametrize("name", OPS)
def test_found_inf_changes_nothing(name):
    op, make = OPS[name]
    params = [torch.randn(20, 300).bfloat16()]
    case = make(params, [torch.full((20, 300), torch.inf)], "int8", found_inf=torch.tensor(1.0),
                steps=[torch.tensor(3.0)])
    after = cloned(case)
    op(*after.values())
    for key, before in case.items():
        if isinstance(before, list) and before and isinstance(before[0], torch.Tensor):
            assert all(map(same_bits, after[key], before))


@pytest.mark.parametrize("name", OPS)
def test_strides_and_empty_neighbours(name):
    op, make = OPS[name]
    full, empty = torch.randn(40, 50), torch.empty(0, 50)
    for params in ([full, empty], [empty, full], [empty], []):
        case = make(list(params), [torch.randn(p.shape) for p in params], torch.float32)
        after = assert_equal(op, case)
        assert [s.item() for s in after["steps"]] == [i + 1 for i in range(len(params))]
    for form, p in strided_forms(torch.randn(64, 129)):
        grads = [torch.ones(()).expand(p.shape)]  # as .sum() gives
        if form == "expanded":
            with pytest.raises(ValueError, match=rf"{name}: params\[0\] is expanded"):
                op(*make([p], grads, torch.float32).values())
            continue
        after = assert_equal(op, make([p.bfloat16()], grads, torch.bfloat16))
        plain = assert_equal(op, make([p.bfloat16().contiguous()], grads, torch.bfloat16))
        assert same_bits(after["params"][0].contiguous(), plain["params"][0])


def test_draws_depend_on_the_global_element_alone():
    """A tensor updated in two shards with their offsets has the bits of the whole."""
    p, g = torch.randn(64, 256).bfloat16(), torch.randn(64, 256)
    whole = adamw_case([p], [g], torch.bfloat16, offsets=[0])
    case = cloned(whole)
    adamw(*case.values())
    keys = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    for rows, offset in ((slice(0, 23), 0), (slice(23, 64), 23 * 256)):
        shard = cloned(whole)
        for key in keys:
            shard[key] = [whole[key][0][rows].clone()]
        shard["offsets"] = [offset]
        adamw(*shard.values())
        for key in keys:
            assert same_bits(shard[key][0], case[key][0][rows])


def test_errors():
    p = [torch.randn(4, 5)]
    for name, (op, make) in OPS.items():
        cases = [
            (ValueError, r"grads\[0\] must have shape \(4, 5\)", {"grads": [torch.randn(5, 4)]}),
            (TypeError, r"params\[0\] must be float32", {"params": [torch.ones(4, 5).long()]}),
            (ValueError, "rounding must be one of nearest, stochastic", {"rounding": "up"}),
            (ValueError, "steps must have 1 entries, one a parameter, got 0", {"steps": []}),
        ]
        for kind, message, change in cases:
            with pytest.raises(kind, match=f"lowp::{name}: {message}"):
                op(*{**make(p, [torch.randn(4, 5)], torch.float32), **change}.values())
        half = [torch.randn(4, 5).bfloat16()]
        for kind, message, masters in (
            (TypeError, r"masters\[0\] of a torch.float32 parameter must be of no type", (p, half)),
            (TypeError, r"masters\[0\] of a torch.bfloat16 parameter must be of torch.int16 or "
                        "torch.bfloat16, got torch.float32", (half, p)),
            (ValueError, r"masters\[0\] must be contiguous, of shape \(4, 5\)",
             (half, [half[0].reshape(5, 4)])),
            (ValueError, "masters must have 1 entries", (half, [])),
        ):
            with pytest.raises(kind, match=f"lowp::{name}: {message}"):
                case = make(masters[0], [torch.randn(4, 5)], torch.float32)
                op(*{**case, **({"coupled": False} if name == "adamw" else {}),
                     "masters": masters[1]}.values())
    with pytest.raises(ValueError, match=r"scale of exp_avgs\[0\] must be float32 \(4, 1\)"):
        adamw(*adamw_case(p, p, "int8", exp_avg_scales=[torch.zeros(3)]).values())


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, kind):
    _, make = OPS[name]
    params = [torch.randn(3, 300).bfloat16(), torch.randn(0, 4), torch.randn(6, 4).t()]
    case = make(params, [torch.randn(p.shape) for p in params], kind)
    overload = getattr(torch.ops.lowp, name).default
    torch.library.opcheck(overload, tuple(case.values()))
    if kind == torch.bfloat16:
        flag = {"coupled": True} if name == "adamw" else {}
        case = {**case, **flag, "masters": masters_of(params, "kahan")}
        torch.library.opcheck(overload, tuple(case.values()))
