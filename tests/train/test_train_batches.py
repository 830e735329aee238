"""The shape of a batch changes nothing: not the loss, not the gradient; and no example of a packed row sees another."""

import math
import random

import pytest
import tiny
import torch

import lorakit as lk
from lorakit.data import IGNORE, Encoded, collate
from lorakit.data.batch import TokenOrder
from lorakit.data.pack import SEGMENTS, collate_packed, counts, pack_rows
from lorakit.errors import UsageError
from lorakit.train import packed as packed_module
from lorakit.train.config import TrainConfig
from lorakit.train.loop import Trainer
from lorakit.train.loss import custom_objective, objective_for
from lorakit.train.packed import packed_objective, packing_for

TEXT, CLASSES = "causal-lm", "sequence-classification"


def causal_classifier(kind, **changes):
    import transformers

    config = getattr(tiny, kind)(**changes).config
    config.num_labels = tiny.LABELS
    name = {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}[kind]
    torch.manual_seed(tiny.SEED)
    return getattr(transformers, name)(config).eval()


MODELS = {
    "llama": (tiny.llama, TEXT, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (tiny.gpt2, TEXT, ["c_attn", "c_proj"]),
    "opt": (tiny.opt, TEXT, ["q_proj", "fc2"]),
    "bert": (tiny.bert, CLASSES, ["query", "value", "dense"]),
    "roberta": (tiny.roberta, CLASSES, ["query", "value"]),
    "llama-classes": (lambda **k: causal_classifier("llama", **k), CLASSES, ["q_proj", "down_proj"]),
    "gpt2-classes": (lambda **k: causal_classifier("gpt2", **k), CLASSES, ["c_attn"]),
}


def rows_for(task, count=8, *, types=False, seed=5):
    """Unequal examples, half of their tokens without loss; token types where the model has them."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        ids = [draw.randint(3, tiny.VOCAB - 1) for _ in range(draw.randint(2, 21))]
        labels = [IGNORE if place < len(ids) // 2 else one for place, one in enumerate(ids)]
        kinds = [int(place > len(ids) // 3) for place in range(len(ids))] if types else None
        rows.append(Encoded(ids, labels if task == TEXT else number % tiny.LABELS, number, kinds))
    return rows


class Case:
    """A model with an adapter that is no longer fresh, its examples and its objective for packed batches."""

    def __init__(self, name, attention="sdpa", **settings):
        build, self.task, targets = MODELS[name]
        self.model = build(attn_implementation=attention)
        head = {"bert": ["classifier"], "roberta": ["classifier"]}.get(
            name, ["score"] if self.task == CLASSES else None
        )
        lk.attach(self.model, lk.LoRA(r=4, target_modules=targets, modules_to_save=head), seed=1)
        self.parameters = lk.parameters(self.model, "default")
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
        self.pad = int(self.model.config.pad_token_id)
        self.rows = rows_for(self.task, types=name == "bert")
        plain = objective_for(self.task, label_smoothing=settings.pop("label_smoothing", 0.0))
        self.objective = packed_objective(plain, packing_for(self.model, self.task, pad_id=self.pad))
        config = TrainConfig(batch_size=8, **settings)
        self.trainer = Trainer(self.model, self.parameters, [], self.objective, config)

    def padded(self, numbers):
        return collate([self.rows[number] for number in numbers], pad_id=self.pad, task=self.task)

    def packed(self, numbers, limit=60):
        chosen = [self.rows[number] for number in numbers]
        layout = pack_rows([len(row.input_ids) for row in chosen], limit)
        assert len(layout) < len(numbers)
        return collate_packed(chosen, layout, pad_id=self.pad, task=self.task)

    def step(self, *group):
        """(loss, gradients) as the loop takes them over the batches of one optimizer step."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.trainer._backward(group, 0.0)
        return loss, [parameter.grad.clone() for parameter in self.parameters]


def check_equal(found, reference):
    assert found[0] == pytest.approx(reference[0], rel=1e-6, abs=1e-7)
    assert any(float(gradient.abs().max()) > 1e-4 for gradient in reference[1])
    for own, theirs in zip(found[1], reference[1], strict=True):
        assert float((own - theirs).abs().max()) <= 1e-6 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_every_shape_of_batch_gives_the_same_gradient(name, attention):
    case = Case(name, attention)
    everything = list(range(8))
    reference = case.step(case.padded(everything))
    budget = TokenOrder([len(row.input_ids) for row in case.rows], 48, seed=0).epoch(0)
    assert len(budget) > 1
    for group in (
        [case.padded([number]) for number in everything],
        [case.padded(everything[:4]), case.padded(everything[4:])],
        [case.padded(batch) for batch in budget],
        [case.packed(everything)],
        [collate_packed(case.rows, [everything], pad_id=case.pad, task=case.task)],
        [case.packed(everything[:5]), case.padded(everything[5:])],
    ):
        assert sum(counts(batch)[0] for batch in group) == 8
        assert sum(counts(batch)[1] for batch in group) == sum(len(row.input_ids) for row in case.rows)
        check_equal(case.step(*group), reference)


@pytest.mark.parametrize("settings", [{"label_smoothing": 0.1}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("name", ["llama", "roberta", "llama-classes"])
def test_with_smoothing_and_checkpointing(name, settings):
    case = Case(name, **settings)
    case.model.train()  # no dropout in these; checkpointing works in training alone
    for module in case.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    case.model.config.attention_probs_dropout_prob = 0.0
    check_equal(case.step(case.packed(range(8))), case.step(case.padded(range(8))))


def test_rows_longer_than_the_models_positions():
    """Positions restart, so a row may be longer than any example could be."""
    for name in ("llama", "gpt2", "bert", "roberta"):
        case = Case(name)
        batch = collate_packed(case.rows, [list(range(8))], pad_id=case.pad, task=case.task)
        assert batch["input_ids"].shape[1] > 66
        check_equal(case.step(batch), case.step(case.padded(range(8))))


def losses(case, batch):
    """The loss of each example on its own: all labels but its own taken out."""
    segments, found = batch[SEGMENTS], []
    examples = [(row, number) for row in range(len(segments)) for number in range(1, int(segments[row].max()) + 1)]
    for at, (row, number) in enumerate(examples):
        labels = torch.full_like(batch["labels"], IGNORE)
        place = (row, segments[row] == number) if case.task == TEXT else at
        labels[place] = batch["labels"][place]
        for parameter in case.parameters:
            parameter.grad = None
        part = case.objective.loss(case.model, {**batch, "labels": labels})
        part.total.backward()
        found.append((float(part.total.detach()), [parameter.grad.clone() for parameter in case.parameters]))
    return examples, found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_no_example_sees_another(name, attention):
    """Other tokens in one example: not a bit of the others' losses and gradients changes."""
    case = Case(name, attention)
    batch = case.packed(range(6))
    examples, before = losses(case, batch)
    for row, number in examples[:3]:
        own = batch[SEGMENTS][row] == number
        ids = batch["input_ids"].clone()
        ids[row, own] = (ids[row, own] + 7) % (tiny.VOCAB - 3) + 3
        _, after = losses(case, {**batch, "input_ids": ids})
        for example, old, new in zip(examples, before, after, strict=True):
            if example == (row, number):
                assert new[0] != old[0]
                continue
            assert new[0] == old[0]
            for mine, theirs in zip(new[1], old[1], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_each_examples_loss_is_the_one_it_has_alone():
    for name in MODELS:
        case = Case(name)
        layout = pack_rows([len(row.input_ids) for row in case.rows], 60)
        batch = collate_packed(case.rows, layout, pad_id=case.pad, task=case.task)
        _, found = losses(case, batch)
        for number, (loss, gradients) in zip([n for row in layout for n in row], found, strict=True):
            alone, own = case.step(case.padded([number]))
            count = case.objective.targets(case.padded([number]))
            check_equal((loss, gradients), (alone * count, [one * count for one in own]))


# -- the trial


def test_the_trial_leaves_no_trace():
    model = tiny.bert().train()
    state, before = torch.get_rng_state(), {key: value.clone() for key, value in model.state_dict().items()}
    packing_for(model, CLASSES, pad_id=0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    llama = tiny.llama()
    objective = packed_objective(custom_objective(lambda model, batch: 1 / 0), packing_for(llama, TEXT, pad_id=0))
    with pytest.raises(ZeroDivisionError):
        objective.loss(llama, collate_packed(rows_for(TEXT, 2), [[0, 1]], pad_id=0, task=TEXT))
    assert llama.config.use_cache


@pytest.mark.parametrize(
    ("model", "task", "reason"),
    [
        (tiny.t5, "seq2seq", "takes no position_ids"),
        (tiny.llama, "seq2seq", "not for seq2seq"),
        (tiny.deberta, CLASSES, "not known which positions the head of DebertaV2ForSequenceClassification reads"),
    ],
)
def test_models_that_are_not_packed(model, task, reason):
    with pytest.raises(UsageError, match=reason):
        packing_for(model(), task, pad_id=0)


def test_a_model_whose_examples_see_each_other_is_found_out(monkeypatch):
    def nothing_masked(segments, dtype, *, causal):
        whole = torch.zeros(len(segments), 1, segments.shape[1], segments.shape[1])
        return whole.masked_fill(torch.ones_like(whole, dtype=torch.bool).triu(1), -math.inf) if causal else whole

    monkeypatch.setattr(packed_module, "block_mask", nothing_masked)
    for model, task in ((tiny.bert, CLASSES), (tiny.opt, TEXT)):
        with pytest.raises(UsageError, match=r"other outputs in a packed row|see each other"):
            packing_for(model(), task, pad_id=0)


def test_a_model_with_other_positions_is_found_out(monkeypatch):
    monkeypatch.setattr(packed_module, "_origin", lambda model: 0)
    with pytest.raises(UsageError, match="RobertaForSequenceClassification does not take packed rows"):
        packing_for(tiny.roberta(), CLASSES, pad_id=1)


def test_in_bfloat16():
    for name in ("llama", "bert"):
        build, task, _ = MODELS[name]
        packing_for(build().to(torch.bfloat16), task, pad_id=0)


# -- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_tokens": 0}, r"train\.batch_tokens must be at least 1"),
        ({"pack_length": 0}, r"train\.pack_length must be at least 1"),
        ({"packing": "yes please"}, r"train\.packing must be auto, true or false"),
        ({"packing": False, "pack_length": 9}, "does nothing without"),
        ({"batch_tokens": 64, "group_by_length": False}, "like length together"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings)
