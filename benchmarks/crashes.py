"""Kills runs of every kind at every change of the file system and at random moments, and goes on with them.

Each run that was killed or stopped by a signal goes on with ``--resume``, or starts anew where there is nothing to
resume. Then every file that it leaves is compared, byte by byte, with those of a run that was never stopped.

    python benchmarks/crashes.py --json benchmarks/results/crashes.json
    python benchmarks/crashes.py --json out.json --kinds decode label --moments 10 --writes 20

This process imports everything once and forks a child for each run, which makes a run cost about a second. A change of
the file system is a file that is opened for writing, or a name that appears, moves or disappears, as Python's audit
hooks report it. Signals at random moments are SIGKILL, SIGTERM and SIGINT in turn. Every third run that goes on after a
random moment is killed a second time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also: a process with threads cannot be forked

import yaml
from crash_kinds import Kind, contents, kinds, prepare
from kills import count_changes

from posttrain.commands.cli import main as posttrain
from posttrain.system.quiet import quiet
from posttrain.system.versions import versions

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONGEST = 300.0
"""Seconds after which a run counts as one that hangs."""


@dataclass
class Bench:
    """A kind of run, its uninterrupted result, and what is counted."""

    name: str
    kind: Kind
    folder: Path  # of the recipe; each trial gets a folder in it
    seconds: float = 0.0
    changes: int = 0
    result: dict[str, bytes] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", help="default: all")
    parser.add_argument("--moments", type=int, default=100, help="random moments of each kind")
    parser.add_argument("--writes", type=int, help="changes of the file system to kill at; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory(prefix="crashes-") as name:
        folder = Path(name)
        os.environ["POSTTRAIN_CACHE"] = str(folder / "unused")
        in_child(lambda: prepare(folder), folder / "log.txt")
        every = kinds(folder)
        chosen = options.kinds or list(every)
        report: dict[str, Any] = {"versions": versions(), "seed": options.seed, "kinds": {}}
        for each in chosen:
            bench = Bench(each, every[each], folder / each.replace(" ", "-"))
            run_kind(bench, options.moments, options.writes, random.Random(f"{options.seed} {each}"))
            shutil.rmtree(bench.folder)
            report["kinds"][each] = summary(bench)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any(each["problems"] for each in report["kinds"].values()) else 0


def run_kind(bench: Bench, moments: int, writes: int | None, chance: random.Random) -> None:
    """Runs a kind to its end twice, then ends it at every chosen moment and goes on."""
    bench.folder.mkdir()
    bench.recipe.write_text(yaml.safe_dump(bench.kind.settings, sort_keys=False), encoding="utf-8")
    folder = bench.folder / "trial"  # the same for all, since paths are part of what some runs write
    bench.changes = count_of_changes(bench, folder)
    bench.result = contents(folder)
    if moments:
        shutil.rmtree(folder)
        start = time.perf_counter()
        code = run(bench, folder)[0]
        bench.seconds = time.perf_counter() - start
        if problem := difference(bench, code, folder):
            bench.problems.append(f"two runs without a stop differ: {problem}")
    every_change = range(1, bench.changes + 1)
    at = every_change if writes is None else sorted(chance.sample(every_change, min(writes, bench.changes)))
    begun = time.perf_counter()
    for number in at:
        trial(bench, f"change {number}", signal.SIGKILL, chance, change=number)
    for number in range(moments):
        ended_by = SIGNALS[number % len(SIGNALS)]
        trial(bench, f"moment {number}", ended_by, chance, after=chance.uniform(0, bench.seconds))
    bench.counts["trials"] = len(at) + moments
    took = time.perf_counter() - begun
    print(f"{bench.name}: {dict(bench.counts)}, {len(bench.problems)} problems, {took:.0f} s", flush=True)


def trial(
    bench: Bench,
    name: str,
    ended_by: int,
    chance: random.Random,
    *,
    change: int | None = None,
    after: float | None = None,
) -> None:
    """Ends one run, goes on with it until it is whole, and compares the result."""
    folder = bench.folder / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    label = f"{name}, {signal.Signals(ended_by).name}"
    code = run(bench, folder, ended_by=ended_by, change=change, after=after)[0]
    ended = code == (-signal.SIGKILL if ended_by == signal.SIGKILL else 128 + ended_by)
    bench.counts[signal.Signals(ended_by).name if ended else "ended before the signal"] += 1
    if not ended and code != 0:
        bench.problems.append(f"{label}: exit code {code}: {tail(folder)}")
    if after is not None and ended and chance.random() < 1 / 3:
        run(bench, folder, "--resume", ended_by=signal.SIGKILL, after=chance.uniform(0, bench.seconds))
        bench.counts["killed again"] += 1
    code, said = run(bench, folder, "--resume")
    way = "resumed"
    if code == 2 and "nothing to resume" in said:
        code, said = run(bench, folder)
        way = "started anew"
    bench.counts[way] += 1
    if problem := difference(bench, code, folder):
        bench.problems.append(f"{label}, {way}: {problem}")


def difference(bench: Bench, code: int, folder: Path) -> str:
    """Says how a result differs from that of a run without a stop; empty if it does not."""
    if code:
        return f"exit code {code}: {tail(folder)}"
    found = contents(folder)
    names = [name for name in sorted(found.keys() | bench.result.keys()) if found.get(name) != bench.result.get(name)]
    return f"these files differ: {', '.join(names)}" if names else ""


def tail(folder: Path) -> str:
    """The last lines that a run printed."""
    log = folder / "log.txt"
    return log.read_text(encoding="utf-8", errors="replace")[-1500:] if log.is_file() else ""


def count_of_changes(bench: Bench, folder: Path) -> int:
    """Runs a kind to its end, and returns the number of changes that it makes to the file system.

    What the run imports is imported here too, so that the next runs find it.
    """
    counter, modules = bench.folder / "changes", bench.folder / "modules"

    def count() -> None:
        descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT)
        count_changes(folder, lambda number: os.pwrite(descriptor, f"{number:9d}".encode(), 0))

    code, said = run(bench, folder, before=count, after_all=lambda: modules.write_text("\n".join(sys.modules)))
    if code:
        raise RuntimeError(f"{bench.name} ends with exit code {code}:\n{said}")
    for name in modules.read_text().splitlines():
        with suppress(ImportError):  # such as modules that exist only inside another one
            importlib.import_module(name)
    return int(counter.read_text())


def run(
    bench: Bench,
    folder: Path,
    *arguments: str,
    ended_by: int = 0,
    change: int | None = None,
    after: float | None = None,
    before: Callable[[], Any] = lambda: None,
    after_all: Callable[[], Any] = lambda: None,
) -> tuple[int, str]:
    """Runs the command in a forked child, whose working folder is ``folder``.

    Args:
        ended_by: the signal that ends it.
        change: number of the change of the file system at which it ends.
        after: seconds after which it ends.
        before: called in the child before the command.
        after_all: called in the child after the command.

    Returns:
        The exit code, negative after a signal, and what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def end_at_change(number: int) -> None:
        if number == change:
            os.kill(os.getpid(), ended_by)

    def command() -> int:
        os.chdir(folder)
        before()
        if change is not None:
            count_changes(folder, end_at_change)
        code = posttrain([bench.kind.command, str(bench.recipe), *arguments])
        after_all()
        return code

    log = folder / "log.txt"
    code = in_child(command, log, ended_by, after)
    return code, tail(folder)


