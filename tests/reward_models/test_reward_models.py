"""Reward models as parts of a recipe, against Hugging Face's own forward pass, and judges behind a real server."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

import reward_models
from posttrain.batch import Batch, Finish
from posttrain.commands.evaluate import run_suite
from posttrain.data.rollout_files import write_rollouts
from posttrain.engines.base import Completion
from posttrain.errors import RecipeError, UserError
from posttrain.models.heads import Head
from posttrain.models.value import ValueModel, ValueSpec
from posttrain.models.value_files import save_value
from posttrain.parts.credit import step_ends
from posttrain.recipe import sections
from posttrain.rollout.rollouts import Prompts, to_batch
from posttrain.training.recipe import load_recipe
from posttrain.training.required_passes import find_required_passes
from reward_models.ensemble import reduce
from reward_models.judge import JudgeError, as_text, filled
from reward_models.process import step_columns

TEXTS = ("4 it is", "well\nit is\n5", "six")


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Three completions of two prompts."""
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("2+2?", "2+3?")]
    prompts = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True)["input_ids"] for r in rows]
    groups = [[TEXTS[0]], [TEXTS[1], TEXTS[2]]]
    completions = [
        [Completion([*tokenizer.encode(text), tokenizer.eos_token_id], [], Finish.STOPPED, 0) for text in group]
        for group in groups
    ]
    completions = [[Completion(c.tokens, [-1.0] * len(c.tokens), c.finish, 0) for c in group] for group in completions]
    sampled = Prompts(tokens=prompts, rows=rows, places=["", ""], group=[0, 1], seeds=[0, 0])
    texts = {(0, 0): TEXTS[0], (1, 0): TEXTS[1], (1, 1): TEXTS[2]}
    return to_batch(sampled, completions, texts).set(score=torch.zeros(3), reward=torch.zeros(3))


@pytest.fixture(scope="module")
def folders(tiny_model_folder: Path, tmp_path_factory, tokenizer):
    """Saved models: two sequence classifiers, a process model with two labels, a value model of this package."""
    home = tmp_path_factory.mktemp("reward-models")
    for name, kind, labels, seed in (
        ("outcome", AutoModelForSequenceClassification, 1, 1),
        ("other", AutoModelForSequenceClassification, 1, 2),
        ("process", AutoModelForTokenClassification, 2, 3),
    ):
        torch.manual_seed(seed)
        model = kind.from_pretrained(tiny_model_folder, num_labels=labels)
        torch.nn.init.normal_(model.score.weight, std=0.3)
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    language_model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    spec = ValueSpec(head=sections.HeadSection(type="bernoulli"))
    head = Head(spec.head, 64, len(tokenizer))
    torch.nn.init.normal_(head.linear.weight, std=0.3)
    save_value(ValueModel(language_model.get_decoder(), head, spec), tokenizer, home / "value")
    return {path.name: str(path) for path in home.iterdir()}


