"""States below the first adapted block: kept once, fed in, and loss and gradients are those of the whole model."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

import lorakit as lk
from lorakit.data import Encoded, collate
from lorakit.data.pack import collate_packed
from lorakit.errors import OutputError, UsageError
from lorakit.train.loss import objective_for
from lorakit.train.packed import packed_objective, packing_for
from lorakit.train.prefix import fed, find_prefix, lowest_block_trained, states_below
from lorakit.train.prefix_cache import ROWS, PrefixCache, cached_objective, check_exact, groups
from lorakit.train.prefix_store import StateStore

CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "llama": lambda **more: tiny.llama(num_hidden_layers=4, **more),
    "gpt2": lambda **more: tiny.gpt2(n_layer=4, **{"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} | more),
    "bert": lambda **more: tiny.bert(num_hidden_layers=4, **CALM | more),
    "roberta": lambda **more: tiny.roberta(num_hidden_layers=4, **CALM | more),
}
LENGTHS = [5, 9, 9, 3, 9, 12, 1, 5]


def task_of(name):
    return "causal-lm" if name in ("llama", "gpt2") else "sequence-classification"


def rows_for(name):
    draw = torch.Generator().manual_seed(3)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(3, tiny.VOCAB, (length,), generator=draw).tolist()
        labels = ids if task_of(name) == "causal-lm" else number % tiny.LABELS
        types = [0, *[1] * (length - 1)] if name == "bert" else None
        rows.append(Encoded(ids, labels, 0, token_type_ids=types))
    return rows


def attached(build, layers=(2, 3), **changes):
    model = build(**changes)
    lk.attach(model, lk.LoRA(r=4, target_modules="all-linear", layers_to_transform=list(layers)), seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lk.parameters(model, "default"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


class Kept:
    """A cache over the rows of one model, and the batches for it."""

    def __init__(self, name, model, tmp_path, memory=2**20, disk=0):
        self.rows, self.task = rows_for(name), task_of(name)
        self.pad = 1 if name == "roberta" else 0
        self.asked = []
        self.prefix = find_prefix(model, self.inputs([0, 3]))
        store = StateStore(LENGTHS, 32, self.prefix.dtype, memory=memory, disk=disk, folder=tmp_path)
        self.cache = PrefixCache(self.prefix, LENGTHS, self.collate, store)
        self.plain = objective_for(self.task)
        self.objective = cached_objective(self.plain, self.cache)

    def collate(self, numbers):
        self.asked.append(list(numbers))
        return self.batch(numbers)

    def batch(self, numbers):
        return collate([self.rows[number] for number in numbers], pad_id=self.pad, task=self.task)

    def inputs(self, numbers):
        return {key: value for key, value in self.batch(numbers).items() if key != "labels"}

    def numbered(self, numbers):
        return {**self.batch(numbers), ROWS: torch.tensor(numbers)}


def step(model, objective, inputs):
    part = objective.loss(model, inputs)
    part.total.backward()
    grads = [parameter.grad.clone() for parameter in lk.parameters(model, "default")]
    model.zero_grad(set_to_none=True)
    return part, grads


def check_near(found, exact):
    """Within 1e-6 of the largest entry of the gradient."""
    (ours, grads), (plain, expected) = found, exact
    assert ours.targets == plain.targets
    assert abs(float((ours.total - plain.total).detach())) <= 1e-6 * float(plain.total.detach())
    largest = max(float(grad.abs().max()) for grad in expected)
    assert largest > 0
    for grad, other in zip(grads, expected, strict=True):
        assert torch.allclose(grad, other, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name, attention, tmp_path):
    model = attached(MODELS[name])
    model.config._attn_implementation = attention
    kept = Kept(name, model, tmp_path)
    exact = copy.deepcopy(model).train()
    model.train()
    assert kept.prefix.depth == 2
    for numbers in ([0, 5, 3, 6], [5], [1, 2, 4], [7, 0, 5]):  # the last from what the others left
        check_near(step(model, kept.objective, kept.numbered(numbers)), step(exact, kept.plain, kept.batch(numbers)))


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_below_run_once_for_each_row(name, tmp_path):
    model = attached(MODELS[name])
    kept = Kept(name, model, tmp_path)
    runs = []
    inner = [one for one in kept.prefix.blocks[0].modules() if "weight" in one._parameters][-1]
    inner.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        for numbers in ([0, 5, 3, 6], [1, 2, 4, 7]):
            step(model, kept.objective, kept.numbered(numbers))
    assert sorted(number for asked in kept.asked for number in asked) == list(range(len(LENGTHS)))
    assert len(kept.asked) == len(groups(LENGTHS))
    assert len(runs) == len(groups(LENGTHS))


@pytest.mark.parametrize("name", MODELS)
def test_states_depend_on_no_batch(name, tmp_path):
    """Bit for bit, whichever rows ask first: what makes a resumed run the same."""
    model = attached(MODELS[name]).train()
    first, second = Kept(name, model, tmp_path), Kept(name, model, tmp_path)
    step(model, first.objective, first.numbered([5, 4, 3, 0]))
    for numbers in ([1], [7, 6], [5, 2, 3]):
        step(model, second.objective, second.numbered(numbers))
    for number in (0, 1, 2, 3, 4, 5):
        assert torch.equal(first.cache.store.get(number), second.cache.store.get(number))


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows(name, tmp_path):
    model = attached(MODELS[name])
    kept = Kept(name, model, tmp_path)
    packing = packing_for(model, kept.task, pad_id=kept.pad)
    exact = copy.deepcopy(model)
    layout = [[0, 2, 3], [1, 5]]
    items = [kept.rows[number] for number in range(6)]
    batch = collate_packed(items, [*layout, [4]], pad_id=kept.pad, task=kept.task)
    numbered = {**batch, ROWS: torch.tensor([0, 2, 3, 1, 5, 4])}
    objective = cached_objective(packed_objective(kept.plain, packing), kept.cache)
    plain = packed_objective(kept.plain, packing_for(exact, kept.task, pad_id=kept.pad))
    check_near(step(model, objective, numbered), step(exact, plain, batch))


@pytest.mark.parametrize("name", MODELS)
def test_under_gradient_checkpointing(name, tmp_path):
    model = attached(MODELS[name], **({"use_cache": False} if name in ("llama", "gpt2") else {}))
    kept = Kept(name, model, tmp_path)
    exact = copy.deepcopy(model)
    for one in (model, exact):
        one.train()
        one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    numbers = [0, 5, 3]
    check_near(step(model, kept.objective, kept.numbered(numbers)), step(exact, kept.plain, kept.batch(numbers)))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_under_autocast(name, tmp_path):
    """The states are those of the training's own precision; rows of one length, so that nothing else differs."""
    model = attached(MODELS[name])
    with torch.autocast("cpu", torch.bfloat16):
        kept = Kept(name, model, tmp_path)
        ours = float(kept.objective.loss(model, kept.numbered([1, 2, 4])).total.detach())
        plain = float(kept.plain.loss(model, kept.batch([1, 2, 4])).total.detach())
    assert kept.cache.store.get(1).dtype == kept.prefix.dtype
    assert abs(ours - plain) <= 1e-6 * plain


