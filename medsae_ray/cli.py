"""`medsae COMMAND …`: settings from defaults, YAML and flags; bad input is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from medsae_ray.config import Settings
from medsae_ray.errors import InputError
from medsae_ray.pipeline import ASKING, EXPERIMENTS, STAGES, run_stages
from medsae_ray.run import Run

HELP = {
    "pipeline": "all stages in order, each skipped where it is done",
    "radiographs": "read the data set's tables (or generate phantoms)",
    "embed": "radiographs to embeddings",
    "fit": "embeddings to a sparse autoencoder",
    "sweep": "many sparse autoencoders at once; the best becomes the run's",
    "encode": "embeddings to sparse activations",
    "measure": "activations and labels to the neuron table and the summary",
    "controls": "the neurons' figures beside those of units that no SAE has learned",
    "panels": "activations to the radiographs that stand for each neuron",
    "atlas": "what a neuron's card shows: radiographs, neighbours, acquisition, the map of neurons",
    "localise": "where in a radiograph a neuron fires, and whether the finding lies there",
    "name": "panels to a concept and a description a neuron, by a vision-language model",
    "detect": "names put to the test on radiographs of other patients, and the statistics of it",
    "report": "the neuron atlas: pages that open from disk (--open, --serve)",
    "replicate": "the paper's settings under both conventions of normalisation, beside its figures",
    "expansion": "entropy, FVE and dead neurons at several expansions and one λ",
    "architectures": "six architectures at equal L0 and equal FVE: dead neurons, entropy, AUROC",
    "diagnose": "which failure signatures a run meets, what to change, and the next sweep",
    "status": "what a run holds: stages, rows, quarantined, seconds, stale or fresh",
    "weights": "where MedCLIP's weights come from; checks a file and prints its SHA-256",
}

SWITCHES = {"--overwrite": "--overwrite", "--dry-run": "--dry_run"}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `medsae` command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    with_exit_code(lambda: _dispatch(command, rest))


def job(command: str) -> None:
    """Entry point of `jobs/<command>.py`: the same settings and functions as `medsae <command>`."""
    with_exit_code(lambda: _dispatch(command, sys.argv[1:]))


def with_exit_code(work: Callable[[], object]) -> None:
    """Run `work()`; an InputError becomes one sentence on stderr and exit code 2."""
    try:
        work()
    except Exception as error:
        told = _sentence_of(error)
        if told is None:
            raise
        print(f"medsae: {told}", file=sys.stderr)
        raise SystemExit(2) from None


def _sentence_of(error: BaseException) -> str | None:
    """What to tell of an error that the user caused; None for any other, which deserves its traceback."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return str(cause)
        # Ray wraps what a worker raised.
        cause = getattr(cause, "cause", None) or cause.__cause__
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        # Without the file's name: that of an image would name the patient.
        return (
            f"A folder or file cannot be used ({error.strerror}): check the run folder and radiographs.root."
        )
    return None


