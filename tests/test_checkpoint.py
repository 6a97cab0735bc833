"""Checkpoints keep every bit, and no failure on the way costs the one before."""

from __future__ import annotations

import ast
import errno
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowp.hybrid import checkpoint
from lowp.hybrid.checkpoint import CheckpointError
from tests.tensors import random_bits

FILES = (checkpoint.STATE, checkpoint.TENSORS, checkpoint.MANIFEST)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
          torch.int16, torch.int8, torch.uint8, torch.bool)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: Any, b: Any) -> None:
    """Equal types, values and bits, all the way down."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float):
        assert a.hex() == b.hex()
    else:
        assert a == b


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((300,), float(step)), "group": {0: (0.9, step)}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints, of steps 10 and 20."""
    for step in (10, 20):
        checkpoint.save(tmp_path / "checkpoint", step, state_of(step), keep=5)
    return tmp_path / "checkpoint"


def test_every_dtype_and_bit_comes_back(tmp_path: Path) -> None:
    bits = random_bits(4099)  # every exponent and NaN payloads
    tensors: dict[str, Any] = {}
    for dtype in DTYPES:
        size = torch.empty((), dtype=dtype).element_size()
        content = bits.view(torch.uint8)[: 4099 * 4 // size * size]
        full = content.remainder(2).bool() if dtype == torch.bool else content.view(dtype)
        tensors[str(dtype)] = {
            "full": full, "scalar": full[3], "empty": full[:0], "no rows": full[:0].view(0, 7),
            "every second": full[::2], "transposed": full[:12].view(3, 4).t(),
        }
    path = checkpoint.save(tmp_path, 1, {"tensors": tensors})
    assert_same(checkpoint.load(path), {"tensors": tensors})


def test_every_container_and_number_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "": [None, True, 0, -1, 2**200, "text\u2028\x00\U0001f600", ()],
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
        "integer keys": {0: {"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}, 7: {}},
        "$tensor": {"$float": "not a tag"},
        "a/b": shared, "a": {"b": shared, "view": shared[2:4], "tied": shared},
        "requires grad": torch.ones(2).requires_grad_().detach(),
        "keys": {(1, None): [torch.tensor(2)], 1.5: {}},
    }
    assert_same(checkpoint.load(checkpoint.save(tmp_path, 0, state)), state)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j, torch.float32,
                                   torch.eye(2).to_sparse()])
def test_what_cannot_be_stored_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="inner/1"):
        checkpoint.save(tmp_path / "none", 1, {"inner": [0, value]})
    assert not (tmp_path / "none").exists()


def test_the_last_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, state_of(step), keep=3)
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [5, 4, 3]
    with pytest.raises(ValueError, match="keep >= 1"):
        checkpoint.save(tmp_path, 6, {}, keep=0)


