"""``posttrain iterate recipes/iterate/ivo.yaml``: the outer loop, in which recipes feed each other, round after round.

A stage is a recipe file with settings that override it. Stages run in the order in which they are written, ``rounds``
times::

    rounds: 3
    stages:
      values:
        train: ../value/ivo_value.yaml
        later: {decoder: {use: shaped, strength: 2.0, score: {use: value}}}     # from the second round on
        from: {decoder.score.model: values.value}                               # setting: stage.output
      held_out:
        decode: ../decode/ivo.yaml
        from: {decoder.score.model: values.value}
    table: {guided reward: held_out.score}

``from`` takes the newest output there is: that of this round if the stage comes earlier in the round, else that of the
round before. In the first round there may be none; then the setting stays as the recipe has it. ``from_all`` takes the
list of all outputs so far.

In round k the seed of training and labelling is the recipe's seed + k - 1, so that no two rounds draw the same samples.
Decoding and evaluation keep their seed, so that rounds are compared on the same random numbers.

Everything is in one folder, ``runs/<name>``: ``round-1/<stage>/``, and ``rounds.jsonl`` with a line for each finished
stage, its outputs and its metrics.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.commands.decode import run_decode
from posttrain.commands.evaluate import run_suite
from posttrain.commands.iterate_plan import PLACES, Kind, Plan, check_stages
from posttrain.commands.iterate_state import note_done, open_rounds, show_rounds
from posttrain.commands.label import run_labels
from posttrain.commands.train import run_train
from posttrain.errors import OUT_OF_TIME, Stopped, UserError
from posttrain.output.kept_work import KeptWork, record_of
from posttrain.output.run_folder import RunFolder
from posttrain.recipe.yaml_reader import Document, Location, Overrides, dotted
from posttrain.system.interrupts import raise_if_arrived


def run_iterate(path: str | Path, overrides: Overrides = (), *, resume: bool = False) -> Path:
    """Runs all stages of all rounds. Stages that are done already are not run again.

    Args:
        resume: go on with the rounds in the folder; an unfinished training stage resumes from its own checkpoints.

    Returns:
        The folder of all rounds.

    Raises:
        UserError: if the recipe of any stage is wrong, which shows before anything runs, or a stage fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "posttrain iterate is one process, which starts the processes of each stage: leave the launcher out, and "
            "name it in `--launch='accelerate launch --num_processes 8'`"
        )
    plan = Plan.read(Path(path), overrides)
    check_stages(plan)
    done = open_rounds(plan, resume=resume)
    for number in range(1, plan.recipe.rounds + 1):
        for name in plan.recipe.stages:
            if any((number, name) == stage[:2] for stage in done):
                continue
            raise_if_arrived()  # a signal at the end of a stage that was finished all the same
            print(f"\n== round {number} of {plan.recipe.rounds}, {name}: {plan.file(name).name}", flush=True)
            with saying_which_stage(number, name):
                run_stage(plan, number, name)
            done.append(note_done(plan, number, name))
    show_rounds(plan.recipe, done)
    return plan.recipe.root


@contextmanager
def saying_which_stage(number: int, name: str) -> Iterator[None]:
    """Adds the stage to the message of a signal."""
    try:
        yield
    except KeyboardInterrupt as raised:
        stopped = raised if isinstance(raised, Stopped) else Stopped()
        said = f"{stopped.message}\n" if stopped.message else ""
        message = f"{said}that was stage {name} of round {number}; --resume goes on with it"
        raise Stopped(message, stopped.code) from None


def run_stage(plan: Plan, number: int, name: str) -> None:
    """Runs one stage of a round, from where it stopped if it had begun.

    Raises:
        UserError: if the stage fails; the message says where and what to change.
    """
    kind, file = plan.recipe.stages[name].kind, plan.file(name)
    settings, folder = plan.settings(number, name), plan.folder(number, name)
    begun = _has_begun(kind, folder)
    if not begun:  # a kill may have left a folder that cannot be resumed
        shutil.rmtree(folder, ignore_errors=True)
    if plan.recipe.launch is not None:
        launch_stage(plan.recipe.launch, kind, file, [*as_arguments(settings), *["--resume"] * begun])
    else:
        commands = {"train": run_train, "decode": run_decode, "label": run_labels, "eval": run_suite}
        commands[kind](file, settings, resume=begun)


def _has_begun(kind: Kind, folder: Path) -> bool:
    """True if a stage has left something in its folder that it can go on with."""
    if kind == "train":
        return RunFolder(folder).recipe.is_file()
    output = folder if kind == "eval" else folder / PLACES[kind][1]
    record = output / "suite.yaml" if kind == "eval" else record_of(output)
    work = KeptWork(output, record, {})
    return work.begun or (output.exists() and record.is_file())


def launch_stage(launcher: str, kind: Kind, file: Path, arguments: Sequence[str]) -> None:
    """Runs a stage as a program of its own, on the processes that a launcher starts.

    Raises:
        UserError: if it fails; its own message is on the screen already.
    """
    command = [*shlex.split(launcher), "-m", "posttrain", kind, str(file), *arguments]
    code = run_forwarding(command)
    if code == OUT_OF_TIME:
        raise Stopped(code=code)
    if code:
        raise UserError(f"{shlex.join(command)}: ended with exit code {code}; `--resume` goes on with this stage")


def run_forwarding(command: Sequence[str]) -> int:
    """Runs a program, passes signals on to it, and waits until it has saved its state; returns its exit code.

    Raises:
        Stopped: after a signal, once the program has ended.
    """
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except Stopped as stopped:
            process.send_signal(stopped.code - 128)
            process.wait()
            raise


def as_arguments(settings: Sequence[Document]) -> list[str]:
    """Writes settings as ``--key.path=value``; a part is one value, and relative paths stay as they are."""
    leaves: dict[str, Any] = {}
    for document in settings:
        leaves |= _leaves(document.data)
    return [f"--{key}={json.dumps(value)}" for key, value in leaves.items()]


def _leaves(value: Any, at: Location = ()) -> dict[str, Any]:
    is_leaf = not isinstance(value, dict) or (at and not value) or (len(at) == 1 and "use" in value)
    if is_leaf:
        return {dotted(at): value}
    return {key: leaf for name, child in value.items() for key, leaf in _leaves(child, (*at, name)).items()}
