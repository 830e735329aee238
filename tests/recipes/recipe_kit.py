"""Tiny models and data for the recipes of recipes/: what each expects, in the files' own forms."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import runs
import tiny

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
COLOURS = {"blue": (20, 30, 200), "green": (10, 180, 40), "red": (220, 30, 20)}
PROCESSOR = {  # as google/vit-base-patch16-224-in21k's preprocessor_config.json, but for the size
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@dataclass(frozen=True)
class Case:
    """A recipe with a tiny model of its family and data in the form that its comments describe."""

    build: Callable[..., Any]
    write: Callable[[Path], dict[str, str]]
    metric: str | None = None


def save_vit(folder: Path, **changes: Any) -> str:
    """A tiny ViT with its image processor as a transformers folder; returns its path."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiny.vit(**changes).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return str(folder)


def picture(colour: Sequence[int], draw: random.Random, size: tuple[int, int] = (20, 24)) -> Any:
    """An image of about one colour."""
    from PIL import Image

    noisy = [tuple(min(255, max(0, part + draw.randint(-15, 15))) for part in colour) for _ in range(size[0] * size[1])]
    image = Image.new("RGB", size)
    image.putdata(noisy)
    return image


def class_folders(root: Path, each: int, seed: int = 0) -> str:
    """root/<colour>/<n>.png, some of them deeper and as JPEG; returns the root."""
    draw = random.Random(seed)
    for name, colour in COLOURS.items():
        for number in range(each):
            place = root / name / ("more" if number % 3 == 2 else "")
            place.mkdir(parents=True, exist_ok=True)
            picture(colour, draw).save(place / f"{number}.{'jpg' if number % 2 else 'png'}")
    return str(root)


def _table(path: Path, header: Sequence[str] | None, rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(header)] if header else []
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [*lines, *rows]), encoding="utf-8")
    return str(path)


def _glue(header: Sequence[str] | None, row: Callable[[int], Sequence[Any]], root: Path) -> dict[str, str]:
    return {
        "train": _table(root / "train.tsv", header, [row(i) for i in range(16)]),
        "eval": _table(root / "dev.tsv", header, [row(i) for i in range(6)]),
    }


def _mnli(i: int) -> Sequence[Any]:
    kind = ("contradiction", "entailment", "neutral")[i % 3]
    return [i, i, i, "fiction", "(b)", "(b)", "(p)", "(p)", f"{kind[:3]} the sun", "a cat", kind, kind]


def _mnli_folder(root: Path) -> dict[str, str]:
    _glue(MNLI, _mnli, root)
    (root / "dev.tsv").rename(root / "dev_matched.tsv")
    _table(root / "dev_mismatched.tsv", MNLI, [_mnli(number) for number in range(3)])
    return {"train": str(root), "eval": str(root)}


MNLI = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"]
MNLI += ["sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"]


def _e2e(root: Path) -> dict[str, str]:
    def lines(name: str, count: int) -> str:
        text = "".join(f"name[{w}], food[{v}]||{w} serves {v} .\n" for w, v in _pairs(count))
        (root / f"{name}.txt").write_text(text)
        return str(root / f"{name}.txt")

    return {"train": lines("train", 16), "eval": lines("valid", 4), "test": lines("test", 3)}


def _pairs(count: int) -> list[tuple[str, str]]:
    draw = random.Random(count)
    return [(draw.choice(runs.WORDS), draw.choice(runs.WORDS)) for _ in range(count)]


def _alpaca(root: Path) -> dict[str, str]:
    rows = [
        {"instruction": f"Say {a}.", "input": b if i % 2 else "", "output": a} for i, (a, b) in enumerate(_pairs(12))
    ]
    (root / "alpaca_data.json").write_text(json.dumps(rows))
    return {"train": str(root / "alpaca_data.json")}


def _prompts(root: Path) -> dict[str, str]:
    return {
        "train": runs.write_rows(root / "train.jsonl", runs.text_rows(16, 1)),
        "eval": runs.write_rows(root / "eval.jsonl", runs.text_rows(5, 2)),
    }


def _images(root: Path) -> dict[str, str]:
    class_folders(root / "images" / "train", 6, seed=1)
    class_folders(root / "images" / "val", 2, seed=2)
    return {"train": str(root / "images"), "eval": str(root / "images")}


def _webnlg(root: Path) -> dict[str, str]:
    def entry(a: str, b: str, number: int) -> str:
        texts = f"<lex comment='good'>{a} is {b} .</lex><lex comment='good'>{b} is of {a} .</lex>"
        triple = f"<modifiedtripleset><mtriple>{a} | is | {b}</mtriple></modifiedtripleset>"
        return f"<entry category='{'Food' if number % 2 else 'Artist'}' eid='Id{number}'>{triple}{texts}</entry>"

    for name, count in (("train", 10), ("dev", 4), ("test", 3)):
        folder = root / "webnlg" / name / "1triples"
        folder.mkdir(parents=True, exist_ok=True)
        entries = "".join(entry(a, b, number) for number, (a, b) in enumerate(_pairs(count)))
        (folder / "all.xml").write_text(f"<benchmark><entries>{entries}</entries></benchmark>")
    return {role: str(root / "webnlg") for role in ("train", "eval", "test")}


