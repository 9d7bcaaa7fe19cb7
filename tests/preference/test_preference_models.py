"""Preference models: their questions in both orders, and that they learn from pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_batch import make_random_batch
from test_preference_recipes_run import small
from transformers import AutoModelForCausalLM, AutoTokenizer

import reward_models
from posttrain.errors import DataError, RecipeError
from posttrain.recipe.resolve import import_file
from posttrain.training.loop import train
from reward_models.preference import question

RECIPES = Path(__file__).parents[2] / "recipes"


def asked(*completions: str, groups: tuple[int, ...] = (), greedy: tuple[bool, ...] = ()) -> Any:
    """Batch of completions as text, by default all of one prompt."""
    n = len(completions)
    batch = make_random_batch(0, groups=1, size=n)
    return batch.set(
        texts=completions,
        rows=tuple({"prompt": "1+1="} for _ in completions),
        group=torch.tensor(groups or (0,) * n),
        baseline_only=torch.tensor(greedy or (False,) * n),
    )


def test_both_orders_are_one_probability(tiny_model_folder: Path) -> None:
    """Probabilities equal those of plain Transformers, one question at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_folder)
    letters = [tokenizer.encode(letter)[0] for letter in "AB"]

    def first_wins(a: str, b: str) -> float:
        chat = [{"role": "user", "content": question("1+1=", a, b)}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        return float(logits[letters].double().softmax(-1)[0])

    judge = reward_models.preference(model=str(tiny_model_folder), micro_batch_tokens=300)
    texts = ("2", "no idea, sorry", "two")
    p = [[(first_wins(a, b) + 1 - first_wins(b, a)) / 2 for b in texts] for a in texts]
    expected = [sum(p[i][j] for j in range(3) if j != i) / 2 for i in range(3)]
    assert judge(asked(*texts)).tolist() == pytest.approx(expected, abs=1e-5)
    assert sum(expected) == pytest.approx(1.5) and len({round(each, 3) for each in expected}) == 3
    pair = judge.probabilities([("1+1=", "2", "two"), ("1+1=", "two", "2")])
    assert pair.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_who_is_compared_with_whom(tiny_model_folder: Path) -> None:
    judge = reward_models.preference(model=str(tiny_model_folder), against="baselines", center=0.5)
    batch = asked("2", "3", "no", "2", groups=(0, 0, 0, 1), greedy=(False, False, True, False))
    wins = judge.probabilities([("1+1=", "2", "no"), ("1+1=", "3", "no")]).tolist()
    assert judge(batch).tolist() == pytest.approx([wins[0] - 0.5, wins[1] - 0.5, 0.0, 0.0], abs=1e-6)
    itself = reward_models.preference(model=str(tiny_model_folder), itself=True)
    two = asked("2", "3")
    plain = reward_models.preference(model=str(tiny_model_folder))(two)
    assert itself(two).tolist() == pytest.approx(((plain + 0.5) / 2).tolist(), abs=1e-6)


def test_a_template_without_its_places_is_refused() -> None:
    with pytest.raises(RecipeError, match="has no placeholder {b}"):
        reward_models.preference(model="m", template="{prompt} {a}")


def test_pairs_become_questions_in_both_orders(tmp_path: Path) -> None:
    module = import_file(RECIPES / "data" / "comparisons.py")
    said, sides = [{"role": "user", "content": "1+1="}], (("chosen", "2"), ("rejected", "3"))
    text = {"prompt": "1+1="} | dict(sides)
    conversation = {side: [*said, {"role": "assistant", "content": answer}] for side, answer in sides}
    pairs = tmp_path / "pairs.jsonl"
    for row in (text, conversation):
        pairs.write_text(json.dumps(row))
        first, second = module.comparisons(str(pairs))
        assert first == {"prompt": question("1+1=", "2", "3"), "completion": "A"}
        assert second == {"prompt": question("1+1=", "3", "2"), "completion": "B"}
    pairs.write_text(json.dumps({"prompt": "1+1=", "chosen": "2"}))
    with pytest.raises(DataError, match="rejected"):
        list(module.comparisons(str(pairs)))


@pytest.mark.engine
def test_a_preference_model_learns_and_labels_an_online_run(tmp_path: Path, tiny_model_folder: Path) -> None:
    """The recipe learns from pairs in which digits are better than none; then it is the judge of online IPO."""
    rows = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": "?"} for a in range(8)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator = RECIPES / "data" / "comparisons.py"
    changes = {"data.path": f"{generator}:comparisons", "data.options": f"{{path: '{pairs}'}}"}
    changes |= {"steps": 30, "prompts_per_step": 8, "optimizer.learning_rate": 0.003, "optimizer.warmup_steps": 3}
    train(small("preference/preference_model", tmp_path, tiny_model_folder, **changes))
    model = str(tmp_path / "run" / "model")
    judge = reward_models.preference(model=model)
    held_out = [(f"{a}+1=", str(a + 1), "?") for a in (11, 12, 13)]
    before = reward_models.preference(model=str(tiny_model_folder)).probabilities(held_out)
    after = judge.probabilities(held_out)
    assert (after > 0.6).all() and (after > before + 0.1).all()
    online = tmp_path / "online"
    online.mkdir()
    compare = f"{{use: reward_models.preference, model: '{model}', itself: true}}"
    recipe = small("preference/online_ipo", online, tiny_model_folder, **{"compare": compare, "steps": 1})
    train(recipe)
    assert (online / "run" / "model" / "model.safetensors").exists()
