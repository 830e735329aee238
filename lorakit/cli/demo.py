"""lorakit demo"""

from typing import Annotated

import typer

from lorakit.cli.show import Terminal, console, print_json, print_table
from lorakit.demo.run import DemoConfig, demo, proof_rows


def run(
    out: Annotated[str, typer.Option(help="The run's folder.")] = DemoConfig.output,
    train_questions: Annotated[int, typer.Option(help="Questions to learn from.")] = DemoConfig.train_questions,
    heldout_questions: Annotated[int, typer.Option(help="Questions to judge by.")] = DemoConfig.heldout_questions,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Example: lorakit demo --out runs/demo"""
    config = DemoConfig(output=out, train_questions=train_questions, heldout_questions=heldout_questions)
    with Terminal() as terminal:
        result = demo(config, overwrite=overwrite, listener=terminal)
    if result.interrupted:
        console().print(f"Stopped. Start again with: lorakit demo --out {out} --overwrite")
        raise typer.Exit(1)
    if as_json:
        print_json(result.summary)
        return
    print_table(["", "base, 3 examples", "adapted", "merged"], proof_rows(result.summary))
    seconds = result.summary["seconds"]
    typer.echo(f"{seconds / 60:.1f} minutes. Report: {result.folder / 'report.html'}")
