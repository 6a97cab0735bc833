"""The optimizers as their users have them: torch.compile, transformers, accelerate, Lightning."""

from __future__ import annotations

import copy

import accelerate
import lightning
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lowp
from lowp.key import clock
from tests.tensors import same_bits

MAKE = {
    "AdamW": lambda params, lr, **k: lowp.optim.AdamW(params, lr=lr, weight_decay=0.1, **k),
    "SGD": lambda params, lr, **k: lowp.optim.SGD(params, lr=lr, momentum=0.9, **k),
}
SCHEDULES = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 100),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=120),  # cycles betas, too
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


def params_of():
    shapes = (((30, 200), torch.bfloat16), ((90,), torch.float32), ((), torch.float16))
    return [torch.randn(s, generator=torch.Generator().manual_seed(i)).to(d).requires_grad_()
            for i, (s, d) in enumerate(shapes)]


def step_schedule(schedule):
    schedule.step(1.0) if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else schedule.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # b_step is unwrapped
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("lr", (0.01, torch.tensor(0.01)), ids=("float", "tensor"))
@pytest.mark.parametrize("name", MAKE)
def test_a_compiled_step_neither_breaks_nor_recompiles(name, lr, schedule):
    """fullgraph, 100 steps of a schedule: no compilation after the warm-up, and eager's bits."""
    torch._dynamo.reset()
    eager, compiled = params_of(), params_of()
    a = MAKE[name](eager, copy.deepcopy(lr), state_dtype="int8")
    b = MAKE[name](compiled, copy.deepcopy(lr), state_dtype="int8")
    b_step = torch.compile(b.step, fullgraph=True, backend="aot_eager")  # before it is scheduled
    schedules = [SCHEDULES[schedule](o) for o in (a, b)]
    for step in range(100):
        for i, (p, q) in enumerate(zip(eager, compiled, strict=True)):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            q.grad = p.grad.clone()
        a.step()
        with torch._dynamo.config.patch(error_on_recompile=step >= 4):
            b_step()
        for s in schedules:
            step_schedule(s)
    assert a.param_groups[0]["lr"] != pytest.approx(0.01)
    assert all(map(same_bits, [p.detach() for p in eager], [q.detach() for q in compiled]))


def test_a_compiled_step_counts_after_the_empty_one_of_a_checkpoint():
    torch._dynamo.reset()
    model = nn.Linear(3, 2)
    optimizer = lowp.optim.SGD(model.named_parameters(), lr=0.5)
    dcp_state.get_optimizer_state_dict(model, optimizer)
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for count in (1, 2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        step()
        assert optimizer.state[model.bias]["step"] == count and clock.step.item() == 1 + count


def test_a_scheduled_step_by_inductor():
    """The step of a scheduled optimizer, in a function that a user compiles."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = nn.Sequential(lowp.Linear(32, 48, precision="int8", name="0"), nn.ReLU(),
                          lowp.Linear(48, 4, precision="bf16", name="2"))
    compiled = copy.deepcopy(eager)
    optimizers = [lowp.optim.AdamW(m.parameters(), lr=1e-2) for m in (eager, compiled)]
    schedules = [SCHEDULES["cosine"](o) for o in optimizers]

    @torch.compile
    def update():
        optimizers[1].step()

    for step in range(1, 9):
        x = torch.randn(16, 32)
        for model, optimizer, run in ((eager, optimizers[0], optimizers[0].step),
                                      (compiled, optimizers[1], update)):
            clock.set(step)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            with torch._dynamo.config.patch(error_on_recompile=step >= 4):
                run()
        for s in schedules:
            s.step()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())


class Tokens(Dataset):
    """Random token sequences, the same every time."""

    def __init__(self, count=64):
        generator = torch.Generator().manual_seed(5)
        self.rows = torch.randint(0, 64, (count, 12), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def language_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2,
                                     bos_token_id=0, eos_token_id=0, attn_pdrop=0.0,
                                     embd_pdrop=0.0, resid_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config)
    return lowp.convert(model, "int8", filter_fn=lambda m, fqn: "lm_head" not in fqn).bfloat16()


def fresh_processes():
    """accelerate keeps its state for the life of a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def same_models(a, b):
    return all(same_bits(p.detach(), q.detach())
               for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_transformers_trainer(tmp_path):
    """Clipping, a warm-up from lr 0, and a resume from a checkpoint in the middle."""

    def train(folder, resume=None):
        fresh_processes()
        clock.set(1)
        model = language_model()
        optimizer = MAKE["AdamW"](model.named_parameters(), 1e-2, state_dtype="int8")
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=12, per_device_train_batch_size=8, save_steps=6,
            max_grad_norm=0.5, logging_strategy="no", report_to=[], use_cpu=True, seed=3,
            disable_tqdm=True)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, 12)
        trainer = transformers.Trainer(model, arguments, train_dataset=Tokens(),
                                       optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=resume)
        assert clock.step.item() == 13
        assert {s["step"].item() for s in optimizer.state.values()} == {12.0}
        return model

    straight = train(tmp_path / "straight")
    assert not same_models(straight, language_model())
    resumed = train(tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint-6"))
    assert same_models(straight, resumed)


def test_accelerate(tmp_path):
    """prepare, accumulation, clipping, a schedule, save_state and load_state."""

    def train(steps, folder=None, load=False):
        fresh_processes()
        clock.set(1)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = language_model()
        optimizer = MAKE["AdamW"](model.named_parameters(), 1e-2, state_dtype="int8")
        schedule = lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        if load:
            accelerator.load_state(folder)
        for step in steps:
            batch = {k: v[None] for k, v in Tokens()[step].items()}
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if folder is not None and not load:
            accelerator.save_state(folder)
        return accelerator.unwrap_model(model)

    straight = train(range(16))
    train(range(8), tmp_path / "saved")
    resumed = train(range(8, 16), tmp_path / "saved", load=True)
    assert clock.step.item() == 9
    assert same_models(straight, resumed)
    assert not same_models(straight, language_model())


class Module(lightning.LightningModule):
    """A converted model whose optimizer and schedule Lightning drives."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = lowp.convert(nn.Sequential(nn.Linear(8, 80), nn.GELU(), nn.Linear(80, 60),
                                                nn.Linear(60, 1)), "int8").bfloat16()

    def training_step(self, batch, index):
        x, y = batch
        return (self.model(x.bfloat16()).float() - y).square().mean()

    def configure_optimizers(self):
        optimizer = MAKE["AdamW"](self.named_parameters(), 1e-2, state_dtype="int8")
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_lightning(tmp_path):
    """Its closures, clipping and schedule; resumed from its checkpoint."""
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(torch.randn(48, 8, generator=generator),
                         torch.randn(48, 1, generator=generator))

    def train(folder, resume=None):
        clock.set(1)
        module = Module()
        every_epoch = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1,
                                      save_on_train_epoch_end=True)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, callbacks=[every_epoch],
            enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.5,
            default_root_dir=folder)
        trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=resume, weights_only=True)
        assert clock.step.item() == 13
        return module

    straight = train(tmp_path / "straight")
    resumed = train(tmp_path / "resumed", tmp_path / "straight" / "epoch=0.ckpt")
    assert same_models(straight, resumed)
    assert not same_models(straight, Module())