def in_child(work: Callable[[], Any], log: Path, ended_by: int = 0, after: float | None = None) -> int:
    """Forks, works in the child, and returns its exit code; sends it a signal after some seconds, if asked to."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
            with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
                status = work() or 0
        except BaseException as error:
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(status)
    for moment in _until_ended(child, LONGEST):
        if moment is None:
            break
        if after is not None and moment >= after:
            os.kill(child, ended_by)
            after = None
    return os.waitstatus_to_exitcode(_statuses.pop(child))


_statuses: dict[int, int] = {}  # of children that have ended


def _until_ended(child: int, longest: float) -> Iterator[float | None]:
    """Yields the seconds since the start until the child has ended; kills it after the longest time."""
    start = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _statuses[child] = status
            yield None
            return
        seconds = time.monotonic() - start
        if seconds > longest:
            os.kill(child, signal.SIGKILL)
        yield seconds
        time.sleep(0.002)


def summary(bench: Bench) -> dict[str, Any]:
    """The counts of a kind, for the file of results."""
    return {
        "seconds of a run": round(bench.seconds, 2),
        "changes of the file system": bench.changes,
        "files compared": len(bench.result),
        **bench.counts,
        "problems": bench.problems,
    }


if __name__ == "__main__":
    sys.exit(main())