def hugging_face_scores(folder: str, batch, tokenizer) -> torch.Tensor:
    """Scores of Hugging Face's class, one completion at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template([*row["prompt"], {"role": "assistant", "content": text}], tokenize=False)
        for row, text in zip(batch.rows, batch.texts, strict=True)
    ]
    with torch.no_grad():
        return torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts])


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 16384])
def test_outcome_model_equals_hugging_faces_class(folders, batch, tokenizer, micro_batch_tokens):
    expected = hugging_face_scores(folders["outcome"], batch, tokenizer)
    assert expected.std() > 0.05
    by_text = reward_models.outcome(model=folders["outcome"], micro_batch_tokens=micro_batch_tokens)(batch)
    by_tokens = reward_models.outcome(model=folders["outcome"], input="tokens")(batch)
    torch.testing.assert_close(by_text, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(by_tokens, expected, atol=2e-5, rtol=0)  # the template of the tests ends with <|end|>


def test_shift_and_scale_change_the_rewards_linearly(folders, batch, tokenizer):
    plain = reward_models.outcome(model=folders["outcome"])(batch)
    moved = reward_models.outcome(model=folders["outcome"], shift=0.5, scale=4.0)(batch)
    torch.testing.assert_close(moved, (plain - 0.5) / 4)
    with pytest.raises(ValueError, match="scale"):
        reward_models.outcome(model=folders["outcome"], scale=0.0)


def test_value_models_of_this_package_read_tokens(folders, batch):
    scorer = reward_models.outcome(model=folders["value"])
    prefixes = [SimpleNamespace(tokens=batch.tokens[i, : batch.length[i]].tolist()) for i in range(3)]
    torch.testing.assert_close(scorer(batch), scorer.of_prefixes(prefixes))
    assert ((scorer(batch) > 0) & (scorer(batch) < 1)).all()
    strange = batch.set(texts=("another", *batch.texts[1:]), mask=batch.mask & (torch.arange(3) == 0)[:, None])
    with pytest.raises(UserError, match=r"has another tokenizer. Set `input: text`"):
        scorer(strange)


def test_missing_models_are_found_before_the_run(batch):
    for scorer in (
        reward_models.outcome(model="./nowhere"),
        reward_models.ensemble(models=["./nowhere", "./neither"]),
        reward_models.implicit(model="./nowhere", reference="./nowhere"),
        reward_models.process(model="./nowhere"),
    ):
        with pytest.raises(RecipeError, match="nowhere"):
            scorer.needs()


def test_ensemble_reductions_equal_their_formulas():
    rewards = torch.tensor([[1.0], [2.0], [4.0]])
    assert reduce(rewards, "mean").item() == pytest.approx(7 / 3)
    assert reduce(rewards, "min").item() == 1.0
    assert reduce(rewards, "mean_minus_variance", 0.5).item() == pytest.approx(7 / 3 - 0.5 * 14 / 9)
    assert reduce(rewards, "mean_minus_std", 2.0).item() == pytest.approx(7 / 3 - 2 * (14 / 9) ** 0.5)


def test_ensemble_of_models_reduces_their_rewards(folders, batch, tokenizer):
    scores = torch.stack([hugging_face_scores(folders[name], batch, tokenizer) for name in ("outcome", "other")])
    models = [folders["outcome"], folders["other"]]
    torch.testing.assert_close(
        reward_models.ensemble(models=models, reduce="min")(batch), scores.amin(0), atol=2e-5, rtol=0
    )
    scaled = reward_models.ensemble(models=models, shifts=[0.0, 1.0], scales=[1.0, 2.0])(batch)
    torch.testing.assert_close(scaled, (scores[0] + (scores[1] - 1) / 2) / 2, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="at least two models, not 1"):
        reward_models.ensemble(models=models[:1])
    with pytest.raises(ValueError, match="2 models but 1 scales"):
        reward_models.ensemble(models=models, scales=[1.0])


def hugging_face_probabilities(folder: str, ids: list[int]) -> torch.Tensor:
    """The probability of `right` after each token, from Hugging Face's own class."""
    model = AutoModelForTokenClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].softmax(-1)[:, 1]


def test_process_model_scores_each_step_where_it_ends(folders, batch, tokenizer):
    scorer = reward_models.process(model=folders["process"], separator="\n", input="tokens")
    rewards = scorer(batch)
    start = int(batch.prompt_length[1])
    ends = [start + 4, start + 10, start + 12]  # "well\n", "it is\n", "5" with the end of the sequence
    assert rewards[1].nonzero().squeeze(-1).tolist() == ends
    expected = hugging_face_probabilities(folders["process"], batch.tokens[1, : batch.length[1]].tolist())
    torch.testing.assert_close(rewards[1, ends], expected[ends], atol=2e-5, rtol=0)
    assert (rewards[0] != 0).sum() == (rewards[2] != 0).sum() == 1
    signed = reward_models.process(model=folders["process"], separator="\n", input="tokens", signed=True, shared=True)
    torch.testing.assert_close(signed(batch)[1, ends], (2 * expected[ends] - 1) / 3, atol=2e-5, rtol=0)


def test_process_model_with_a_temperature_lets_the_worst_step_dominate(folders, batch):
    rewards = reward_models.process(model=folders["process"], input="tokens")(batch)
    worst = reward_models.process(model=folders["process"], input="tokens", temperature=0.1)(batch)
    for row, weighed in zip(rewards, worst, strict=True):
        steps = row[row != 0]
        share = [math.exp(-float(r) / 0.1) for r in steps]
        expected = [w / sum(share) * float(r) for w, r in zip(share, steps, strict=True)]
        assert weighed[row != 0].tolist() == pytest.approx(expected, rel=1e-4)


def test_process_model_without_separator_uses_the_rollouts_steps(folders, batch):
    rewards = reward_models.process(model=folders["process"], input="tokens")(batch)
    assert ((rewards != 0) == step_ends(batch)).all() and ((rewards != 0).sum(-1) == 1).all()


def test_process_model_that_reads_text_judges_at_its_markers(folders, batch, tokenizer):
    arguments = {"model": folders["process"], "separator": "\n", "tokenizer": folders["outcome"], "marker": "#"}
    rewards = reward_models.process(**arguments)(batch)
    text = tokenizer.apply_chat_template(batch.rows[1]["prompt"], add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text + "well#it is#5#<|end|>")
    columns = [i for i, token in enumerate(ids) if token == tokenizer.encode("#")[0]]
    expected = hugging_face_probabilities(folders["process"], ids)[columns]
    torch.testing.assert_close(rewards[1][rewards[1] != 0], expected, atol=2e-5, rtol=0)
    with pytest.raises(UserError, match="needs `separator`"):
        reward_models.process(model=folders["process"]).needs()


