"""An AdamW step that takes over the last one's checks and table has the bits of one that does not.

Whatever happens between two steps: the next one must see it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lowp
from lowp.native import cpu
from lowp.optim.optimizer import Optimizer
from tests.tensors import same_bits

pytestmark = pytest.mark.skipif(cpu is None, reason="the native kernels are not built")
SHAPES = ((64, 64), (65,), (3, 5, 7), (), (0, 4), (96, 96))


class Checked(lowp.optim.AdamW):
    """Every step checks and packs anew."""

    step_group = Optimizer.step_group


def optimizers(dtype: torch.dtype, **options: Any) -> list[Any]:
    """One that repeats and one that does not, of equal parameters."""
    torch.manual_seed(0)
    values = [torch.randn(shape).to(dtype) for shape in SHAPES]
    return [kind([v.clone().requires_grad_() for v in values], lr=1e-2, **options)
            for kind in (lowp.optim.AdamW, Checked)]


def params_of(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(pair: list[Any], seed: int) -> None:
    """New gradients in new memory, an update of both, and the comparison."""
    for optimizer in pair:
        generator = torch.Generator().manual_seed(seed)
        for p in params_of(optimizer):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    compare(pair)


def compare(pair: list[Any]) -> None:
    for p, q in zip(*map(params_of, pair), strict=True):
        assert same_bits(p.detach(), q.detach())
        mine, its = pair[0].state[p], pair[1].state[q]
        assert mine.keys() == its.keys()
        for key, value in mine.items():
            assert same_bits(torch.as_tensor(value), torch.as_tensor(its[key])), key


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one a repeated update."""
    found: list[int] = []
    run = lowp.optim.repeat.RepeatedUpdate.run

    def counted(self: Any, *options: Any) -> None:
        found.append(1)
        run(self, *options)

    monkeypatch.setattr(lowp.optim.repeat.RepeatedUpdate, "run", counted)
    return found


@pytest.mark.parametrize("options", (
    {}, {"amsgrad": True}, {"maximize": True}, {"rounding": "nearest"}, {"state_dtype": "fp32"},
    {"state_dtype": "int8"}, {"master": "remainder"}, {"master": "kahan"}, {"clip_grad_norm": 1.0},
), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bits(dtype: torch.dtype, options: dict[str, Any], repeated: list[int]) -> None:
    pair = optimizers(dtype, **options)
    for seed in range(4):
        step(pair, seed)
        for optimizer in pair:
            optimizer.param_groups[0]["lr"] *= 0.5
    assert len(repeated) == 3


def other_param_memory(optimizer: Any) -> None:
    p = params_of(optimizer)[0]
    p.data = p.data.clone()


def turned_param(optimizer: Any) -> None:
    p = params_of(optimizer)[0]  # the same address and shape
    p.data = p.data.t()


def other_param_type(optimizer: Any) -> None:
    p = params_of(optimizer)[0]
    p.grad = None
    p.data = p.data.half()


def other_state(optimizer: Any) -> None:
    state = optimizer.state[params_of(optimizer)[0]]
    state["exp_avg"] = state["exp_avg"] * 0.5


def other_state_memory(optimizer: Any) -> None:
    state = optimizer.state[params_of(optimizer)[0]]
    state["exp_avg_sq"].data = state["exp_avg_sq"].data * 2


def state_in_place(optimizer: Any) -> None:
    state = optimizer.state[params_of(optimizer)[0]]
    state["exp_avg"].mul_(0.5)
    state["step"].fill_(7)


def other_id(optimizer: Any) -> None:
    optimizer.state[params_of(optimizer)[0]]["tensor"] = 12345


def loaded(optimizer: Any) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(saved)


def more_params(optimizer: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    optimizer.add_param_group({"params": [torch.randn(9, 9, generator=generator).requires_grad_()],
                               "amsgrad": True})


def other_options(optimizer: Any) -> None:
    optimizer.param_groups[0].update(betas=(0.5, 0.9), eps=1e-3, weight_decay=0.3, seed=9,
                                     rounding="nearest", state_rounding="stochastic",
                                     decoupled_weight_decay=False)


EVENTS: tuple[Callable[[Any], None], ...] = (
    other_param_memory, turned_param, other_param_type, other_state, other_state_memory,
    state_in_place, other_id, loaded, more_params, other_options,
)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_what_happens_between_two_steps(event: Callable[[Any], None], repeated: list[int]) -> None:
    pair = optimizers(torch.bfloat16)
    for seed in range(2):
        step(pair, seed)
    before = params_of(pair[0])[0].detach().clone()
    for optimizer in pair:
        event(optimizer)
    for seed in range(2, 5):
        step(pair, seed)
    assert not torch.equal(before, params_of(pair[0])[0])
    repeats = all(p.is_contiguous() for p in params_of(pair[0]))
    assert len(repeated) >= 3 if repeats else len(repeated) == 1


def test_gradients(repeated: list[int]) -> None:
    """Strided ones, none at all, and such as a gradient scaler refuses."""
    pair = optimizers(torch.float32)
    for seed in range(2):
        step(pair, seed)
    for optimizer in pair:
        params_of(optimizer)[0].grad = torch.arange(64.0)[:, None].expand(64, 64)
        optimizer.step()
        params_of(optimizer)[1].grad = None
        optimizer.step()
    compare(pair)
    step(pair, 3)
    step(pair, 4)
    for found, scale in ((0.0, 4.0), (1.0, 4.0), (0.0, 0.5)):
        for optimizer in pair:
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), torch.tensor(scale)
            optimizer.step()
        compare(pair)
    assert len(repeated) == 4


def test_of_another_backend(repeated: list[int]) -> None:
    """A forced one runs, repeated or not."""
    pair = optimizers(torch.bfloat16)
    step(pair, 0)
    with lowp.backend("reference"):
        step(pair, 1)
    assert not repeated
    step(pair, 2)
    assert len(repeated) == 1


def test_a_copy_has_its_own(repeated: list[int]) -> None:
    """Neither a copy nor a reloaded optimizer updates the original's tensors."""
    optimizer = optimizers(torch.float32)[0]
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in params_of(optimizer)]
    twin = copy.deepcopy(optimizer)
    for p in params_of(twin):
        p.grad = torch.ones_like(p)
    twin.step()
    assert not repeated
    assert all(map(torch.equal, before, params_of(optimizer)))


def test_wrong_gradients_are_still_refused() -> None:
    """The errors of the checks come in repeated steps too."""
    optimizer = optimizers(torch.float32)[0]
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.step()
    params_of(optimizer)[0].grad = torch.ones(64, 64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
