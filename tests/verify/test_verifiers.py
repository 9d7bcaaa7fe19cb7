"""Tests of verifiers and of the pool that runs them, with real worker processes and real time limits."""

from __future__ import annotations

import math as maths
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_model import make_tokenizer

from posttrain.errors import UserError, VerifierError
from posttrain.models.text import text_of, written_text
from posttrain.recipe.part import Part
from posttrain.recipe.resolve import resolve
from posttrain.verify import Verdict, VerifierPool
from posttrain.verify import functions as verifiers

EXAMPLES = Path(__file__).parents[2] / "examples"

USER_FILE = """
import asyncio, os, sys, time

def counts(completion, *, word, weight_of_word=1.0):
    return weight_of_word * completion.count(word)

def sees_everything(completion, **columns):
    return float(set(columns) == {"prompt", "word", "answer"})

def tokens(completion, *, completion_ids):
    return len(completion_ids)

def absent(completion, *, word=None):
    return None

def picky(completion, *, word):
    if completion == "bad":
        raise KeyError("no such unit")
    return 1.0

def odd(completion):
    return {"text": "yes", "nan": float("nan"), "list": [1], "bool": True, "coroutine": asyncio.sleep(0),
            "generator": (x for x in [1])}[completion]

def hangs(completion):
    while completion == "hang":
        pass
    return 1.0

def swallows(completion):
    while completion == "hang":
        try:
            time.sleep(1)
        except BaseException:
            pass
    return 1.0

def dies(completion):
    if completion == "die":
        os._exit(3)
    if completion == "exit":
        sys.exit("enough")
    return float(os.getpid())

async def waits(completion, *, seconds=0.2):
    await asyncio.sleep(seconds)
    if completion == "bad":
        raise ValueError("the judge is out")
    return 0.5

async def blocks(completion):
    time.sleep(30)

def batch(completions, prompts, completion_ids, word, scale=1.0, **columns):
    if completions[0] == "short":
        return [1.0]
    if completions[0] == "dict":
        return {i: 1.0 for i in range(len(completions))}
    if completions[0] == "bad":
        raise RuntimeError("a whole batch")
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    assert len(prompts) == len(completion_ids) == len(word) == len(columns["answer"]) and "prompt" not in columns
    return [None if text == "skip" else scale * len(ids) for text, ids in zip(texts, completion_ids)]

async def async_batch(prompts, completions, **columns):
    await asyncio.sleep(0.01)
    return [float(len(completion)) for completion in completions]

class Remembers:
    def __init__(self, *, start=0):
        self.calls = start
    def __call__(self, completion):
        self.calls += 1
        return self.calls
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "own.py"
    path.write_text(USER_FILE)
    return path


@pytest.fixture
def part(user_file: Path):
    """Makes parts: ``part(name, weight=..., time_limit=..., on_error=..., **options)`` of the user's file."""

    def make(name: str, *, weight=1.0, time_limit=10.0, on_error="stop", **options) -> Part:
        spec = f"{user_file}:{name}"
        settings = {"name": name, "spec": spec, "weight": weight, "time_limit": time_limit, "on_error": on_error}
        return Part.of(resolve(spec), settings=settings, **options)

    return make


ROW = {"prompt": "say it", "word": "a", "answer": "72"}


def verdicts(parts: list[Part], texts: list[str], row: dict = ROW):
    with VerifierPool(parts, workers=1) as pool:
        for i, text in enumerate(texts):
            pool.submit(i, text, list(range(len(text))), row, place=f"problems.jsonl:{i + 1}")
        return list(pool.collect().values()), pool.failures


def scores(parts: list[Part], texts: list[str], row: dict = ROW) -> list[float]:
    return [verdict.score for verdict in verdicts(parts, texts, row)[0]]


# --- the other verifiers of the package ---------------------------------------------------------------------------