def test_steps_of_a_text_model_without_marker_end_with_the_separator(tokenizer):
    ids, columns = step_columns("Q", ["ab", "c"], "\n", "", tokenizer)
    assert tokenizer.decode(ids) == "Qab\nc<|end|>"
    assert columns == [3, 4]


def test_implicit_reward_is_the_log_ratio(tiny_model_folder, tmp_path, batch, tokenizer):
    tuned = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.05)
    tuned.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = {"model": str(tmp_path), "reference": str(tiny_model_folder), "beta": 0.1}
    rewards = reward_models.implicit(**arguments)(batch)
    for row in range(3):
        ids = batch.tokens[row, : batch.length[row]]
        logps = []
        for path in (tmp_path, tiny_model_folder):
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_pretrained(path)(ids[None]).logits[0]
            logps.append([float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in range(1, len(ids))])
        ratios = [0.0] + [0.1 * (a - b) for a, b in zip(*logps, strict=True)]
        expected = torch.tensor(ratios).where(batch.mask[row, : len(ids)], 0.0)
        torch.testing.assert_close(rewards[row, : len(ids)], expected, atol=1e-5, rtol=0)
    sums = reward_models.implicit(**arguments, level="sequence")(batch)
    torch.testing.assert_close(sums, rewards.sum(-1))


def test_a_recipe_uses_a_reward_model_with_its_weight(tmp_path, tiny_model_folder, folders, batch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"policy: {{model: {tiny_model_folder}}}\ndata: {{path: rows.jsonl}}\n"
        f"reward: [{{use: reward_models.outcome, model: {folders['outcome']}, weight: 2.0}}]\n"
        "advantage: {use: outcome}\nloss: [{use: clip}]\n"
    )
    loaded = load_recipe(recipe)
    find_required_passes(loaded)
    assert loaded.reward[0].weight == 2.0
    plain = reward_models.outcome(model=folders["outcome"])(batch)
    torch.testing.assert_close(loaded.reward[0](batch), plain)
    recipe.write_text(recipe.read_text().replace(folders["outcome"], "./nowhere"))
    with pytest.raises(RecipeError, match="nowhere"):
        find_required_passes(load_recipe(recipe))


def test_suite_measures_pairs_and_best_of_n(tmp_path, folders, batch, tokenizer, capsys):
    four = Batch.concatenate([batch[[0, 1]], batch[[2, 0]]]).set(
        group=torch.tensor([0, 0, 1, 1]), score=torch.tensor([1.0, 0.0, 0.0, 1.0])
    )
    write_rollouts(tmp_path / "rollouts" / "step-000001.parquet", four, [""] * 4)
    pairs = [{"prompt": "2+2?", "chosen": a, "rejected": b, "subset": "hep-go"} for a, b in ((TEXTS[0], TEXTS[2]),) * 2]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    suite = tmp_path / "own.yaml"
    suite.write_text(
        f"suite: reward\nreward: [{{use: reward_models.outcome, model: {folders['outcome']}, weight: 3.0}}]\n"
        f"data: {{path: pairs.jsonl}}\nrollouts: rollouts\nfolder: {tmp_path}/report\n"
    )
    folder = run_suite(suite)
    report = json.loads((folder / "metrics.json").read_text())
    scores = hugging_face_scores(folders["outcome"], batch, tokenizer).tolist()
    curve = report["best_of_n"]["curve"]
    best = [(0.0, 1.0)[scores[0] > scores[1]], (0.0, 1.0)[scores[0] > scores[2]]]
    assert curve["n"] == [1, 2] and curve["oracle"] == [0.5, 1.0]
    assert curve["gold"] == pytest.approx([0.5, sum(best) / 2])
    assert curve["proxy"][0] == pytest.approx(3 * (2 * scores[0] + scores[1] + scores[2]) / 4, abs=1e-4)
    assert report["pairs"]["sections"] == {"Reasoning": float(scores[0] > scores[2])}
    assert (folder / "best_of_n.png").stat().st_size > 5000
    assert "best of n by the reward, 2 prompts of 2 completions" in capsys.readouterr().out
    suite.write_text("suite: reward\nreward: []\nsizes: [2]\n")
    with pytest.raises(RecipeError, match="nothing to measure on") as error:
        run_suite(suite)
    assert "there is no reward model" in str(error.value) and "must hold 1" in str(error.value)