def _dispatch(command: str, rest: list[str]) -> None:
    if command in ("status", "diagnose"):
        _describe(command, rest)
    elif command == "weights":
        _weights(rest)
    elif command == "report":
        _report(rest)
    elif command == "pipeline":
        run_stages(STAGES, parse_settings(command, rest))
    elif command in (*STAGES, "sweep"):
        run_stages((command,), parse_settings(command, rest))
    elif command in EXPERIMENTS:
        run_stages(("radiographs", "embed", command), parse_settings(command, rest))
    elif command in ("-h", "--help"):
        width = max(map(len, HELP))
        print("usage: medsae COMMAND [--config FILE.yaml] [--run RUN] [--stage.field VALUE …]\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in HELP.items()))
        print("\n`medsae COMMAND --help` shows every setting with its default.")
    else:
        raise InputError(
            f"There is no command {command!r}{_nearest(command, HELP)}: the commands are {', '.join(HELP)}."
        )


def parse_settings(command: str, arguments: list[str]) -> Settings:
    """Settings from defaults, the YAML file after `--config`, and flags, the later winning.

    Raises InputError naming the key that is unknown (with the nearest known one) or out of its range.
    """
    parser = _parser(command)
    # `--overwrite` and `--dry-run` alone are enough.
    following = [*arguments[1:], ""]
    arguments = [
        f"{SWITCHES[a]}=true" if a in SWITCHES and b.lower() not in ("true", "false") else SWITCHES.get(a, a)
        for a, b in zip(arguments, following, strict=False)
    ]
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except argparse.ArgumentError as error:
        told = str(error)
        if "Unexpected config" in told:
            told = f"The settings file {_after(arguments, '--config')} does not map stages to settings"
        if "parsing config" in told:
            told = f"The settings file {_after(arguments, '--config')} is not YAML: {told}"
        raise InputError(_sentence(told, _keys())) from None
    values = {f.name: parsed[f.name] for f in dataclasses.fields(Settings)}
    return Settings(**values)


def _parser(command: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"medsae {command}", description=HELP[command], exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it win")
    parser.add_class_arguments(Settings, fail_untyped=True)
    stages = {command} if command in STAGES else set(STAGES)
    if command == "sweep":
        stages = {"fit", "sweep"}
    if command in EXPERIMENTS:
        stages = {"radiographs", "embed", "fit", "sweep", "measure", "experiment"}
    shown = {"config", "run", "overwrite", "ray", "help", *stages}
    if stages & set(ASKING):
        shown |= {"medgemma", "dry_run"}
    if command == "pipeline":
        shown |= {"until"}
    for action in parser._actions:
        if action.dest.split(".")[0] not in shown or (
            action.option_strings == [f"--{action.dest}"]
            and (action.dest in {*STAGES, "sweep", "experiment", "medgemma", "ray"})
        ):
            action.help = argparse.SUPPRESS
    return parser


def _after(arguments: list[str], flag: str) -> str:
    """The value of the last `--flag VALUE` or `--flag=VALUE`."""
    told = ""
    for here, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if here == flag:
            told = following
        elif here.startswith(f"{flag}="):
            told = here.partition("=")[2]
    return told


def _keys() -> list[str]:
    hints = get_type_hints(Settings)
    keys = []
    for name, kind in hints.items():
        keys.append(name)
        if dataclasses.is_dataclass(kind):
            keys += [f"{name}.{f.name}" for f in dataclasses.fields(kind)]
    return keys


def _sentence(message: str, keys: list[str]) -> str:
    """jsonargparse's message as one sentence that names the nearest known key."""
    unknown = re.search(r"unrecognized arguments: (?:--)?([\w.]+)", message)
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    top_level = re.search(r"Option '([\w.]+)' is not accepted", message)
    if unknown or in_group or top_level:
        key = (
            ".".join(in_group.groups()) if in_group else (unknown or top_level).group(1)  # type: ignore[union-attr]
        )
        return f"There is no setting {key!r}{_nearest(key, keys)}."
    return " ".join(message.split()).rstrip(".") + "."


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _describe(command: str, arguments: list[str]) -> None:
    """`status` and `diagnose`: what the module of that name tells of a run folder."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise InputError(f"Name one run folder: medsae {command} RUN.")
    print(importlib.import_module(f"medsae_ray.{command}").describe(arguments[0]))


def _report(arguments: list[str]) -> None:
    """`medsae report RUN [--open] [--serve]`: make the report, then show it."""
    show = {"--open", "--serve"} & set(arguments)
    arguments = [argument for argument in arguments if argument not in show]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]
    settings = parse_settings("report", arguments)
    if show and not Run(settings.run).is_local:
        raise InputError(
            f"A browser cannot look into {settings.run}: make the report without "
            f"{' and '.join(sorted(show))}, copy its folder report to a disk and open index.html there."
        )
    run_stages(("report",), settings)
    if show:
        from medsae_ray.report.serve import open_report, serve_report

        folder = Path(Run(settings.run).path("report"))
        if "--serve" in show:
            serve_report(folder, browse="--open" in show)
        else:
            open_report(folder)


def _weights(arguments: list[str]) -> None:
    from medsae_ray.encoders import weights

    if arguments and arguments[0] in ("-h", "--help"):
        arguments = []
    if len(arguments) > 1:
        raise InputError("Name one checkpoint, a file or a folder: medsae weights [FILE].")
    print(weights.check(arguments[0]) if arguments else weights.describe())


if __name__ == "__main__":
    main()
