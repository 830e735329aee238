"""SST-2 with MiniLM: dev accuracy of LoRA and of full fine-tuning, learning rate searched for both.

    python bench/sst2.py [--train 4000] [--seeds 3]

Each learning rate is tried with seed 0 and judged on 500 further training sentences; the best of each method is trained
with every seed and judged on the dev set, which no choice has looked at.
"""

import argparse
import statistics

import torch
from common import DATA, finish, table

import lorakit as lk
from lorakit.data import Dataset, encode_all, load_examples
from lorakit.evaluate import evaluate_classification
from lorakit.models import load
from lorakit.run.batches import EncodedBatches
from lorakit.train.config import TrainConfig
from lorakit.train.loop import Trainer
from lorakit.train.loss import objective_for

TASK = "sequence-classification"
RATES = {"LoRA": (5e-4, 1e-3, 2e-3), "full": (2e-5, 5e-5, 1e-4)}


def run(method: str, rate: float, seed: int, train: Dataset, judged: Dataset, epochs: float) -> dict[str, float]:
    """Train one model and measure it; returns accuracy and the share of parameters trained, head aside."""
    torch.manual_seed(seed)
    loaded = load("minilm-l6", task=TASK, label_names=train.label_names)
    total = sum(p.numel() for p in loaded.model.parameters())
    if method == "LoRA":
        lk.attach(loaded.model, lk.LoRA(r=4, alpha=16, modules_to_save=["classifier"]), name="sst2", seed=seed)
        parameters, share = lk.parameters(loaded.model, "sst2"), lk.count_parameters(loaded.model).low_rank / total
    else:
        parameters, share = list(loaded.model.parameters()), 1.0
    rows = encode_all(train, loaded.tokenizer, task=TASK, max_length=256)
    batches = EncodedBatches(rows, task=TASK, pad_id=loaded.tokenizer.pad_token_id, batch_size=16, seed=seed)
    settings = TrainConfig(epochs=epochs, batch_size=16, lr=rate, seed=seed)
    seconds = Trainer(loaded.model, parameters, batches, objective_for(TASK), settings).run().seconds
    found = evaluate_classification(loaded.model, loaded.tokenizer, judged, ["accuracy"])
    accuracy = 100 * found.metrics["accuracy"]
    print(f"{method:5} lr {rate:g} seed {seed}: {accuracy:.2f}% in {seconds:.0f} s", flush=True)
    return {"accuracy": accuracy, "share": share, "seconds": seconds}


def part(dataset: Dataset, begin: int, end: int) -> Dataset:
    return Dataset(dataset.examples[begin:end], dataset.format, dataset.source, dataset.label_names, dataset.regression)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=4000, help="training sentences")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--method", choices=list(RATES), help="one of the two alone")
    arguments = parser.parse_args()
    drawn = load_examples(str(DATA / "glue" / "SST-2" / "train.tsv"), limit=arguments.train + 500, seed=0)
    train, held = part(drawn, 0, arguments.train), part(drawn, arguments.train, arguments.train + 500)
    dev = load_examples(str(DATA / "glue" / "SST-2" / "dev.tsv"), label_names=drawn.label_names, split="eval")
    result, rows = {}, []
    for method in [arguments.method] if arguments.method else list(RATES):
        rates = RATES[method]
        search = {rate: run(method, rate, 0, train, held, arguments.epochs)["accuracy"] for rate in rates}
        best = max(search, key=search.__getitem__)
        runs = [run(method, best, seed, train, dev, arguments.epochs) for seed in range(arguments.seeds)]
        accuracies = [one["accuracy"] for one in runs]
        mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        result[method] = {"search": search, "lr": best, "accuracies": accuracies, "share": runs[0]["share"]}
        seconds = statistics.median(one["seconds"] for one in runs)
        rows.append((method, f"{best:g}", f"{runs[0]['share']:.2%}", f"{mean:.2f} ± {spread:.2f}", f"{seconds:.0f}"))
    finish(
        f"sst2-{arguments.method}" if arguments.method else "sst2",
        result,
        table(("method", "lr", "parameters", "dev accuracy %", "seconds"), rows),
    )


if __name__ == "__main__":
    main()
