"""``python recipe.yaml`` and ``accelerate launch recipe.yaml``: the hook that runs a recipe as a script."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHED_BY_HAND = sorted(ROOT.glob("recipes/*.yaml"))

OWN = """\
import multiprocessing, sys
print("loaded by", sys.argv, flush=True)
if __name__ != "__mp_main__" and multiprocessing.parent_process() is None:
    child = multiprocessing.get_context("spawn").Process(target=print, args=("child runs",))
    child.start()
    child.join()
    print("child ended with", child.exitcode, flush=True)
"""


def run(*arguments: str | Path, cwd: Path | str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with a space in its name and a recipe with a mistake, which ends the run before any heavy import."""
    folder = tmp_path / "my recipes"
    folder.mkdir()
    (folder / "r.yaml").write_text("policy:\n  modle: x\n")
    (folder / "link.yaml").symlink_to("r.yaml")
    (folder / "R.YML").write_text("policy:\n  modle: x\n")
    return folder


@pytest.mark.parametrize("name", ["r.yaml", "./r.yaml", "../my recipes/r.yaml", "link.yaml", "R.YML"])
def test_a_recipe_runs_as_a_script(name, folder):
    result = run(name, "--stepz=1", "--data.path=a b", cwd=folder)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines[0] == "command line: --stepz=1: unknown key; did you mean 'steps'?"
    assert f"{Path(name)}:2:3: policy.modle: unknown key; did you mean 'model'?" in lines


def test_it_runs_from_the_root_folder_and_with_options_of_python(folder):
    for options in ([], ["-I"]):
        result = run(*options, str(folder / "r.yaml").lstrip("/"), cwd="/")
        assert result.returncode == 2 and "did you mean 'model'?" in result.stderr


def test_a_missing_recipe_is_pythons_own_error(folder):
    result = run("missing.yaml", cwd=folder)
    assert result.returncode == 2
    assert "can't open file" in result.stderr and "Traceback" not in result.stderr


def test_child_processes_do_not_run_the_recipe_again(folder):
    (folder / "own.py").write_text(OWN)
    (folder / "r.yaml").write_text("policy:\n  modle: x\nadvantage: {use: 'own.py:f'}\n")
    result = run("r.yaml", "--steps=2", cwd=folder)
    assert result.stdout.splitlines() == [
        "loaded by ['r.yaml', '--steps=2']",
        "child runs",
        "child ended with 0",
    ]
    assert result.stderr.count("did you mean 'model'?") == 1


def test_other_scripts_are_left_alone(folder):
    (folder / "script.py").write_text("import sys; print('_posttrain_startup' in sys.modules)")
    assert run("script.py", "r.yaml", cwd=folder).stdout == "False\n"
    # If the main script is a recipe, the hook is installed once and claims nothing but the main script.
    claims = (
        "import sys; sys.argv[0] = 'r.yaml'; import _posttrain_startup as s; s.install(); s.install();"
        "print(sys.path_hooks.count(s.claim), s.claim('r.yaml').find_spec('os'));"
        "s.claim('link.yaml')"
    )
    result = run("-c", claims, cwd=folder)
    assert result.stdout == "1 None\n"
    assert result.stderr.splitlines()[-1] == "ImportError: not the main script"


@pytest.mark.parametrize("path", LAUNCHED_BY_HAND, ids=lambda path: path.name)
def test_python_without_posttrain_shows_how_to_install_it(path):
    """Python prints the first line that it cannot parse; in these recipes that line says what to install."""
    with pytest.raises(SyntaxError) as caught:
        compile(path.read_text(encoding="utf-8"), str(path), "exec")
    assert "This Python lacks posttrain: pip install posttrain" in (caught.value.text or "")


@pytest.mark.engine
def test_accelerate_launches_a_recipe(folder):
    for script in (["r.yaml"], ["-m", "posttrain", "r.yaml"]):
        launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
        result = run(*launch, *script, "--stepz=1", cwd=folder)
        assert "command line: --stepz=1: unknown key; did you mean 'steps'?" in result.stderr
        assert "did you mean 'model'?" in result.stderr
        assert "returned non-zero exit status 2" in result.stderr


@pytest.mark.engine
def test_the_wheel_puts_the_hook_at_the_root_of_site_packages(tmp_path):
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT]
    result = run(*build)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        hook = wheel.read("posttrain-startup.pth")
    assert hook == (ROOT / "startup" / "posttrain.pth").read_bytes()
    assert {"_posttrain_startup.py", "posttrain/commands/cli.py"} <= set(names)
    assert "posttrain-0.1.0.data/data/share/posttrain/recipes/grpo.yaml" in names
    tops = {name.partition("/")[0] for name in names} - {"posttrain-0.1.0.data", "posttrain-0.1.0.dist-info"}
    assert tops == {"posttrain", "reward_models", "_posttrain_startup.py", "posttrain-startup.pth"}