def test_format() -> None:
    assert verifiers.format("<think>\nhm\n</think>\n72") == 1.0
    assert verifiers.format("<think>hm</think>") == 0.0, "no answer"
    assert verifiers.format("72") == 0.0
    assert verifiers.format("<think>a<think>b</think>72") == 0.0
    assert verifiers.format("a=1", pattern=r"\w=\d") == 1.0
    assert verifiers.format("a=1;", pattern=r"\w=\d") == 0.0, "the whole completion is to match"
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression.*position"):
        verifiers.format("a", pattern="(")


def test_exact_and_length() -> None:
    assert verifiers.exact(" Yes\n", answer="Yes") == 1.0
    assert verifiers.exact(" Yes\n", answer="Yes", strip=False) == 0.0
    assert verifiers.exact("YES", answer="yes") == 0.0
    assert verifiers.exact("YES", answer="yes", casefold=True) == 1.0
    assert verifiers.length("one two three", minimum=3, maximum=3) == 1.0
    assert verifiers.length("one two three", maximum=2) == 0.0
    assert verifiers.length("one two three", maximum=2, margin=1) == 0.5
    assert verifiers.length("one two three", minimum=5, margin=3) == 0.5
    assert verifiers.length("1234", maximum=3, unit="characters") == 0.0
    with pytest.raises(ValueError, match="maximum 1 is below minimum 2"):
        verifiers.length("", minimum=2, maximum=1)
    with pytest.raises(ValueError, match="words or characters"):
        verifiers.length("", unit="lines")  # type: ignore[arg-type]


def test_format_where_the_template_opens_the_thought() -> None:
    opened = "<|user|>3 * 24?<|assistant|><think>\n"
    assert verifiers.format("hm</think>72", prompt_text=opened) == 1.0
    assert verifiers.format("hm</think>72", prompt_text="<|user|>3 * 24?<|assistant|>") == 0.0
    assert verifiers.format("<think>hm</think>72", prompt_text=opened) == 0.0, "opened twice"


