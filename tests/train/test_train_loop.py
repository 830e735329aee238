"""The loop against a plain one written out by hand, and what its settings do."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError, TrainingError, UsageError
from lorakit.train.config import TrainConfig
from lorakit.train.loop import Hooks, Trainer, total_steps
from lorakit.train.loss import IGNORE, LossSum, Objective, custom_objective, objective_for
from lorakit.train.schedule import factor, warmup_steps


def values(trainer):
    return [parameter.detach().clone() for parameter in trainer.parameters]


def equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def plain_rate(config, step, total):
    """Warm-up and decay as the paper's recipes state them: the rate of the 1-based step."""
    warm = math.ceil(config.warmup * total)
    if step <= warm:
        return config.lr * step / warm
    done = (step - 1 - warm) / (total - warm)
    return (
        config.lr * {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[config.schedule]
    )


def plain_loop(trainer, config, batches, steps):
    """The same steps without the trainer: full logits, mean cross-entropy, torch's AdamW."""
    optimizer = torch.optim.AdamW(trainer.parameters, lr=config.lr, weight_decay=config.weight_decay)
    trainer.model.train()
    stream = (batch for epoch in range(9) for batch in batches.make(epoch, 0))
    for step in range(1, steps + 1):
        batch = next(stream)
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, tiny.VOCAB), batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORE,
            label_smoothing=config.label_smoothing,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(trainer.parameters, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = plain_rate(config, step, steps)
        optimizer.step()


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "linear"},
        {"schedule": "cosine", "weight_decay": 0.1},
        {"schedule": "constant", "clip": None},
        {"clip": 1e-3},
        {"label_smoothing": 0.2},
        {"warmup": 0.0},
    ],
    ids=str,
)
def test_the_loop_is_a_plain_loop(make_trainer, rows, changes):
    config = replace(TrainConfig(max_steps=7, epochs=9, batch_size=4, lr=5e-3, warmup=0.3), **changes)
    ours, plain = make_trainer(config), make_trainer(config)
    ours.run()
    plain_loop(plain, config, rows(20, 4), 7)
    for one, other in zip(ours.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)
    assert not equal(values(ours), values(make_trainer(config)))


def test_accumulation_gives_the_gradient_of_the_whole_batch(make_trainer, rows):
    """Rows of unequal length: a mean of the batches' means would differ."""
    found = []
    for batch_size, accumulate in ((8, 1), (4, 2), (1, 8)):
        trainer = make_trainer(
            TrainConfig(max_steps=1, batch_size=batch_size, accumulate=accumulate, clip=None),
            batches=rows(8, batch_size),
        )
        trainer.model.train()
        trainer._backward(list(trainer.batches.make(0, 0)), 1.0)
        found.append([parameter.grad for parameter in trainer.parameters])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_rows_of_metrics_tell_the_rate_and_the_mean_loss(make_trainer, rows):
    seen = []
    config = TrainConfig(max_steps=4, batch_size=4, lr=1e-2, warmup=2, log_every=1)
    trainer = make_trainer(config, hooks=Hooks(row=seen.append))
    trainer.run()
    assert [row["step"] for row in seen] == [1, 2, 3, 4]
    assert [row["lr"] for row in seen] == [5e-3, 1e-2, 1e-2, 5e-3]
    model = tiny.llama()
    batch = next(rows(20, 4).make(0, 0))
    assert seen[0]["loss"] == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("epochs", "batches", "accumulate", "max_steps", "steps"),
    [
        (1.1, 10, 1, None, 11),
        (0.5, 5, 1, None, 3),
        (2, 5, 2, None, 6),
        (1, 3, 1, 2, 2),
        (0.01, 3, 1, None, 1),
        (3, 1, 4, None, 3),
    ],
)
def test_how_many_steps(epochs, batches, accumulate, max_steps, steps):
    config = TrainConfig(epochs=epochs, accumulate=accumulate, max_steps=max_steps)
    assert total_steps(config, batches) == steps


def test_a_fraction_of_an_epoch_stops_inside_it(make_trainer):
    trainer = make_trainer(TrainConfig(epochs=1.5, batch_size=4))
    state = trainer.run()
    assert (state.step, state.epoch, state.batch, state.examples) == (8, 1, 3, 20 + 12)


