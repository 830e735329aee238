"""lorakit train"""

import shlex
from dataclasses import asdict
from typing import Annotated

import typer

from lorakit.cli.show import Terminal, cell, console, megabytes, print_json
from lorakit.errors import UsageError
from lorakit.run.dry import DryRun, dry_run
from lorakit.run.result import RunResult
from lorakit.run.train import train
from lorakit.train.world import join


def run(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set train.lr=1e-4")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the output folder.")] = False,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Tell parameters, memory, padding and time from a few steps; write nothing."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Example: lorakit train recipe.yaml --set train.lr=1e-4"""
    if dry:
        if resume or overwrite:
            raise UsageError("--dry-run begins nothing: leave out --resume and --overwrite.")
        with Terminal() as terminal:
            found = dry_run(recipe, overrides=set_ or (), listener=terminal)
        if as_json:
            print_json({**asdict(found), "memory": {**asdict(found.memory), "total": found.memory.total}})
        else:
            typer.echo("\n".join(_aligned(_told(found))))
        return
    with Terminal() as terminal:
        result = train(recipe, overrides=set_ or (), resume=resume, overwrite=overwrite, listener=terminal)
    if not join().first:  # one process of several speaks
        return
    if as_json:
        print_json({"folder": str(result.folder), "interrupted": result.interrupted, **result.summary})
    if result.interrupted:
        chosen = "".join(f" --set {shlex.quote(one)}" for one in set_ or ())
        console().print(f"Go on with: lorakit train {shlex.quote(recipe)}{chosen} --resume", soft_wrap=True)
        raise typer.Exit(1)
    if not as_json:
        typer.echo("\n".join(_lines(result)))


def _lines(result: RunResult) -> list[str]:
    summary = result.summary
    facts = {
        "adapter": f"{result.folder / 'adapter'} ({megabytes(summary['adapter_bytes'])})",
        "report": str(result.folder / "report.html"),
    }
    for name, value in summary["after"].items():
        before = summary["before"].get(name)
        facts[name] = cell(value) + (f" (base: {cell(before)})" if before is not None else "")
    return _aligned(facts)


def _told(found: DryRun) -> dict[str, str]:
    """What a dry run found, a line each."""
    memory, epoch = found.memory, found.epoch
    terms = {"base": memory.base, "adapter": memory.adapter, "gradients": memory.gradients}
    terms |= {"optimizer": memory.optimizer, "activations": memory.activations}
    facts = {
        "parameters": f"{found.trainable:,} of {found.total:,} are trained ({found.trainable / found.total:.2%})",
        "memory": f"{megabytes(memory.total)} = {' + '.join(f'{megabytes(n)} {name}' for name, n in terms.items())}",
        "held so far": f"{megabytes(memory.peak)} by this process",
        "examples": f"{epoch.examples:,} in {epoch.batches:,} batches an epoch",
    }
    if epoch.tokens is not None and epoch.padding is not None:
        facts["tokens"] = f"{epoch.tokens:,} an epoch, {epoch.padding:.1%} of the positions are padding"
    if epoch.loss_share is not None:
        facts["with loss"] = f"{epoch.targets:,} tokens ({epoch.loss_share:.1%})"
    steps = ", ".join(f"{seconds:.3g} s" for seconds in found.step_seconds)
    facts["learning rate"] = f"{found.rate:g} at the most"
    facts["steps"] = f"{found.steps:,} optimizer steps; tried: {steps}"
    facts["time"] = f"about {_duration(found.seconds)} of training on this machine, evaluation not counted"
    return facts


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def _aligned(facts: dict[str, str]) -> list[str]:
    width = max(map(len, facts))
    return [f"{name:{width}}  {text}" for name, text in facts.items()]