def test_verifiers_read_what_was_written(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("<think>3 * 24</think>72<|end|>")["input_ids"]
    text = written_text(tokenizer)(ids)
    assert text == "<think>3 * 24</think>72", "all but the token that ended it"
    plain = Part.of(verifiers.exact, settings={"special_tokens": False}, answer="3 * 2472")
    parts = [Part.of(verifiers.format), Part.of(verifiers.math), plain]
    with VerifierPool(parts, plain_text=text_of(tokenizer)) as pool:
        pool.submit(0, text, ids, {"answer": "72"}, finish="stopped")
        assert pool.collect()[0].values == {"format": 1.0, "math": 1.0, "exact": 1.0}
        pool.submit(1, text, ids, {"answer": "72"}, finish="length", prompt_text="<think>")
        assert pool.collect()[1].values == {"format": 0.0, "math": 0.0, "exact": 1.0}


# --- the pool -----------------------------------------------------------------------------------------------------


def test_built_in_verifiers_need_no_process() -> None:
    parts = [Part.of(verifiers.math), Part.of(verifiers.format), Part.of(verifiers.exact), Part.of(verifiers.length)]
    before = multiprocessing.active_children()
    with VerifierPool(parts) as pool:
        for i, text in enumerate(["<think>3 * 24</think>#### 72", "\\boxed{71}"]):
            pool.submit(i, text, [], ROW)
        assert [verdict.score for verdict in pool.collect().values()] == [1 + 1 + 0 + 1, 0 + 0 + 0 + 1]
        assert multiprocessing.active_children() == before


def test_columns_options_weights_and_names(part) -> None:
    parts = [part("counts", weight=0.5), part("counts", weight_of_word=3.0), part("sees_everything"), part("tokens")]
    results, failures = verdicts(parts, ["banana"])
    assert results[0].values == {"counts": 3.0, "counts (2)": 9.0, "sees_everything": 1.0, "tokens": 6.0}
    assert results[0].score == 0.5 * 3 + 9 + 1 + 6
    assert not failures


def test_none_does_not_apply(part) -> None:
    results, _ = verdicts([part("absent")], ["x"])
    assert maths.isnan(results[0].score) and results[0].values == {"absent": None}
    assert scores([part("absent"), part("counts", weight=2.0)], ["aa"]) == [4.0]


def test_symbolic_answers_go_to_a_worker() -> None:
    row = {**ROW, "answer": "(x+1)^2"}
    texts = ["\\boxed{x^2+2x+1}", "\\boxed{x^2+1}", "it is $1+2x+x^2$"]
    assert scores([Part.of(verifiers.math)], texts, row) == [1.0, 0.0, 1.0]


@pytest.mark.engine
def test_a_completion_that_sympy_cannot_settle_is_wrong_and_counted() -> None:
    verifier = Part.of(verifiers.math, settings={"time_limit": 1.5})
    results, failures = verdicts(
        [verifier], ["\\boxed{(a+b+c+d)^{60}}", "\\boxed{(a+b+c+e)^{60}}"], {"answer": "(a+b+c+e)^{60}"}
    )
    assert [verdict.score for verdict in results] == [0.0, 1.0]
    assert failures == {"math": 1}


def test_objects_keep_their_memory_in_the_worker(part) -> None:
    assert scores([part("Remembers", start=10)], ["a", "b"]) == [11.0, 12.0]


def test_verdicts_come_in_the_order_of_keys(part) -> None:
    with VerifierPool([part("tokens")], workers=2) as pool:
        for key in [(1, 0), (0, 1), (0, 0), (1, 1)]:
            pool.submit(key, "x", [0] * (10 * key[0] + key[1]), ROW)
        with pytest.raises(ValueError, match="submitted already"):
            pool.submit((1, 1), "x", [], ROW)
        assert {key: verdict.score for key, verdict in pool.collect().items()} == {
            (0, 0): 0.0, (0, 1): 1.0, (1, 0): 10.0, (1, 1): 11.0,
        }  # fmt: skip
        assert pool.collect() == {}


def test_a_verifier_that_raises_stops_with_everything_one_needs(part) -> None:
    with pytest.raises(VerifierError) as caught:
        verdicts([part("picky")], ["good", "bad"])
    message = str(caught.value)
    for expected in [
        "verifier 'picky' raised KeyError",
        "problems.jsonl:2",
        "'word': 'a'",
        "'bad'",
        "own.py",
        "no such unit",
    ]:
        assert expected in message
    assert "worker.py" not in message, "the frames of the package are left out"
    assert not isinstance(caught.value, UserError)


def test_on_error_skip_leaves_the_completion_unscored(part) -> None:
    results, failures = verdicts([part("picky", on_error="skip"), part("counts")], ["bad", "a good one"])
    assert maths.isnan(results[0].score) and results[0].values == {"picky": None, "counts": 1.0}
    assert results[1].score == 1.0 + 1.0
    assert failures == {"picky": 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("text", r"returned 'yes' \(str\); it must return a number or None"),
        ("nan", "returned nan; it must return a finite number"),
        ("list", r"returned \[1\] \(list\)"),
        ("coroutine", "returned a coroutine: declare it `async def`"),
        ("generator", "returned a generator: use `return` in place of `yield`"),
    ],
)
def test_values_are_numbers(part, text: str, problem: str) -> None:
    with pytest.raises(VerifierError, match=problem):
        verdicts([part("odd")], [text])


def test_booleans_are_numbers(part) -> None:
    assert scores([part("odd")], ["bool"]) == [1.0]


@pytest.mark.parametrize("name", ["hangs", "swallows"])
def test_time_limit_kills_what_never_ends(part, name: str) -> None:
    start = time.perf_counter()
    results, failures = verdicts([part(name, time_limit=0.5, on_error="skip")], ["hang", "fine"])
    assert [verdict.values[name] for verdict in results] == [None, 1.0]
    assert failures == {name: 1} and time.perf_counter() - start < 10


def test_time_out_is_an_error_by_default(part) -> None:
    with pytest.raises(VerifierError, match=r"verifier 'hangs' took longer than 0.5 s \(`time_limit`"):
        verdicts([part("hangs", time_limit=0.5)], ["hang"])


