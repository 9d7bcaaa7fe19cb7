"""Tests of requests that join and leave while other requests are sampled, on every engine."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest
import torch
from exact_world import PROMPT, make_world, table_score
from function_score import FunctionScore

from posttrain.decoding.shaping import Shaped
from posttrain.engines import make_engine
from posttrain.engines import transformers as transformers_engine
from posttrain.engines.base import Aborted, Completion, RefusedRequest, Request, RequestUpdate, Sampling
from posttrain.recipe.sections import EngineSection
from posttrain.seeds import sample_seed

WORLD = make_world()


@pytest.fixture(
    scope="module", params=["tabular", "transformers", pytest.param("vllm", marks=pytest.mark.engine)], ids=str
)
def engine(request: pytest.FixtureRequest, tiny_model_folder: Path):
    if request.param == "tabular":
        yield WORLD.engine()
        return
    if request.param == "vllm":
        pytest.importorskip("vllm")
    options = EngineSection(use=request.param, cache_mb=64, max_concurrent=64)
    sampler = make_engine(tiny_model_folder, options, dtype="float32", max_model_len=96)
    yield sampler
    sampler.close()


@pytest.fixture
def prompts(engine) -> list[list[int]]:
    return [list(PROMPT)] * 4 if not hasattr(engine, "library") else [[5, 6, 7], [9, 10], [20, 21, 22, 23], [5, 6, 8]]


@pytest.fixture
def sampling(engine) -> Sampling:
    return Sampling(max_tokens=16, temperature=0.8) if hasattr(engine, "library") else WORLD.sampling


class Recorder:
    """A callback that keeps the updates of a request."""

    def __init__(self) -> None:
        self.updates: list[RequestUpdate] = []

    def __call__(self, update: RequestUpdate) -> None:
        assert not self.ended
        self.updates.append(update)

    @property
    def ended(self) -> bool:
        return bool(self.updates) and self.updates[-1].ended

    @property
    def completion(self) -> Completion:
        completion = self.updates[-1].completion
        assert completion is not None
        return completion


def submit(engine, prompt, sampling, seed, *, stream: bool = True, **more) -> tuple[int, Recorder]:
    recorder = Recorder()
    settings = {"sampling": sampling, "seed": sample_seed(seed, 0), "on_update": recorder, "stream": stream}
    return engine.submit(Request(prompt=prompt, **settings, **more)), recorder


def finish(engine) -> None:
    while engine.in_flight:
        engine.step()


def test_requests_that_join_later_are_sampled_as_if_alone(engine, prompts, sampling):
    expected = [engine.generate([prompt], sampling, seeds=[i])[0][0] for i, prompt in enumerate(prompts)]
    recorders = []
    for i, prompt in enumerate(prompts):
        recorders.append(submit(engine, prompt, sampling, i, stream=i % 2 == 0)[1])
        engine.step()
    finish(engine)
    for i, (recorder, completion) in enumerate(zip(recorders, expected, strict=True)):
        assert recorder.completion.tokens == completion.tokens
        assert recorder.completion.logps == pytest.approx(completion.logps, abs=1e-5)
        assert recorder.completion.finish == completion.finish
        assert [token for update in recorder.updates for token in update.tokens] == completion.tokens
        assert [logp for update in recorder.updates for logp in update.logps] == recorder.completion.logps
        assert len(recorder.updates) == (len(completion.tokens) if i % 2 == 0 else 1)


def test_an_aborted_request_gets_an_error_and_other_requests_go_on(engine, prompts, sampling):
    (expected,) = engine.generate(prompts[:1], sampling, seeds=[7])[0]
    _, staying = submit(engine, prompts[0], sampling, 7)
    number, leaving = submit(engine, prompts[1], Sampling(max_tokens=sampling.max_tokens, ignore_eos=True), 8)
    engine.step()
    engine.abort([number])
    assert isinstance(leaving.updates[-1].error, Aborted) and leaving.ended
    engine.abort([number])
    finish(engine)
    assert staying.completion.tokens == expected.tokens
    assert engine.in_flight == []


def test_generate_runs_beside_requests_in_flight_and_requests_join_before_its_steps(engine, prompts, sampling):
    expected = engine.generate(prompts, sampling, 2, seeds=range(4))
    _, early = submit(engine, prompts[0], sampling, 0)
    late: list[Recorder] = []

    def join() -> None:
        if not late:
            late.append(submit(engine, prompts[1], sampling, 1)[1])

    engine.before_step = join
    try:
        outputs = engine.generate(prompts, sampling, 2, seeds=range(4))
    finally:
        engine.before_step = lambda: None
    finish(engine)
    assert [[c.tokens for c in group] for group in outputs] == [[c.tokens for c in group] for group in expected]
    assert early.completion.tokens == expected[0][0].tokens
    assert late[0].completion.tokens == expected[1][0].tokens


def test_an_error_of_a_shaper_ends_only_its_own_requests(engine, prompts, sampling):
    (expected,) = engine.generate(prompts[:1], sampling, seeds=[3])[0]

    def broken(logps: torch.Tensor, rows) -> torch.Tensor:
        raise ArithmeticError("no distribution")

    _, plain = submit(engine, prompts[0], sampling, 3)
    _, shaped = submit(engine, prompts[1], sampling, 4, shaper=broken)
    finish(engine)
    assert isinstance(shaped.updates[-1].error, ArithmeticError)
    assert plain.completion.tokens == expected.tokens


def test_strengths_of_requests_do_not_mix(engine, prompts, sampling):
    if hasattr(engine, "library"):
        score = FunctionScore(function=lambda prefixes: [sum(t < 100 for t in p.generated) for p in prefixes])
    else:
        score = table_score(WORLD.mean_values())
    decoder = Shaped(engine, score, k=3)
    strengths = [0.5, 1.0, 2.0, 0.5]
    recorders = [Recorder() for _ in prompts]
    for i, (prompt, strength) in enumerate(zip(prompts, strengths, strict=True)):
        decoder.submit(
            Request(prompt=prompt, sampling=sampling, seed=sample_seed(i, 0), on_update=recorders[i]), strength=strength
        )
    finish(engine)
    for i, (prompt, strength) in enumerate(zip(prompts, strengths, strict=True)):
        alone = Shaped(engine, score, k=3, strength=strength).generate([prompt], sampling, seeds=[i])[0][0]
        assert recorders[i].completion.tokens == alone.tokens
        assert recorders[i].completion.logps == pytest.approx(alone.logps, abs=1e-5)
        assert recorders[i].completion.measured == pytest.approx(alone.measured, abs=1e-4)
    assert decoder._stream.rows == {}


def test_a_request_that_leaves_no_room_is_refused(engine):
    with pytest.raises(ValueError, match="max_tokens 1000"):
        submit(engine, [0], Sampling(max_tokens=1000), 0)
    assert engine.in_flight == []


def test_a_request_that_fails_within_a_round_leaves_the_others(tiny_model_folder: Path, monkeypatch):
    options = EngineSection(use="transformers")
    with closing(make_engine(tiny_model_folder, options, dtype="float32", max_model_len=96)) as engine:
        prompts, sampling = [[5, 6, 7], [9, 10], [20, 21]], Sampling(max_tokens=6)
        expected = [engine.generate([prompt], sampling, seeds=[3])[0][0].tokens for prompt in prompts]
        read = transformers_engine._read

        def broken(model, distinct, cache):
            if (9, 10) in distinct:
                raise ArithmeticError("this prompt")
            return read(model, distinct, cache)

        monkeypatch.setattr(transformers_engine, "_read", broken)
        recorders = [submit(engine, prompt, sampling, 3)[1] for prompt in prompts]
        finish(engine)
    assert isinstance(recorders[1].updates[-1].error, ArithmeticError)
    assert [recorders[i].completion.tokens for i in (0, 2)] == [expected[0], expected[2]]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 2.5}, {"temperature": 1e-40}, {"temperature": float("nan")}, {"temperature": float("inf")}]
    + [{"top_p": 0.0}, {"top_k": 2**40}, {"min_p": 1.0}, {"max_tokens": 0}, {"stop_token_ids": (-1,)}],
    ids=str,
)
def test_every_engine_refuses_the_same_settings(engine, prompts, sampling, wrong):
    (name,) = wrong
    settings = dataclasses.replace(sampling, **wrong)
    with pytest.raises(RefusedRequest, match=f"{name}: should be"):
        submit(engine, prompts[0], settings, 1)
    with pytest.raises(RefusedRequest, match=f"{name}: should be"):
        engine.generate(prompts, settings)
    assert not engine.in_flight


def test_tokens_that_the_model_lacks_are_refused(engine, sampling):
    for token in (-1, 10**6) if engine.vocab_size is not None else (-1,):
        with pytest.raises(RefusedRequest, match=f"prompt 0 has token {token}"):
            submit(engine, [token], sampling, 1)
