"""A group of members on one base: loaded once, trained some at a time, each finished into its folder."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorakit.attach.anatomy import is_within
from lorakit.attach.targets import find_modules
from lorakit.errors import TrainingError
from lorakit.methods.lora import LoRA
from lorakit.run.check import check_recipe
from lorakit.run.folder import RunFolder
from lorakit.run.listen import Listener
from lorakit.run.recipe import CLASSIFIERS, IMAGE_CLASSIFICATION, Recipe, to_mapping
from lorakit.run.train import train
from lorakit.sweep.joint import JointTrainer
from lorakit.sweep.member import Member
from lorakit.sweep.result import rows_of

ALIKE = (
    "batch_size",
    "pass_tokens",
    "batch_tokens",
    "accumulate",
    "precision",
    "gradient_checkpointing",
    "label_smoothing",
    "prune_last_block",
)
"""Settings of training that members of one pass share: the shape of their batches, and what the pass itself does."""
EVEN = ("causal-lm", "seq2seq", *CLASSIFIERS)

Finished = Callable[[str], None]


def group_of(recipe: Recipe) -> str | None:
    """Members of one key can be trained at once; None = a run that is made alone."""
    method, settings = recipe.method, recipe.train
    asked = settings.packing is True or settings.pack_length is not None or settings.prefix_cache is True
    routable = isinstance(method, LoRA) and not method.target_parameters
    if recipe.task not in EVEN or not routable or asked or settings.precision == "fp16":
        return None
    document = to_mapping(recipe)
    data = document["data"] if recipe.task in CLASSIFIERS else None  # its labels shape the head
    same = [recipe.model, recipe.task, document["base"], data, [document["train"][key] for key in ALIKE]]
    return json.dumps(same, sort_keys=True)


def train_alone(recipe: Recipe, listener: Listener) -> None:
    """A member that shares nothing: an ordinary run in its folder. One whose loss is no number is told as failed there."""
    try:
        result = train(recipe, overwrite=True, listener=listener)
        if result.interrupted:
            raise KeyboardInterrupt
    except TrainingError as error:
        folder = RunFolder(recipe.output)
        steps = max((row.get("step", 0) for row in rows_of(folder)), default=0)
        folder.write_summary({"failed": str(error), "steps": steps})
        listener.note(f"{folder.path.name}: {error}")


def train_together(recipes: dict[str, Recipe], at_once: int, listener: Listener, finished: Finished) -> None:
    """Train members (name -> recipe) of one group. finished: called with the name of each that is done, on the disk.

    Members whose seed draws other values of the base itself than the first's (a pooler that no checkpoint has, frozen) get a
    base of their own.
    """
    members = [Member(recipe, name, listener) for name, recipe in recipes.items()]
    for member in members:
        check_recipe(member.recipe, own_loss=False)
    _read(members)
    while members:
        base, heads = members[0], _load(members)
        shares = [one for one in members if _covers(one, base.model, heads[one.recipe.train.seed])]
        _encode(base, shares)
        measured: dict[str, Member] = {}
        for begin in range(0, len(shares), at_once):
            some = shares[begin : begin + at_once]
            _train(base, some, heads, measured, listener)
            for member in some:
                finished(member.name)
        members = [one for one in members if one not in shares]


def _read(members: Sequence[Member]) -> None:
    known: dict[str, Member] = {}
    for member in members:
        first = known.setdefault(member.reading(), member)
        if first is member:
            member.read_data()
        else:
            member.borrow(first)


def _load(members: Sequence[Member]) -> dict[int, dict[str, Tensor]]:
    """Load the base of the first; by each one's seed, the values that a run of that seed draws otherwise (a new head)."""
    base = members[0]
    base.load_model()
    drawn: dict[int, dict[str, Tensor]] = {base.recipe.train.seed: {}}
    for member in members:
        seed = member.recipe.train.seed
        if seed in drawn:
            continue
        drawn[seed] = {}
        if base.classifies:
            member.load_model()
            ours = base.model.state_dict()
            others = member.model.state_dict().items()
            drawn[seed] = {key: value.clone() for key, value in others if not torch.equal(value, ours[key])}
            del member.model, member.loaded
    return drawn


def _covers(member: Member, model: nn.Module, drawn: dict[str, Tensor]) -> bool:
    """Whether what the member's seed draws is all its adapter's own (modules_to_save): the rest is the base that all share."""
    member.model = model
    kept = find_modules(model, member.method().modules_to_save or ())
    return all(any(is_within(key, module) for module in kept) for key in drawn)


def _encode(base: Member, members: Sequence[Member]) -> None:
    known: dict[str, Member] = {}
    for member in members:
        member.model, member.loaded = base.model, base.loaded
        first = known.setdefault(member.reading(), member)
        if first is member:
            member.encode()
        else:
            member.train_rows, member.eval_rows = first.train_rows, first.eval_rows


def _train(
    base: Member,
    members: Sequence[Member],
    drawn: dict[int, dict[str, Tensor]],
    measured: dict[str, Member],
    listener: Listener,
) -> None:
    """Train these at once, and finish each into its folder."""
    model, settings, dressed = base.model, base.recipe.train, list[Member]()
    try:
        for member in members:
            with _values(model, drawn[member.recipe.train.seed]):
                member.dress(model)
            dressed.append(member)
            first = measured.setdefault(member.measuring(), member)
            if first is member:
                member.measure_base()
            else:
                member.before, member.answers_before = first.before, first.answers_before
            member.begin()
        trainers = {member.name: member.trainer() for member in members}
        steps = max(trainer.total for trainer in trainers.values())
        listener.stage(f"training {len(members)} adapter{'s' * (len(members) > 1)} at once for {steps:,} steps")
        joint = JointTrainer(
            model,
            trainers,
            task=base.recipe.task,
            pad_id=_pad_id(base),
            smoothing=settings.label_smoothing,
            stepped=listener.progress,
        )
        joint.run()
        for member in members:
            error = joint.failed.get(member.name)
            if error is not None:
                listener.note(f"{member.name}: {error}")
            member.finish(trainers[member.name], None if error is None else str(error))
    finally:
        for member in dressed:
            member.undress()


def _pad_id(member: Member) -> int:
    return 0 if member.recipe.task == IMAGE_CLASSIFICATION else member.loaded.tokenizer.pad_token_id


@contextmanager
def _values(model: nn.Module, drawn: dict[str, Tensor]) -> Iterator[None]:
    """Within, the model's tensors of these names have these values."""
    own = {key: value for key, value in model.state_dict().items() if key in drawn}
    kept = {key: value.clone() for key, value in own.items()}
    try:
        for key, value in own.items():
            value.copy_(drawn[key])
        yield
    finally:
        for key, value in own.items():
            value.copy_(kept[key])