def _dart(root: Path) -> dict[str, str]:
    def entries(count: int) -> str:
        return json.dumps(
            [{"tripleset": [[a, "IS", b]], "annotations": [{"text": f"{a} is {b} ."}]} for a, b in _pairs(count)]
        )

    for name, count in (("train", 16), ("dev", 4), ("test", 3)):
        (root / f"{name}.json").write_text(entries(count))
    return {"train": str(root / "train.json"), "eval": str(root / "dev.json"), "test": str(root / "test.json")}


def _wikisql(root: Path) -> dict[str, str]:
    for name, count in (("train", 16), ("dev", 4)):
        runs.write_rows(root / f"{name}.tables.jsonl", [{"id": "1-1", "header": ["Name", "Team"], "rows": []}])
        queries = [{"sel": 0, "agg": 3, "conds": [[1, 0, word]]} for word, _ in _pairs(count)]
        rows = [{"table_id": "1-1", "question": f"who {query['conds'][0][2]}?", "sql": query} for query in queries]
        runs.write_rows(root / f"{name}.jsonl", rows)
    return {"train": str(root / "train.jsonl"), "eval": str(root / "dev.jsonl")}


def _samsum(root: Path) -> dict[str, str]:
    for name, count in (("train", 16), ("val", 4), ("test", 3)):
        rows = [{"id": a, "summary": f"{a} is {b}.", "dialogue": f"A: {a}\r\nB: {b}"} for a, b in _pairs(count)]
        (root / f"{name}.json").write_text(json.dumps(rows))
    return {"train": str(root / "train.json"), "eval": str(root / "val.json"), "test": str(root / "test.json")}


def _squad(root: Path) -> dict[str, str]:
    def paragraph(a: str, b: str) -> dict[str, Any]:
        context = f"the {a} is {b}. " + "more of it " * 60
        answers = [{"text": b, "answer_start": context.index(f"is {b}") + 3}]
        return {"context": context, "qas": [{"id": f"{a}-{b}", "question": f"the {a}?", "answers": answers}]}

    for name, count in (("train", 16), ("dev", 4)):
        articles = [{"title": "t", "paragraphs": [paragraph(a, b) for a, b in _pairs(count)]}]
        (root / f"{name}.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    return {"train": str(root / "train.json"), "eval": str(root / "dev.json")}


def _bare_roberta(**changes: Any) -> Any:
    """A RoBERTa without a head, as base models come."""
    return tiny.roberta(**changes).roberta


_LONG = {"max_position_embeddings": 512}
CASES = {
    "roberta-mnli": Case(partial(tiny.roberta, **_LONG), _mnli_folder, "accuracy"),
    "roberta-mrpc": Case(
        partial(tiny.roberta, **_LONG),
        partial(
            _glue,
            ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
            lambda i: [i % 2, i, i, 'the "sun"', "the sun" if i % 2 else "no moon"],
        ),
        "f1",
    ),
    "deberta-v2-cola": Case(
        tiny.deberta, partial(_glue, None, lambda i: ["gj04", i % 2, "" if i % 2 else "*", f"cat {i}"]), "matthews"
    ),
    "deberta-rte": Case(
        partial(tiny.deberta_v1, **_LONG),
        partial(
            _glue,
            ["index", "sentence1", "sentence2", "label"],
            lambda i: [i, "a cat", "a dog", "entailment" if i % 2 else "not_entailment"],
        ),
        "accuracy",
    ),
    "bert-sst2": Case(
        partial(tiny.bert, **_LONG),
        partial(_glue, ["sentence", "label"], lambda i: ["good sun" if i % 2 else "bad moon", i % 2]),
        "accuracy",
    ),
    "gpt2-e2e": Case(partial(tiny.gpt2, n_positions=512), _e2e, "bleu"),
    "gpt2-webnlg": Case(partial(tiny.gpt2, n_positions=512), _webnlg, "bleu"),
    "gpt2-dart": Case(partial(tiny.gpt2, n_positions=512), _dart, "ter"),
    "gpt3-wikisql": Case(partial(tiny.opt, max_position_embeddings=512), _wikisql, "logical_form"),
    "gpt3-samsum": Case(partial(tiny.opt, max_position_embeddings=512), _samsum, "rouge2"),
    "roberta-squad": Case(partial(_bare_roberta, **_LONG), _squad, "squad_f1"),
    "llama-alpaca": Case(partial(tiny.llama, max_position_embeddings=512), _alpaca),
    "t5-summaries": Case(tiny.t5, _prompts, "rougeL"),
    "vit-images": Case(tiny.vit, _images, "accuracy"),
}
