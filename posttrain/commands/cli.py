"""The command line: ``posttrain train | eval | label | decode | iterate | serve | show FILE [--key.path=value]...``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from posttrain.errors import Stopped, UserError
from posttrain.system.interrupts import end_by_signals, signal_name
from posttrain.system.launcher import end_with_launcher
from posttrain.system.screen import lasting_screen

SUFFIXES = (".yaml", ".yml")
EPILOG = """\
Settings of the recipe are overridden by --key.path=value, with the value in YAML:

  posttrain train recipes/grpo.yaml --steps=20 --loss.0.high=0.28 --run.trackers='[wandb]'

`posttrain RECIPE` and `python -m posttrain RECIPE` are `posttrain train RECIPE`. On several processes:
`accelerate launch --config_file recipes/hardware/multi_gpu.yaml recipes/grpo.yaml`.
"""


class Command(NamedTuple):
    """A command. What it runs is named in a string, and imported only when the command runs."""

    run: str  # function: (path, overrides) -> anything; it also takes ``resume`` if the command can resume
    help: str
    file: str = "recipe"  # name of the file argument in the help
    resume: str | None = None  # help of ``--resume``; None: the command has no such option
    quiet: bool = True  # keeps libraries quiet
    patient: bool = True  # makes waiting threads sleep
    extra: str | None = None  # optional dependencies that the command needs


COMMANDS = {
    "train": Command(
        "posttrain.commands.train.run_train",
        "run a recipe",
        resume="go on from the newest checkpoint in the run folder",
    ),
    "eval": Command(
        "posttrain.commands.evaluate.run_suite",
        "run an evaluation suite, such as eval/value.yaml",
        file="suite",
        resume="go on with what is kept of the report",
    ),
    "label": Command(
        "posttrain.commands.label.run_labels",
        "label reasoning steps by sampling, as in recipes/label",
        resume="go on with the labels that are kept",
    ),
    "decode": Command(
        "posttrain.commands.decode.run_decode",
        "complete prompts with a decoder, as in recipes/decode",
        resume="go on with the completions that are kept",
    ),
    "iterate": Command(
        "posttrain.commands.iterate.run_iterate",
        "run recipes that feed each other, as in recipes/iterate",
        resume="go on with the rounds in the folder",
    ),
    "serve": Command(
        "posttrain.serving.server.run_serve",
        "answer OpenAI's clients, as in recipes/serve/guided.yaml",
        patient=False,
        extra="serve",
    ),
    "show": Command(
        "posttrain.commands.show.show_file",
        "print what a file runs: parts, equations, papers, settings",
        quiet=False,
        patient=False,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 after a mistake in the input, 1 after a check that failed,
    or that of a :class:`Stopped`.

    A mistake in the input is reported as a message without a traceback. After Ctrl-C the code is 130, after SIGTERM
    143, after SIGHUP 129, and 75 for a run that ended at ``run.stop_after``.
    """
    with lasting_screen():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0].lower().endswith(SUFFIXES):
        arguments.insert(0, "train")
    overrides = [argument for argument in arguments if argument.startswith("--") and "=" in argument]
    # argparse does not see the overrides: it would take one with a space in it for a file.
    options, unknown = _parser().parse_known_args([argument for argument in arguments if argument not in overrides])
    try:
        if unknown:
            raise UserError(f"command line: {' '.join(unknown)}: an override looks like --section.key=value")
        with end_by_signals():
            end_with_launcher()
            _run(options, overrides)
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt as raised:
        stopped = raised if isinstance(raised, Stopped) else Stopped()
        if os.environ.get("RANK", "0") == "0":  # one message for all processes
            name = signal_name(stopped.code) or "run.stop_after"
            print(f"{name}: {stopped.message or 'stopped'}", file=sys.stderr)
        return stopped.code


def _parser() -> argparse.ArgumentParser:
    common = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EPILOG, "allow_abbrev": False}
    parser = argparse.ArgumentParser("posttrain", description="Post-training of language models.", **common)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, **common)
        subparser.add_argument("file", type=Path, help="YAML file", metavar=command.file)
        if command.resume is not None:
            subparser.add_argument("--resume", action="store_true", help=command.resume)
    return parser


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    command = COMMANDS[options.command]
    if command.patient:
        # Threads that wait for each other sleep: where cores are shared with verifiers and with other people, spinning
        # costs far more than it saves. OpenMP reads this when torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if command.quiet:
        from posttrain.system.quiet import quiet

        quiet()
    module, _, function = command.run.rpartition(".")
    try:
        run = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if command.extra is None:
            raise
        install = f"pip install 'posttrain[{command.extra}]'"
        raise UserError(f"posttrain {options.command}: {error.name} is not installed: {install}") from error
    run(options.file, overrides, **({"resume": options.resume} if command.resume is not None else {}))
