"""What the tests of combining share: models with layers of every kind, and adapters with random values on them."""

import tiny
import torch
from adapting import grow, host
from torch import nn

import lorakit as lk
from lorakit.methods.combine import HOWS

PRUNING = [how for how in HOWS if how not in ("cat", "svd", "linear")]
UNLIKE = {  # ranks, scalings, layers, rsLoRA: nothing is alike
    "a": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    "b": {"r": 3, "alpha": 5, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "c": {
        "r": 2,
        "alpha": 7,
        "target_modules": ["v_proj", "q_proj"],
        "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {"v_proj": 3},
    },
}
CONVS = {
    "a": {"r": 4, "alpha": 8, "target_modules": ["one", "grouped"]},
    "b": {"r": 2, "alpha": 3, "target_modules": ["grouped", "out"], "use_rslora": True},
}
EXPERTS = {
    "a": {"r": 2, "alpha": 3, "target_modules": ["first"], "target_parameters": ["experts.up", "experts.down"]},
    "b": {"r": 3, "alpha": 2, "target_modules": ["first"], "target_parameters": ["experts.down"], "use_rslora": True},
}


class Layers(nn.Module):
    """Convolutions of every kind."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.grouped(self.one(x)[..., None, :].expand(-1, -1, 5, -1)).mean((2, 3)))


class Experts(nn.Module):
    """A stack of experts, all of which are used."""

    def __init__(self, experts=3, d=6, inner=5):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, inner, d) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, d, inner) * 0.3)

    def forward(self, x):
        hidden = torch.einsum("bd,eid->bei", x, self.up).relu()
        return torch.einsum("bei,edi->bd", hidden, self.down)


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.experts = Experts()

    def forward(self, x):
        return self.experts(self.first(x))


def with_adapters(model, configurations, std=0.3, dtypes=()):
    for number, (name, fields) in enumerate(configurations.items()):
        lk.attach(model, lk.LoRA(**fields), name=name, seed=number, dtype=dict(dtypes).get(name))
        grow(model, name, number, std)
    return model


def llama(names="abc"):
    return with_adapters(tiny.llama(), {name: UNLIKE[name] for name in names})


def outputs(model, x, names):
    with torch.no_grad(), lk.use(model, names):
        return model(**x).logits if isinstance(x, dict) else model(x)


def updates(model, name):
    """path -> the full update of each pair of an adapter, float64, (out, in); an embedding's as (dim, vocab)."""
    found = {}
    for path, pair in host(model).records[name].draft.pairs.items():
        A, Bt = (factor.detach().double() for factor in pair.factors())
        embedding = isinstance(model.get_submodule(path), nn.Embedding)
        found[path] = pair.scale * ((A @ Bt).T if embedding else Bt.T @ A.flatten(1))
    return found


def densities(how, density):
    return {"density": density} if how in PRUNING else {}