@pytest.mark.engine
def test_a_dead_worker_is_an_error_not_a_hang(part) -> None:
    with pytest.raises(VerifierError, match=r"verifier 'dies' ended its worker process \(exit code 3\)"):
        verdicts([part("dies")], ["die"])
    with pytest.raises(VerifierError, match="verifier 'dies' raised SystemExit: enough"):
        verdicts([part("dies")], ["exit"])
    results, failures = verdicts([part("dies", on_error="skip")], ["die", "live", "live"])
    assert results[1].score == results[2].score != os.getpid()
    assert failures == {"dies": 1}


@pytest.mark.engine
def test_idle_workers_that_are_killed_are_replaced(part) -> None:
    with VerifierPool([part("counts")], workers=2) as pool:
        pool.submit(0, "a b", [], {"word": "b"})
        assert pool.collect()[0].score == 1.0
        signal_workers(signal.SIGKILL)
        assert pool._processes is not None
        while pool._processes.active:
            time.sleep(0.01)
        pool.submit(1, "b b", [], {"word": "b"})
        assert pool.collect()[1].score == 2.0


@pytest.mark.engine
def test_calls_that_wait_for_workers_which_are_killed_are_failures(part) -> None:
    with VerifierPool([part("counts")], workers=1) as pool:
        pool.submit(0, "a b", [], {"word": "b"})
        pool.collect()
        signal_workers(signal.SIGSTOP)
        pool.submit(1, "b b", [], {"word": "b"})
        signal_workers(signal.SIGKILL)
        with pytest.raises(VerifierError, match="verifier 'counts' lost its worker processes"):
            pool.collect()


def signal_workers(number: signal.Signals) -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, number)


def test_async_verifiers_wait_together(part) -> None:
    start = time.perf_counter()
    assert scores([part("waits", seconds=0.3)], ["x"] * 60) == [0.5] * 60
    assert time.perf_counter() - start < 3, "60 waits of 0.3 s take 18 s one by one"


def test_async_verifiers_fail_like_synchronous_ones(part) -> None:
    with pytest.raises(VerifierError, match="verifier 'waits' raised ValueError: the judge is out"):
        verdicts([part("waits", seconds=0.0)], ["fine", "bad"])
    results, failures = verdicts([part("waits", seconds=5.0, time_limit=0.2, on_error="skip")], ["x", "y"])
    assert all(maths.isnan(verdict.score) for verdict in results) and failures == {"waits": 2}