@pytest.mark.parametrize("memory", [0, 5 * 32 * 4, 20 * 32 * 4, sum(LENGTHS) * 32 * 4])
def test_memory_first_and_then_the_disk(memory, tmp_path):
    model = attached(MODELS["llama"])
    whole, split = Kept("llama", model, tmp_path), Kept("llama", model, tmp_path, memory=memory, disk=2**20)
    for kept in (whole, split):
        step(model, kept.objective, kept.numbered(list(range(8))))
        step(model, kept.objective, kept.numbered(list(range(8))))
    for number in range(8):
        assert torch.equal(whole.cache.store.get(number), split.cache.store.get(number))
    assert split.cache.store.beyond == (sum(LENGTHS) * 32 * 4 if memory == 0 else split.cache.store.beyond)
    assert list(tmp_path.iterdir()) == []  # a file without a name: no crash leaves it behind


def test_more_than_memory_and_disk_take(tmp_path):
    with pytest.raises(UsageError, match=r"8 rows take .* GiB of disk"):
        StateStore(LENGTHS, 32, torch.float32, memory=100, disk=6000, folder=tmp_path)
    StateStore(LENGTHS, 32, torch.float32, memory=700, disk=6200, folder=tmp_path)


def test_a_full_disk_is_one_error(tmp_path, monkeypatch):
    store = StateStore(LENGTHS, 32, torch.float32, memory=0, disk=2**20, folder=tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OutputError, match=r"No space left.*prefix_disk"):
        store.put(0, torch.zeros(5, 32))
    assert 0 not in store