class FailingCalls:
    """Makes the n-th call of the system functions that a save uses fail as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
        self.calls = 0
        self.fail_at = fail_at
        for name in ("open", "write", "fsync", "rename"):
            monkeypatch.setattr(checkpoint.os, name, self._wrap(getattr(os, name)))
        monkeypatch.setattr(checkpoint, "save_file", self._wrap(checkpoint.save_file))

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **options)

        return call


def test_a_failure_at_any_call_leaves_the_last_good_one(root: Path) -> None:
    fail_at = 0
    while True:
        fail_at += 1
        with pytest.MonkeyPatch.context() as patch:
            FailingCalls(patch, fail_at)
            try:
                checkpoint.save(root, 30, state_of(30), keep=1)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                break
        restored = checkpoint.restore(root)
        # The last call syncs a rename that has happened: then the new one is there, and whole.
        assert restored.step in (20, 30)
        assert_same(restored.state, state_of(restored.step))
        assert len(checkpoint.checkpoints(root)) >= 2, "older ones are removed only after success"
        if restored.step == 30:
            shutil.rmtree(restored.path)
    assert fail_at >= 12, "open, write and sync of three files and two directories, and a rename"
    assert_same(checkpoint.restore(root).state, state_of(30))
    checkpoint.save(root, 40, state_of(40), keep=1)
    assert [p.name for p in root.iterdir()] == ["step-00000040"], "and nothing is left behind"


def _save_where_it_cannot_fit(root: Path) -> None:
    with pytest.raises(OSError):
        checkpoint.save(root, 30, {"large": torch.zeros(1 << 18)})  # 1 MiB
    restored = checkpoint.restore(root)
    assert restored.step == 20
    assert_same(restored.state, state_of(20))
    checkpoint.save(root, 40, state_of(40))
    assert checkpoint.restore(root).step == 40


def test_a_file_that_cannot_grow(root: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, hard))
    try:
        _save_where_it_cannot_fit(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root; the same errors are injected above")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full(small_disk: Path) -> None:
    for step in (10, 20):
        checkpoint.save(small_disk / "checkpoint", step, state_of(step))
    _save_where_it_cannot_fit(small_disk / "checkpoint")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flip,
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": Path.unlink,
    "a link": link,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen_and_the_one_before_is_used(root: Path, name: str, damage: str) -> None:
    newest = root / "step-00000020"
    DAMAGES[damage](newest / name)
    with pytest.raises(CheckpointError, match=r"step-00000020"):
        checkpoint.load(newest)
    with pytest.warns(RuntimeWarning, match="step-00000020 is skipped"):
        restored = checkpoint.restore(root)
    assert restored.step == 10
    assert_same(restored.state, state_of(10))
    with pytest.warns(RuntimeWarning, match="step-00000020 is skipped"):
        assert checkpoint.latest(root) == root / "step-00000010"
    assert_same(checkpoint.load(checkpoint.save(root, 20, state_of(20))), state_of(20))


def test_none_left_is_an_error_that_says_why(root: Path, tmp_path: Path) -> None:
    for path in checkpoint.checkpoints(root):
        flip(path / checkpoint.TENSORS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(CheckpointError, match=r"no whole checkpoint.*SHA-256.*SHA-256"):
            checkpoint.restore(root)
        assert checkpoint.latest(root) is None
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        checkpoint.restore(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "sub/file",
                                  "..", "state.json/.."])
def test_a_manifest_cannot_lead_out(root: Path, name: str) -> None:
    path = root / "step-00000020"
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = manifest["files"][checkpoint.STATE]
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="out of the checkpoint"):
        checkpoint.load(path)


def test_links_and_other_files_are_refused(root: Path) -> None:
    linked = root / "step-00000099"
    linked.symlink_to("step-00000020")
    with pytest.raises(CheckpointError, match="not a link"):
        checkpoint.load(linked)
    renamed = root / "step-00000098"
    shutil.copytree(root / "step-00000020", renamed)
    with pytest.raises(CheckpointError, match="is of step 20"):
        checkpoint.load(renamed)
    with pytest.raises(CheckpointError, match="not named as a checkpoint"):
        checkpoint.load(root)


def test_unfinished_writes_are_ignored_and_cleared(root: Path) -> None:
    unfinished = root / ".writing-step-00000030-1"
    shutil.copytree(root / "step-00000020", unfinished)
    assert checkpoint.restore(root).step == 20
    checkpoint.save(root, 40, state_of(40))
    assert not unfinished.exists()


def test_a_step_that_is_saved_again_replaces_nothing_whole(root: Path) -> None:
    again = {**state_of(20), "other": 1}
    path = checkpoint.save(root, 20, again, keep=5)
    assert_same(checkpoint.load(root / "step-00000020"), state_of(20))
    assert checkpoint.restore(root).path == path
    assert_same(checkpoint.restore(root).state, again)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_of_many_saves_of_a_step_is_the_one_kept(tmp_path: Path, keep: int) -> None:
    """Pruning frees the names of the oldest; a new checkpoint must not take one of them."""
    for part in range(1, 13):
        path = checkpoint.save(tmp_path, 3, {"part": part}, keep=keep)
        assert checkpoint.load(path) == {"part": part}
        assert checkpoint.restore(tmp_path).path == path
        assert len(checkpoint.checkpoints(tmp_path)) == min(part, keep)
    (path / "state.json").write_text("{}")
    assert checkpoint.load(checkpoint.save(tmp_path, 3, {"part": 13}, keep=keep)) == {"part": 13}


def test_mutated_files_raise_nothing_else(root: Path) -> None:
    """Files whose hashes were forged to fit: what is parsed is refused cleanly or is plain data."""
    chance = random.Random(0)
    path = root / "step-00000020"
    original = {name: (path / name).read_bytes() for name in FILES}
    refused = 0
    for _ in range(400):
        name = chance.choice(FILES[:2])
        content = bytearray(original[name])
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(min(len(content), 200))] = chance.randrange(256)
        (path / name).write_bytes(content)
        manifest = json.loads(original[checkpoint.MANIFEST])
        manifest["files"][name] = {"bytes": len(content), "sha256": checkpoint._digest(path / name)}
        (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        try:
            checkpoint.load(path)
        except CheckpointError:
            refused += 1
        (path / name).write_bytes(original[name])
    assert refused > 100


def test_nothing_pickled_is_ever_read() -> None:
    """No module of the loop imports pickle or calls torch.load or torch.save."""
    for file in Path(checkpoint.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [f"{node.value.id}.{node.attr}"]
            bad = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "torch.load", "torch.save"}
            assert not bad & set(names), f"{file.name}: {names}"


def test_a_checkpoint_needs_no_code_of_ours(root: Path) -> None:
    """Another program reads the tensors with safetensors and the rest as JSON."""
    script = (
        "import json, sys; from safetensors import safe_open; p = sys.argv[1]; "
        "f = safe_open(p + '/tensors.safetensors', 'pt'); s = json.load(open(p + '/state.json')); "
        "print(sorted(f.keys()), s['step'], float(f.get_tensor('weight')[0]))"
    )
    path = str(root / "step-00000020")
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.stdout.strip() == "['weight'] 20 20.0", done.stderr