@pytest.mark.engine
def test_an_async_verifier_that_blocks_its_thread_is_an_error_not_a_hang(part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.verify.event_loop.GRACE", 0.3)
    start = time.perf_counter()
    with pytest.raises(VerifierError, match="'blocks' took longer than 0.2 s"):
        verdicts([part("blocks", time_limit=0.2)], ["x", "y"])
    assert time.perf_counter() - start < 6


def test_batch_functions_of_trl(part) -> None:
    results, _ = verdicts([part("batch", scale=2.0), part("counts")], ["ab", "skip", "abc"])
    assert [verdict.values["batch"] for verdict in results] == [4.0, None, 6.0]
    assert [verdict.score for verdict in results] == [5.0, 0.0, 7.0]
    assert scores([part("async_batch")], ["ab", "c"]) == [2.0, 1.0]


def test_batch_functions_get_messages_where_the_prompt_is_a_chat() -> None:
    from trl.rewards import accuracy_reward, think_format_reward

    row = {"prompt": [{"role": "user", "content": "3 * 24?"}], "solution": "$72$"}
    parts = [Part.of(think_format_reward), Part.of(accuracy_reward, settings={"weight": 10.0})]
    assert scores(parts, ["<think>a</think> $\\boxed{72}$", "$\\boxed{71}$"], row) == [11.0, 0.0]


def test_batch_functions_that_fail(part) -> None:
    with pytest.raises(VerifierError, match="verifier 'batch' returned 1 values for 2 completions"):
        verdicts([part("batch")], ["short", "x"])
    with pytest.raises(VerifierError, match=r"returned \{0: 1.0.*\} \(dict\); it must return a list"):
        verdicts([part("batch")], ["dict", "x"])
    results, failures = verdicts([part("batch", on_error="skip"), part("counts")], ["bad", "x"])
    assert all(maths.isnan(verdict.score) for verdict in results) and failures == {"batch": 2}


def test_a_function_of_this_process_alone_is_refused() -> None:
    def local(completion: str) -> float:
        return 1.0

    with pytest.raises(TypeError, match="'local' cannot be sent to a worker process: define it at the top level"):
        VerifierPool([Part.of(local)])


def test_columns_that_cannot_be_sent_are_an_error(part) -> None:
    with pytest.raises(VerifierError, match="cannot be sent to a worker process"):
        verdicts([part("counts")], ["x"], {"word": lambda: 0})


@pytest.mark.engine
def test_the_pool_goes_on_after_an_error_and_close_leaves_no_process(part) -> None:
    before = set(multiprocessing.active_children())
    with VerifierPool([part("hangs", time_limit=0.5)], workers=2) as pool:
        for i, text in enumerate(["hang", "hang", "fine"]):
            pool.submit(i, text, [], ROW)
        with pytest.raises(VerifierError):
            pool.collect()
        pool.submit(0, "fine", [], ROW)
        assert pool.collect()[0].score == 1.0
        assert set(multiprocessing.active_children()) - before
    assert set(multiprocessing.active_children()) == before
    pool.close()


@pytest.mark.engine
def test_memory_does_not_grow_with_the_number_of_completions(part) -> None:
    with VerifierPool([part("tokens"), Part.of(verifiers.math)], workers=1) as pool:

        def rounds(n: int) -> int:
            for _ in range(n):
                for i in range(200):
                    pool.submit(i, "x" * 20_000 + "#### 72", [0] * 1000, ROW)
                pool.collect()
            return resident()

        first = rounds(3)
        assert rounds(6) - first < 20_000_000, "1,200 completions of 28 kB more: what is kept would show"


def resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.engine
@pytest.mark.parametrize("how", ["plain", "killed"])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, user_file: Path, how: str) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\n"
        "from posttrain.training.recipe import Part\n"
        "from posttrain.recipe.resolve import resolve\n"
        "from posttrain.verify import VerifierPool\n"
        "if __name__ == '__main__':\n"
        f"    spec = '{user_file}:dies'\n"
        "    pool = VerifierPool([Part.of(resolve(spec), settings={'spec': spec})], workers=1)\n"
        "    pool.submit(0, 'x', [], {})\n"
        "    print(int(pool.collect()[0].score), flush=True)\n"
        "    if sys.argv[1] == 'killed':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, script, how], capture_output=True, text=True, timeout=60)
    assert ended.stdout, ended.stderr
    worker = int(ended.stdout.split()[0])
    deadline = time.perf_counter() + 10
    while Path(f"/proc/{worker}").exists() and time.perf_counter() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists(), ended.stderr


def test_examples_of_own_verifiers() -> None:
    row = {"prompt": [{"role": "user", "content": "How far?"}], "answer": "65 * 3 = 195 km.\n#### 195", "unit": "km"}
    parts = []
    for spec in ["my_verifier.py:has_unit", "trl_reward.py:short_enough"]:
        file, _, name = spec.partition(":")
        full = f"{EXAMPLES / file}:{name}"
        parts.append(Part.of(resolve(full), settings={"name": spec, "spec": full}))
    results, _ = verdicts([*parts, Part.of(verifiers.math)], ["It covers\n#### 195 km", "far " * 50], row)
    assert [list(verdict.values.values()) for verdict in results] == [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    no_unit, _ = verdicts(parts[:1], ["#### 195"], {**row, "unit": None})
    assert maths.isnan(no_unit[0].score)


def test_a_recipe_without_verifiers_scores_zero_so_that_reward_parts_alone_can_train():
    assert verdicts([], ["anything"])[0] == [Verdict(0.0, {})]
