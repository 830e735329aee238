"""E2E NLG with SmolLM2: BLEU and ROUGE-L of the base and of LoRA on 100 test meaning representations.

    python bench/e2e.py [--train 2000] [--test 100]

2,000 training examples, one epoch; greedy decoding; all references of each meaning representation count.
"""

import argparse

from common import DATA, ROOT, finish, table

import lorakit as lk
from lorakit.data import group_references, load_examples, sample
from lorakit.evaluate import evaluate_generation
from lorakit.generate import GenerateConfig

METRICS = ("bleu", "rougeL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2000, help="training examples")
    parser.add_argument("--test", type=int, default=100, help="test meaning representations")
    arguments = parser.parse_args()
    recipe = {
        "model": "smollm2-135m-instruct",
        "data": {"train": str(DATA / "e2e" / "train.txt"), "format": "e2e", "limit": arguments.train},
        "method": {"name": "lora", "r": 8, "alpha": 16},
        "train": {"epochs": 1, "batch_size": 8, "lr": 1e-3, "seed": 0},
        "evaluate": {"samples": 0},
        "output": str(ROOT / "runs" / "bench" / "e2e"),
    }
    run = lk.train(recipe, overwrite=True)
    tested = sample(
        group_references(load_examples(str(DATA / "e2e" / "test.txt"), format="e2e").examples), arguments.test, 0
    )
    decoding = GenerateConfig(max_new_tokens=80, batch_size=20, stop=("\n",))
    lora = evaluate_generation(run.model, run.tokenizer, tested, decoding, METRICS)
    with lk.use(run.model, None):
        base = evaluate_generation(run.model, run.tokenizer, tested, decoding, METRICS)
    rows = [(name, *(found.metrics[metric] for metric in METRICS)) for name, found in (("base", base), ("LoRA", lora))]
    shown = [(row["prompt"], row["prediction"], row["references"][:2]) for row in lora.rows[:3]]
    result = {"base": base.metrics, "lora": lora.metrics, "run": run.summary, "samples": shown}
    finish("e2e", result, table(("model", "BLEU", "ROUGE-L"), rows))


if __name__ == "__main__":
    main()