def test_a_store_takes_only_what_it_was_made_for(tmp_path):
    store = StateStore([2, 3], 4, torch.bfloat16, memory=0, disk=1000, folder=tmp_path)
    with pytest.raises(UsageError, match=r"row 1 must be \(3, 4\)"):
        store.put(1, torch.zeros(2, 4, dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="never kept"):
        store.get(1)
    states = torch.randn(3, 4).bfloat16()
    store.put(1, states)
    assert torch.equal(store.get(1), states)


def test_groups_hold_each_row_once_and_one_length_each():
    lengths = [3, 700, 3, 5000, 700, 3] * 100
    found = groups(lengths, tokens=1024)
    assert sorted(number for group in found for number in group) == list(range(600))
    for group in found:
        assert len({lengths[number] for number in group}) == 1
        assert len(group) == 1 or len(group) * lengths[group[0]] <= 1024
    assert len(found) == 200 + 100 + 1


# -- where it is not exact


def refused(model, name="bert"):
    kept_rows = rows_for(name)
    inputs = collate(kept_rows[:2], pad_id=0, task=task_of(name))
    del inputs["labels"]
    with pytest.raises(UsageError) as caught:
        find_prefix(model, inputs)
    return str(caught.value)


def test_something_lower_is_trained():
    assert "the lowest block" in refused(attached(MODELS["bert"], layers=(0, 3)))
    assert lowest_block_trained(attached(MODELS["bert"], layers=(0, 3)))
    model = attached(MODELS["llama"])
    model.get_input_embeddings().weight.requires_grad_(True)
    assert "something below model.layers.1 is trained" in refused(model, "llama")
    model = MODELS["gpt2"]()
    lk.attach(model, lk.LoRA(r=2, target_modules=["wte", "h.3.attn.c_attn"]))
    assert "below transformer.h.1" in refused(model, "gpt2")


@pytest.mark.parametrize("key", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_the_bases_dropout(key):
    message = refused(attached(MODELS["bert"], **{key: 0.1}))
    assert "dropout" in message
    assert "bert.encoder.layer.0" in message or "bert.embeddings.dropout" in message


def test_attention_dropout_that_is_no_module():
    assert "dropout" in refused(attached(MODELS["llama"], attention_dropout=0.1), "llama")


def test_dropout_of_the_adapters_above_is_no_matter(tmp_path):
    model = MODELS["llama"]()
    method = lk.LoRA(r=2, dropout=0.5, target_modules="all-linear", layers_to_transform=[2, 3])
    lk.attach(model, method, seed=1)
    kept = Kept("llama", model, tmp_path)
    state = torch.get_rng_state()
    find_prefix(model, kept.inputs([0, 1]))
    assert kept.prefix.depth == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_models_without_one_list_of_blocks():
    assert "no single list of blocks" in refused(tiny.t5())


def test_blocks_that_hand_on_more_than_hidden_states(tmp_path):
    """The second block's attention reads what the first one computed: states alone are not enough."""
    model = attached(MODELS["llama"])
    blocks = model.model.layers
    blocks[0].register_forward_hook(lambda module, args, output: setattr(model, "seen", output.detach()))
    blocks[3].register_forward_hook(lambda module, args, output: output + model.seen.mean())
    kept = Kept("llama", model, tmp_path)
    with pytest.raises(UsageError, match="hands more from block to block"):
        check_exact(model, kept.cache, [0, 1])


@pytest.mark.parametrize("name", MODELS)
def test_the_trial_passes_where_it_is_exact(name, tmp_path):
    model = attached(MODELS[name])
    check_exact(model, Kept(name, model, tmp_path).cache, [0, 5])


def test_a_batch_of_other_rows_is_refused(tmp_path):
    model = attached(MODELS["llama"])
    kept = Kept("llama", model, tmp_path)
    wrong = {**kept.batch([0, 1]), ROWS: torch.tensor([1, 0])}
    with pytest.raises(UsageError, match="whole rows of its data set"):
        kept.objective.loss(model, wrong)


# -- the model afterwards


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_as_before_afterwards(name, tmp_path):
    model = attached(MODELS[name])
    kept = Kept(name, model, tmp_path)
    own = kept.prefix.blocks[1].forward
    kept.prefix.blocks[1].forward = own  # as accelerate's hooks leave it
    model.train()
    before = {path: (type(one), set(one.__dict__), one.training) for path, one in model.named_modules()}
    hooks = [len(one._forward_pre_hooks) for one in model.modules()]
    keys, states = list(model.state_dict()), states_below(model, kept.prefix, kept.inputs([0]))
    step(model, kept.objective, kept.numbered([0, 5]))
    find_prefix(model, kept.inputs([0]))
    with pytest.raises(KeyError), fed(kept.prefix, states):
        raise KeyError
    with pytest.raises((TypeError, ValueError)):
        find_prefix(model, {"nothing": states})
    with pytest.raises((TypeError, ValueError)):
        states_below(model, kept.prefix, {"nothing": states})
    after = {path: (type(one), set(one.__dict__), one.training) for path, one in model.named_modules()}
    assert after == before
    assert [len(one._forward_pre_hooks) for one in model.modules()] == hooks
    assert list(model.state_dict()) == keys
    assert kept.prefix.blocks[1].__dict__["forward"] is own