# ---- judges ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A local OpenAI-compatible endpoint. The test sets its answers as a function: question -> (status, text)."""
    state = SimpleNamespace(answer=lambda question: (200, "[[5]]"), asked=[], headers=[], at_once=0, most=0)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.asked.append(body)
                state.headers.append(dict(self.headers))
                state.at_once += 1
                state.most = max(state.most, state.at_once)
            status, text = state.answer(body["messages"][0]["content"])
            with lock:
                state.at_once -= 1
            answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Keeps standard error empty."""

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{http_server.server_port}/v1"
    yield state
    http_server.shutdown()
    http_server.server_close()


def test_judge_rates_completions(server, batch, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    ratings = {TEXTS[0]: "Fine. [[10]]", TEXTS[1]: "not [[9]] but [[5.5]]", TEXTS[2]: "[[1]]"}
    server.answer = lambda question: (200, next(ratings[text] for text in TEXTS if question.endswith(text)))
    rewards = reward_models.judge(url=server.url, model="judge", key_variable="JUDGE_KEY")(batch)
    assert rewards.tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert {(body["model"], body["temperature"]) for body in server.asked} == {("judge", 0.0)}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert sorted("2+2?" in body["messages"][0]["content"] for body in server.asked) == [False, False, True]


def test_judge_tries_again_and_gives_up(server, batch):
    attempts: Counter[str] = Counter()

    def busy_twice(question: str) -> tuple[int, str]:
        attempts[question] += 1
        return [(503, "busy"), (200, "I cannot say"), (200, "[[10]]")][attempts[question] - 1]

    server.answer = busy_twice
    arguments = {"url": server.url, "model": "judge", "backoff": 0.001}
    assert reward_models.judge(**arguments, retries=2)(batch).tolist() == [1.0] * 3
    attempts.clear()
    with pytest.raises(JudgeError, match=r"no verdict in its answer 'I cannot say' \(2 attempts\)"):
        reward_models.judge(**arguments, retries=1)(batch)
    server.answer = lambda question: (401, "no key")
    server.asked.clear()
    with pytest.raises(JudgeError, match="status 401"):
        reward_models.judge(**arguments, concurrent=1)(batch)
    questions = [body["messages"][0]["content"] for body in server.asked]
    assert len(set(questions)) == len(questions)  # a status that another attempt would not change is not tried again


def test_judge_waits_no_longer_than_its_timeout(server, batch):
    server.answer = lambda question: (time.sleep(0.6), (200, "[[5]]"))[1]
    with pytest.raises(JudgeError, match=r"no answer in 0.1 s \(1 attempts\)"):
        reward_models.judge(url=server.url, model="j", timeout=0.1, retries=0)(batch)


def test_judge_gets_at_most_the_allowed_number_of_requests_at_once(server, batch):
    server.answer = lambda question: (time.sleep(0.03), (200, "[[5]]"))[1]
    many = batch[[0, 1, 2] * 4]
    reward_models.judge(url=server.url, model="j", concurrent=3)(many)
    assert server.most == 3 and len(server.asked) == 12


def test_a_judge_that_cannot_be_reached_is_an_error(batch):
    with pytest.raises(JudgeError, match="ConnectError"):
        reward_models.judge(url="http://127.0.0.1:9/v1", model="j", retries=0)(batch)


def test_pairwise_judge_asks_in_both_orders(server, batch):
    server.answer = lambda question: (200, "[[A]]")  # prefers the first place, whatever the answers are
    judge = reward_models.pairwise_judge(url=server.url, model="j")
    assert judge(batch).tolist() == [0.5, 0.5, 0.5]
    assert len(server.asked) == 2  # one pair in two orders; the completion without rivals takes no question
    better = TEXTS[2]

    def honest(question: str) -> tuple[int, str]:
        first = question.split("[Answer A]\n")[1].split("\n\n[Answer B]")[0]
        return 200, "[[A]]" if first == better else "[[B]]"

    server.answer = honest
    assert judge(batch).tolist() == [0.5, 0.0, 1.0]
    server.answer = lambda question: (200, "[[C]]" if "[Answer A]\nsix" in question else "[[A]]")
    assert judge(batch).tolist() == pytest.approx([0.5, 0.75, 0.25])


def test_questions_keep_braces_and_roles():
    assert filled("{a} {b} {c}", a="{b}", b="1") == "{b} 1 {c}"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert as_text(turns) == "user: x\n\nassistant: y" and as_text(turns[:1]) == "x" and as_text("z") == "z"


def test_options_of_a_judge_are_checked():
    with pytest.raises(RecipeError, match="no placeholder {completion}"):
        reward_models.judge(url="http://x", model="j", template="{prompt}")
    with pytest.raises(RecipeError, match="unexpected keyword argument 'tiemout'"):
        reward_models.judge(url="http://x", model="j", tiemout=3)
    with pytest.raises(RecipeError, match="neither with http://"):
        reward_models.judge(url="localhost:8000", model="j")
