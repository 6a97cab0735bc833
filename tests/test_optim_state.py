"""Optimizer states: by name or position, through files and torch's own, resumed bit for bit."""

from __future__ import annotations

import copy
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp_state

import lowp
from lowp.key import clock, tensor_id
from lowp.reference.codec import decode, encode
from tests.tensors import FLOATS, same_bits

ROOT = Path(__file__).resolve().parents[1]
MAKE = {
    "AdamW": lambda groups, **k: lowp.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, **k),
    "AMSGrad": lambda groups, **k: lowp.optim.AdamW(groups, lr=1e-2, amsgrad=True, **k),
    "SGD": lambda groups, **k: lowp.optim.SGD(groups, lr=1e-2, momentum=0.9, dampening=0.1, **k),
}
TYPES = ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8"),
         (torch.float16, "bf16"))


class Model(nn.Module):
    """Parameters with and without 8-bit states, an empty one among them."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {"a": (40, 300), "empty": (0, 7), "b": (90,), "c": ()}.items():
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(value))


def run(model, optimizer, steps):
    for step in steps:
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(1000 * step + len(name) + p.numel())
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def named(model, order):
    """Groups of named parameters; ``order`` such as "ab c" is one group of two and one of one."""
    found = dict(model.named_parameters())
    found["e"] = found.pop("empty")
    names = {"e": "empty"}
    return [{"params": [(names.get(k, k), found[k]) for k in group]} for group in order.split()]


def assert_same(model, optimizer, other, other_optimizer):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach()), name
        a, b = optimizer.state[p], other_optimizer.state[q]
        assert a.keys() == b.keys()
        for key in a:
            equal = same_bits(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
            assert equal, (name, key)


def through_torch_save(model, optimizer, fresh, loaded, folder):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))


def through_safetensors(model, optimizer, fresh, loaded, folder):
    lowp.optim.save_state(optimizer, folder / "optimizer.safetensors")
    lowp.optim.load_state(loaded, folder / "optimizer.safetensors")
    assert [p.name for p in folder.iterdir()] == ["optimizer.safetensors"]


def through_dcp(model, optimizer, fresh, loaded, folder, flat=False):
    options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = dcp_state.get_optimizer_state_dict(model, optimizer, options=options)
    checkpoint.save({"optimizer": saved}, checkpoint_id=folder, no_dist=True)
    target = dcp_state.get_optimizer_state_dict(fresh, loaded, options=options)
    checkpoint.load({"optimizer": target}, checkpoint_id=folder, no_dist=True)
    dcp_state.set_optimizer_state_dict(fresh, loaded, target, options=options)


def through_flat_dcp(*args):
    through_dcp(*args, flat=True)


ROUTES = (through_torch_save, through_safetensors, through_dcp, through_flat_dcp)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("dtype", "state"), TYPES)
@pytest.mark.parametrize("name", MAKE)
def test_a_hundred_steps_after_a_resume(name, dtype, state, route, tmp_path):
    """Saved at step 7, loaded into other groups in another order: equal to going on."""
    model, fresh = Model(dtype), Model(dtype, seed=1)
    optimizer = MAKE[name](named(model, "aeb c"), state_dtype=state, seed=3)
    run(model, optimizer, range(7))
    # torch.distributed.checkpoint takes a group's options from the last saved one it meets
    loaded = MAKE[name](named(fresh, "c bea" if "dcp" in route.__name__ else "ce ba"),
                        state_dtype=state, seed=3)
    fresh.load_state_dict(model.state_dict())
    clock.set(1)
    route(model, optimizer, fresh, loaded, tmp_path)
    assert clock.step.item() == 8
    assert_same(fresh, loaded, model, optimizer)
    for p, q in zip(fresh.parameters(), model.parameters(), strict=True):
        tensors = [k for k, v in loaded.state[p].items() if torch.is_tensor(v) and v.numel()]
        assert all(loaded.state[p][k].data_ptr() != optimizer.state[q][k].data_ptr()
                   for k in tensors)
    run(model, optimizer, range(7, 107))
    run(fresh, loaded, range(7, 107))
    assert_same(fresh, loaded, model, optimizer)


def test_names_and_sizes_that_do_not_match():
    model = Model()
    optimizer = MAKE["AdamW"](named(model, "ab c"))
    run(model, optimizer, range(2))
    kept = optimizer.state_dict()
    with pytest.raises(ValueError, match="does not have empty"):
        MAKE["AdamW"](named(model, "abce")).load_state_dict(kept)
    with pytest.raises(ValueError, match="has more than the optimizer: b, c"):
        MAKE["AdamW"](named(model, "a")).load_state_dict(kept)
    with pytest.raises(ValueError, match=r"have \[1, 1\] parameters, the state's \[2, 1\]"):
        MAKE["AdamW"]([{"params": [model.a]}, {"params": [model.c]}]).load_state_dict(kept)
    kept = copy.deepcopy(kept)
    kept["param_groups"][0]["lr"] = 5.0
    merged = MAKE["AdamW"](named(model, "abc"))
    with pytest.raises(ValueError, match="group of a, b, c was saved in groups whose options"):
        merged.load_state_dict(kept)
    assert not merged.state
    split = MAKE["AdamW"](named(model, "a b c"))
    split.load_state_dict(kept)
    assert [g["lr"] for g in split.param_groups] == [5.0, 5.0, 1e-2]
    wrong = copy.deepcopy(kept)
    wrong["state"][0]["exp_avg"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"exp_avg of a parameter of shape \(40, 300\)"):
        split.load_state_dict(wrong)
    foreign = torch.optim.AdamW(named(model, "ab c"))
    foreign.step()
    with pytest.raises(ValueError, match=r"must have 'step' and 'tensor', got .*from_torch"):
        split.load_state_dict(foreign.state_dict())


@pytest.mark.parametrize("wrapped", ("module.{}", "_orig_mod.{}", "module._orig_mod.{}",
                                     "_checkpoint_wrapped_module.{}"))
def test_wrappers_do_not_change_an_id(wrapped):
    model = Model(torch.bfloat16)
    plain = MAKE["AdamW"](model.named_parameters())
    run(model, plain, range(1))
    other = MAKE["AdamW"]([(wrapped.format(n), p) for n, p in model.named_parameters()])
    run(model, other, range(1))
    assert [other.state[p]["tensor"] for p in model.parameters()] == [
        tensor_id(n) for n, _ in model.named_parameters()]
    other.load_state_dict(plain.state_dict())
    own = MAKE["AdamW"]([("module.a", model.a), ("b", model.b)])  # a user's own "module"
    run(model, own, range(1))
    assert own.state[model.a]["tensor"] == tensor_id("module.a")


def test_an_empty_state_loads():
    """accelerate loads one before the first step."""
    model = Model()
    optimizer = MAKE["AdamW"](model.named_parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    clock.set(1)
    run(model, optimizer, range(2))
    assert clock.step.item() == 3 and optimizer.state[model.a]["step"] == 2


def test_load_runs_hooks_and_moves_devices():
    model, calls = Model(), []
    optimizer = MAKE["AdamW"](model.named_parameters(), state_dtype="bf16")
    run(model, optimizer, range(3))
    elsewhere = Model().to("meta")
    other = MAKE["AdamW"](elsewhere.named_parameters())
    other.register_load_state_dict_pre_hook(lambda o, s: calls.append("before"))
    other.register_load_state_dict_post_hook(lambda o: calls.append(len(o.state)))
    other.load_state_dict(optimizer.state_dict())
    assert calls == ["before", 4]
    state = other.state[elsewhere.a]
    assert state["exp_avg"].device.type == "meta" and state["exp_avg"].dtype == torch.bfloat16
    assert state["step"].device.type == "cpu" and state["step"] == 3


@pytest.mark.parametrize("lr", (1e-2, torch.tensor(1e-2)))
@pytest.mark.parametrize("name", MAKE)
def test_the_step_that_checkpoints_take_changes_nothing(name, lr):
    """torch.distributed.checkpoint steps a fresh optimizer with zero gradients at lr 0."""
    for dtype in FLOATS:
        model, plain = Model(dtype), Model(dtype)
        optimizer, other = (MAKE[name](m.named_parameters()) for m in (model, plain))
        for o in (optimizer, other):
            o.param_groups[0]["lr"] = copy.deepcopy(lr)
        clock.set(1)
        state = dcp_state.get_optimizer_state_dict(model, optimizer)
        assert clock.step.item() == 1 and optimizer.param_groups[0]["lr"] == lr
        assert all(s["step"] == 0 for s in state["state"].values())
        assert all(map(same_bits, model.state_dict().values(), plain.state_dict().values()))
        run(model, optimizer, range(3))
        assert clock.step.item() == 4
        run(plain, other, range(3))
        assert_same(model, optimizer, plain, other)


@pytest.mark.parametrize("lr", (1e-2, torch.tensor(1e-2)))
@pytest.mark.parametrize("make", (
    torch.optim.SGD,  # has no state, so every save takes such a step
    lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), torch.optim.AdamW,
    lambda p, lr: lowp.optim.GaLore(p, lowp.optim.AdamW, lr, rank=50),  # wraps all as they are
), ids=("SGD", "momentum", "AdamW", "GaLore"))
def test_the_step_that_checkpoints_take_does_not_move_the_clock(make, lr):
    """Nor of optimizers that are not ours: layers draw by it."""
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters(), copy.deepcopy(lr))
    clock.set(5)
    dcp_state.get_optimizer_state_dict(model, optimizer)
    assert clock.step.item() == 5
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert clock.step.item() == 6
    optimizer.zero_grad()
    dcp_state.get_optimizer_state_dict(model, optimizer)
    assert clock.step.item() == 6
    optimizer.step()  # as gradient release leaves it: nothing to update
    assert clock.step.item() == 7


def test_an_idle_step_of_sparse_gradients_counts():
    """Whether they are 0 is not looked at."""
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.0)
    optimizer.step()
    assert clock.step.item() == 2


def test_a_first_step_at_lr_0_counts_if_it_has_gradients():
    """A warm-up begins at 0."""
    model = Model()
    optimizer = MAKE["AdamW"](model.named_parameters())
    optimizer.param_groups[0]["lr"] = 0.0
    clock.set(1)
    run(model, optimizer, range(1))
    assert optimizer.state[model.a]["step"] == 1 and clock.step.item() == 2
    assert optimizer.state[model.a]["exp_avg"].abs().sum() > 0


@pytest.mark.parametrize("state", ("fp32", "bf16", "int8"))
@pytest.mark.parametrize("name", ("AdamW", "AMSGrad", "SGD"))
def test_conversion_from_and_to_torch(name, state):
    """fp32 states come over exactly and go on as torch does; others are rounded once."""
    model, theirs = Model(), Model()
    options = {"AMSGrad": {"amsgrad": True}, "SGD": {"momentum": 0.9}}.get(name, {})
    cls = torch.optim.SGD if name == "SGD" else torch.optim.AdamW
    foreign = cls(theirs.named_parameters(), lr=1e-2, **options)
    run(theirs, foreign, range(5))
    model.load_state_dict(theirs.state_dict())
    optimizer = getattr(lowp.optim, cls.__name__)(named(model, "ceba"), state_dtype=state)
    optimizer.load_state_dict(lowp.optim.from_torch(optimizer, foreign.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 1e-2
    back = lowp.optim.to_torch(optimizer)
    fresh = cls(named(model, "ceba"))
    fresh.load_state_dict(back)
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        for key, value in foreign.state[q].items():
            want = value
            if state == "bf16" and key != "step":
                want = value.bfloat16().float()
            if state == "int8" and p.numel() > 4096 and key in ("exp_avg", "momentum_buffer"):
                want = decode(*encode(value, True))
            if state == "int8" and p.numel() > 4096 and key == "exp_avg_sq":
                want = decode(*encode(value.sqrt(), False)) ** 2
            assert same_bits(fresh.state[p][key], want), key
    if state == "fp32":
        run(theirs, foreign, range(5, 10))
        run(model, optimizer, range(5, 10))
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            # five steps, each of which rounds the weight once and an update below 0.5 ten times
            bound = 5 * 2.0**-24 * (q.abs() + 10 * 0.5)
            assert ((p - q).abs() <= bound).all()


def test_conversion_refuses_what_torch_does_not_have():
    class Other(lowp.optim.AdamW):
        pass

    optimizer = Other(Model().parameters())
    message = r"only states of Adam, AdamW, SGD .*got lowp.optim.Other"
    with pytest.raises(TypeError, match=message):
        lowp.optim.to_torch(optimizer)
    with pytest.raises(TypeError, match=message):
        lowp.optim.from_torch(optimizer, {})


def test_bad_files_are_refused(tmp_path):
    optimizer = MAKE["AdamW"](Model().named_parameters())
    path = tmp_path / "state.safetensors"
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"must be a file of save_state: it has no 'lowp.optim'"):
        lowp.optim.load_state(optimizer, path)
    lowp.optim.save_state(optimizer, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must be a file of save_state"):
        lowp.optim.load_state(optimizer, path)
    with pytest.raises(FileNotFoundError):
        lowp.optim.load_state(optimizer, tmp_path / "none")
    with pytest.raises(OSError):
        lowp.optim.save_state(optimizer, tmp_path / "none" / "state.safetensors")


SAVER = """
import os, sys, torch, lowp
p = torch.zeros(512, 2048, requires_grad=True)
optimizer = lowp.optim.AdamW([p])
p.grad = torch.ones_like(p)
while True:
    optimizer.step()
    lowp.optim.save_state(optimizer, sys.argv[1])
    print(int(optimizer.state[p]["step"]), flush=True)
"""


def test_kill_9_inside_a_save_keeps_the_last(tmp_path):
    """A process that does nothing but save is killed 3 times; what it said it saved is there."""
    path = tmp_path / "state.safetensors"
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(path)], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        said = [int(process.stdout.readline()) for _ in range(2)]
        time.sleep(0.005 + 0.011 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        said += [int(line) for line in process.stdout]
        process.wait(timeout=60)
        p = torch.zeros(512, 2048, requires_grad=True)
        optimizer = lowp.optim.AdamW([p])
        lowp.optim.load_state(optimizer, path)
        assert optimizer.state[p]["step"] in (said[-1], said[-1] + 1)
        assert optimizer.state[p]["exp_avg"].unique().numel() == 1
    lowp.optim.save_state(optimizer, path)
    assert list(tmp_path.iterdir()) == [path]  # nothing is left of the killed ones


@pytest.mark.parametrize("name", MAKE)
def test_empty_tensors_skip_nobody(name):
    for order in ("ae", "ea"):
        model, plain = Model(torch.bfloat16), Model(torch.bfloat16)
        run(model, MAKE[name](named(model, order)), range(5))
        run(plain, MAKE[name](named(plain, "a")), range(5))
        assert same_bits(model.a.detach(), plain.a.detach())
