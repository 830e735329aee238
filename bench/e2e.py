"""E2E NLG with SmolLM2: BLEU and ROUGE-L of the base and of LoRA on 100 test meaning representations.

python bench/e2e.py [--train 2000] [--test 100] [--run FOLDER]

2,000 training examples, one epoch; greedy decoding; all references of each meaning representation count. An answer is the
first line that is not empty. The base is asked twice: with the meaning representation alone, and after three examples.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import DATA, ROOT, finish, table

import lorakit as lk
from lorakit.data import PromptExample, group_references, load_examples, sample
from lorakit.evaluate import score
from lorakit.generate import GenerateConfig, generate
from lorakit.run.subject import open_subject

METRICS = ("bleu", "rougeL")


def trained(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) with the adapter on: freshly trained, or of a run's folder."""
    if arguments.run:
        subject = open_subject(arguments.run)
        return subject.model, subject.tokenizer
    recipe = {
        "model": "smollm2-135m-instruct",
        "data": {"train": str(DATA / "e2e" / "train.txt"), "format": "e2e", "limit": arguments.train},
        "method": {"name": "lora", "r": 8, "alpha": 16},
        "train": {"epochs": 1, "batch_size": 8, "lr": 1e-3, "seed": 0},
        "output": str(ROOT / "runs" / "bench" / "e2e"),
    }
    run = lk.train(recipe, overwrite=True)
    return run.model, run.tokenizer


def measure(model: Any, tokenizer: Any, prompts: Sequence[str], tested: Sequence[PromptExample]) -> dict[str, Any]:
    """Metrics and answers."""
    texts = generate(model, tokenizer, prompts, GenerateConfig(max_new_tokens=80, batch_size=20))
    answers = [next((line.strip() for line in text.splitlines() if line.strip()), "") for text in texts]
    return {"metrics": score(METRICS, answers, [one.references for one in tested]), "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2000, help="training examples")
    parser.add_argument("--test", type=int, default=100, help="test meaning representations")
    parser.add_argument("--run", type=Path, help="measure the adapter of this run instead of training one")
    arguments = parser.parse_args()
    model, tokenizer = trained(arguments)
    data = DATA / "e2e"
    tested = sample(group_references(load_examples(str(data / "test.txt"), format="e2e").examples), arguments.test, 0)
    shots = load_examples(str(data / "train.txt"), format="e2e", limit=3).examples
    before = "".join(f"{one.prompt}{one.completion}\n\n" for one in shots)
    prompts = [one.prompt for one in tested]
    found = {"LoRA": measure(model, tokenizer, prompts, tested)}
    with lk.use(model, None):
        found["base"] = measure(model, tokenizer, prompts, tested)
        found["base, 3 examples"] = measure(model, tokenizer, [before + prompt for prompt in prompts], tested)
    rows = [(name, *(one["metrics"][metric] for metric in METRICS)) for name, one in found.items()]
    finish("e2e", {"found": found, "prompts": prompts[:5]}, table(("model", "BLEU", "ROUGE-L"), rows))


if __name__ == "__main__":
    main()
