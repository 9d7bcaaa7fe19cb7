"""The command line: ``posttrain train | eval | label | decode | iterate | show FILE [--key.path=value]...``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from posttrain.errors import UserError

SUFFIXES = (".yaml", ".yml")
INTERRUPTED = 128 + 2  # as shells report a program that SIGINT ended
EPILOG = """\
Settings of the recipe are overridden by --key.path=value, with the value in YAML:

  posttrain train recipes/grpo.yaml --steps=20 --loss.0.high=0.28 --run.trackers='[wandb]'

`posttrain RECIPE` and `python -m posttrain RECIPE` are `posttrain train RECIPE`. On several processes:
`accelerate launch --config_file recipes/hardware/multi_gpu.yaml recipes/grpo.yaml`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 2 for a mistake that the user can mend, told without a traceback, and 130
    after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0].lower().endswith(SUFFIXES):
        arguments.insert(0, "train")
    overrides = [argument for argument in arguments if argument.startswith("--") and "=" in argument]
    # The others go to argparse alone: it would take an override with a space in it for a file.
    options, unknown = _parser().parse_known_args([argument for argument in arguments if argument not in overrides])
    try:
        if unknown:
            raise UserError(f"command line: {' '.join(unknown)}: an override looks like --section.key=value")
        _COMMANDS[options.command](options, overrides)
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        if os.environ.get("RANK", "0") == "0":  # one message for all processes
            print(str(stopped) or "stopped", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    common = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EPILOG, "allow_abbrev": False}
    parser = argparse.ArgumentParser("posttrain", description="Post-training of language models.", **common)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run a recipe", **common)
    train.add_argument("recipe", type=Path, help="YAML file")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder")
    evaluate = commands.add_parser("eval", help="run an evaluation suite, such as eval/value.yaml", **common)
    evaluate.add_argument("suite", type=Path, help="YAML file")
    label = commands.add_parser("label", help="label reasoning steps by sampling, as in recipes/label", **common)
    label.add_argument("recipe", type=Path, help="YAML file")
    decode = commands.add_parser("decode", help="complete prompts with a decoder, as in recipes/decode", **common)
    decode.add_argument("recipe", type=Path, help="YAML file")
    iterate = commands.add_parser("iterate", help="run recipes that feed each other, as in recipes/iterate", **common)
    iterate.add_argument("recipe", type=Path, help="YAML file")
    iterate.add_argument("--resume", action="store_true", help="go on with what is in the folder")
    serve = commands.add_parser("serve", help="answer OpenAI's clients, as in recipes/serve/guided.yaml", **common)
    serve.add_argument("recipe", type=Path, help="YAML file")
    show = commands.add_parser("show", help="print what a file runs: parts, equations, papers, settings", **common)
    show.add_argument("recipe", type=Path, help="YAML file")
    return parser


def _set_up() -> None:
    """Before torch is imported. Threads that wait for each other shall sleep: where cores are shared with verifiers and
    with other people, spinning costs far more than it saves."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from posttrain.system.quiet import quiet

    quiet()


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    _set_up()
    from posttrain.recipe.loading import placed
    from posttrain.training.recipe import load_recipe

    recipe = load_recipe(options.recipe, overrides)
    from posttrain.training.loop import train  # after loading: mistakes in a recipe show at once

    try:
        train(recipe, resume=options.resume)
    except UserError as error:
        raise placed(error, options.recipe, overrides) from error


def _show(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from posttrain.commands.show import show_file

    show_file(options.recipe, overrides)


def _eval(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    _set_up()
    from posttrain.commands.evaluate import run_suite

    run_suite(options.suite, overrides)


def _label(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    _set_up()
    from posttrain.commands.label import run_labels

    run_labels(options.recipe, overrides)


def _decode(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    _set_up()
    from posttrain.commands.decode import run_decode

    run_decode(options.recipe, overrides)


def _iterate(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    _set_up()
    from posttrain.commands.iterate import run_iterate

    run_iterate(options.recipe, overrides, resume=options.resume)


def _serve(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from posttrain.system.quiet import quiet

    quiet()
    try:
        from posttrain.serving.server import run_serve
    except ModuleNotFoundError as error:
        raise UserError(f"posttrain serve: {error.name} is not installed: pip install 'posttrain[serve]'") from error
    run_serve(options.recipe, overrides)


_COMMANDS = {
    "train": _train,
    "eval": _eval,
    "label": _label,
    "decode": _decode,
    "iterate": _iterate,
    "serve": _serve,
    "show": _show,
}