def test_warmup_in_steps_and_a_share():
    assert warmup_steps(TrainConfig(warmup=3), 100) == 3
    assert warmup_steps(TrainConfig(warmup=0.1), 25) == 3
    config = TrainConfig(warmup=0, schedule="linear")
    assert [factor(config, step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


# -- evaluation and what is kept


class Scripted:
    """Evaluations with given values; notes the parameters at each."""

    def __init__(self, values):
        self.values, self.seen, self.trainer = list(values), [], None

    def __call__(self):
        self.seen.append(values(self.trainer))
        assert not self.trainer.model.training
        return {"loss": 1.0, "score": self.values[len(self.seen) - 1]}


@pytest.mark.parametrize(("higher", "best"), [(True, 2), (False, 1)])
def test_the_best_adapter_is_kept(make_trainer, higher, best):
    script = Scripted([1.0, 0.5, 2.0, 2.0, 1.5, 0.7])
    hooks = Hooks(evaluate=script, higher_is_better=lambda name: higher)
    trainer = script.trainer = make_trainer(
        TrainConfig(max_steps=6, epochs=9, batch_size=4, eval_every=1, best_metric="score"), hooks=hooks
    )
    state = trainer.run()
    assert state.best_step == best + 1  # the first of equals
    assert equal(values(trainer), script.seen[best])
    assert not equal(values(trainer), script.seen[-1])


def test_keep_last_keeps_the_last(make_trainer):
    script = Scripted([5.0, 1.0, 1.0])
    trainer = script.trainer = make_trainer(
        TrainConfig(max_steps=3, batch_size=4, eval_every=1, best_metric="score", keep="last"),
        hooks=Hooks(evaluate=script),
    )
    state = trainer.run()
    assert equal(values(trainer), script.seen[-1])
    assert state.best_step == 1


def test_evaluation_happens_after_each_epoch_and_at_the_end(make_trainer):
    steps = []
    hooks = Hooks(
        evaluate=lambda: {"loss": 1.0}, row=lambda row: steps.append(row["step"]) if "eval_loss" in row else None
    )
    make_trainer(TrainConfig(epochs=2.5, batch_size=4), hooks=hooks).run()
    assert steps == [5, 10, 13]


def test_a_metric_that_is_not_measured(make_trainer):
    trainer = make_trainer(TrainConfig(max_steps=1, best_metric="f1"), hooks=Hooks(evaluate=lambda: {"loss": 1.0}))
    with pytest.raises(UsageError, match="best_metric is 'f1', but the evaluation gives loss"):
        trainer.run()


def test_save_every(make_trainer):
    saved = []
    hooks = Hooks(checkpoint=lambda trainer: saved.append(trainer.state.step))
    make_trainer(TrainConfig(max_steps=7, epochs=2, batch_size=4, save_every=3), hooks=hooks).run()
    assert saved == [3, 6, 7]


# -- precision, checkpointing, seeds


@pytest.mark.filterwarnings("ignore:this CPU has no bf16")
def test_bf16_trains_and_leaves_the_forward_as_it_was(make_trainer):
    trainer = make_trainer(TrainConfig(max_steps=2, batch_size=4, precision="bf16"))
    model, batch = trainer.model, tiny.batch(tiny.llama())
    dtypes = set()
    model.lm_head.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    trainer.run()
    assert dtypes == {torch.bfloat16}
    assert "forward" not in model.__dict__
    assert "_original_forward" not in model.__dict__
    dtypes.clear()
    model(**batch)
    assert dtypes == {torch.float32}
    lk.detach(model, "default")
    assert torch.equal(model(**batch).logits, tiny.llama()(**batch).logits)


@pytest.mark.filterwarnings("ignore:this CPU has no bf16")
def test_an_error_leaves_the_forward_as_it_was_too(make_trainer):
    def broken(model, batch):
        raise RuntimeError("mine")

    trainer = make_trainer(TrainConfig(max_steps=2, precision="bf16"), objective=custom_objective(broken))
    with pytest.raises(RuntimeError, match="mine"):
        trainer.run()
    assert "forward" not in trainer.model.__dict__
    assert not trainer.model.training


def test_a_forward_that_was_there_before_comes_back(make_trainer):
    model = tiny.llama()
    own = model.forward
    model.forward = own
    make_trainer(TrainConfig(max_steps=1), model=model).run()
    assert model.__dict__["forward"] is own


def test_bf16_on_a_cpu_without_it_warns(make_trainer, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # AVX-512 alone is not enough
    with pytest.warns(UserWarning, match="no bf16 arithmetic"):
        make_trainer(TrainConfig(precision="bf16"))


def test_fp16_needs_a_gpu(make_trainer):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        make_trainer(TrainConfig(precision="fp16"))


def test_gradient_checkpointing_changes_nothing(make_trainer):
    ours = make_trainer(TrainConfig(max_steps=3, batch_size=4, gradient_checkpointing=True), dropout=0.3)
    plain = make_trainer(TrainConfig(max_steps=3, batch_size=4), dropout=0.3)
    torch.manual_seed(3)
    ours.run()
    torch.manual_seed(3)
    plain.run()
    for one, other in zip(ours.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(one, other)


def test_checkpointing_of_a_model_without(make_trainer):
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    with pytest.raises(UsageError, match="ModuleDict has no gradient checkpointing"):
        make_trainer(TrainConfig(gradient_checkpointing=True), model=model)


def test_nothing_to_train():
    with pytest.raises(UsageError, match="nothing to train"):
        Trainer(tiny.llama(), [], None, None, TrainConfig())


# -- numbers that are none


def bad_at(step, *, gradient=False):
    """The task's loss, but NaN (or with a NaN gradient) in the batch of a step."""
    inner, calls = objective_for("causal-lm"), []

    def loss(model, batch):
        calls.append(1)
        part = inner.loss(model, batch)
        if len(calls) != step:
            return part
        if gradient:  # finite forward, infinite slope at 0
            zero = (part.total * 0).abs()
            return LossSum(part.total + zero.sqrt() * 0, part.targets)
        return LossSum(part.total * math.nan, part.targets)

    return Objective(loss, inner.targets)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_nan_loss_stops_with_the_last_good_adapter(make_trainer, step):
    config = TrainConfig(max_steps=9, epochs=9, batch_size=4, schedule="constant", warmup=0)
    trainer = make_trainer(config, objective=bad_at(step))
    with pytest.raises(TrainingError, match=f"loss is nan at step {step}"):
        trainer.run()
    steps = max(0, step - 2)  # the values of which a loss was measured last
    if steps:
        good = make_trainer(replace(config, max_steps=steps))
        good.run()
    else:
        good = make_trainer(config)
    assert equal(values(trainer), values(good))
    assert all(parameter.grad is None for parameter in trainer.parameters)


@pytest.mark.parametrize("step", [1, 3])
def test_a_nan_gradient_stops_before_it_is_applied(make_trainer, step):
    config = TrainConfig(max_steps=9, epochs=9, batch_size=4, schedule="constant", warmup=0)
    trainer = make_trainer(config, objective=bad_at(step, gradient=True))
    with pytest.raises(TrainingError, match=f"gradient's norm is nan at step {step}"):
        trainer.run()
    good = make_trainer(replace(config, max_steps=step - 1) if step > 1 else config)
    if step > 1:
        good.run()
    assert equal(values(trainer), values(good))


def test_a_nan_loss_keeps_the_best(make_trainer):
    script = Scripted([1.0, 3.0, 2.0])
    trainer = script.trainer = make_trainer(
        TrainConfig(max_steps=9, epochs=9, batch_size=4, eval_every=1, best_metric="score"),
        objective=bad_at(4),
        hooks=Hooks(evaluate=script, higher_is_better=lambda name: True),
    )
    with pytest.raises(TrainingError, match=r"step 4 .*the best adapter so far \(step 2\)"):
        trainer.run()
    assert equal(values(trainer), script.seen[1])


def test_a_nan_eval_loss_stops(make_trainer):
    trainer = make_trainer(TrainConfig(max_steps=5, eval_every=2), hooks=Hooks(evaluate=lambda: {"loss": math.nan}))
    with pytest.raises(TrainingError, match="eval loss is nan after step 2"):
        trainer.run()


def test_a_huge_rate_ends_in_an_error_with_a_finite_adapter(make_trainer):
    trainer = make_trainer(TrainConfig(max_steps=9, epochs=9, lr=1e30, warmup=0, clip=None))
    with pytest.raises(TrainingError, match=r"at step \d+ \(learning rate \S+e\+29\)"):
        trainer.run()
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.parameters)


def test_out_of_memory_says_what_helps(make_trainer):
    def greedy(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    trainer = make_trainer(objective=custom_objective(greedy))
    with pytest.raises(TrainingError, match=r"out of memory at step 1 .*smaller train\.batch_size"):
        trainer.run()


# -- settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"lr": 0}, {"lr": math.nan}, {"batch_size": 0}, {"accumulate": 0}, {"max_steps": 0}, {"warmup": -1},
        {"label_smoothing": 1}, {"clip": 0}, {"beta1": 1}, {"schedule": "step"}, {"precision": "int8"}, {"keep": "all"},
        {"save_every": 0}, {"log_every": 0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(LorakitError, match=rf"train\.{next(iter(wrong))}"):
        TrainConfig(**wrong)


def test_a_launchers_accumulation_does_not_divide_the_loss(make_trainer, monkeypatch):
    found = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        rows = []
        make_trainer(TrainConfig(max_steps=1, batch_size=4), hooks=Hooks(row=rows.append)).run()
        found.append(rows[0]["grad_norm"])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["epochs", "lr", "warmup", "weight_decay", "prefix_memory"])
def test_infinite_settings_are_refused(name):
    with pytest.raises(UsageError, match=f"train.{name} must be a finite number"):
        TrainConfig(**{name: float("inf")})
