"""`LLM` with the shipped model on local ranks: what users see."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_executor import FakeExecutor, Slow
from msgspec.structs import replace

from soloist.engine.llm import LLM
from soloist.engine.options import EngineOptions
from soloist.errors import CheckpointError, ClusterError, ConfigurationError, RequestError
from soloist.placement.placement import Placement
from soloist.scheduling.request import SamplingParams
from tests.blas import where_measured

NOVELS = Path(__file__).parents[2] / "models" / "novels-moe-11m"
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPT = "The old house upon the hill"


@pytest.fixture(scope="module")
def llm():
    with LLM(NOVELS, layout="ep4", device="cpu", max_positions=256, kv_tokens=160) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone():
    with LLM(NOVELS, device="cpu") as alone:
        yield alone


def test_four_ranks_say_what_one_says(llm, alone):
    prompts = [PROMPT, "She said", "It was a dark and stormy evening, and the"]
    params = replace(GREEDY, logprobs=1)
    expected, found = (one.generate(prompts, params) for one in (alone, llm))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.outputs[0].text == theirs.outputs[0].text, (ours.outputs[0].margin, theirs.outputs[0].margin)
        assert ours.outputs[0].tokens == theirs.outputs[0].tokens
    assert (
        llm.tokenizer.decode(found[0].prompt_tokens + found[0].outputs[0].tokens) == PROMPT + found[0].outputs[0].text
    )


@where_measured
def test_an_answer_without_company_is_the_same_in_every_bit(llm):
    prompts, params = ["She said", "It was a dark and stormy evening, and the"], replace(GREEDY, logprobs=1)
    (single,), found = llm.generate(prompts[1], params), llm.generate(prompts, params)
    assert single.outputs[0].logprobs == found[1].outputs[0].logprobs


def test_streamed_pieces_are_the_whole(llm):
    whole = llm.generate([PROMPT, "She said"], GREEDY)
    text, tokens = {0: "", 1: ""}, {0: [], 1: []}
    for part in llm.stream([PROMPT, "She said"], GREEDY):
        text[part.prompt] += part.text
        tokens[part.prompt] += part.tokens
    assert list(text.values()) == [output.outputs[0].text for output in whole]
    assert list(tokens.values()) == [output.outputs[0].tokens for output in whole]


def test_leaving_a_stream_leaves_no_work(llm):
    for part in llm.stream(PROMPT, SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)):
        assert part.tokens
        break
    llm.generate([[5]] * 4, SamplingParams(max_tokens=1))
    assert {stats.running for stats in llm.stats().values()} == {0}


def test_a_seed_gives_the_same_text_in_any_company(llm, alone):
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=2)
    (first,) = alone.generate(PROMPT, params)
    company = llm.generate([PROMPT, "Another", PROMPT], [params, GREEDY, SamplingParams(max_tokens=8, seed=4)])
    assert [c.text for c in company[0].outputs] == [c.text for c in first.outputs]
    assert company[2].outputs[0].tokens == first.outputs[1].tokens  # n counts the seed up
    assert first.outputs[0].tokens != first.outputs[1].tokens


def test_stop_strings_and_logprobs(llm):
    (whole,) = llm.generate(PROMPT, GREEDY)
    stop = whole.outputs[0].text[5:9]
    params = SamplingParams(max_tokens=12, temperature=0.0, stop=(stop,), logprobs=2, prompt_logprobs=0)
    (output,) = llm.generate(PROMPT, params)
    (completion,) = output.outputs
    assert completion.finish_reason == "stop"
    assert completion.text == whole.outputs[0].text[: whole.outputs[0].text.find(stop)]
    assert [entry.token for entry in completion.logprobs] == completion.tokens
    assert all(len(entry.top) == 2 for entry in completion.logprobs)
    assert [entry.token for entry in output.prompt_logprobs] == output.prompt_tokens[1:]


WRONG = {
    "longer than the model allows": ([7] * 256, GREEDY, "at most 256 positions"),
    "cache too small": ([7] * 155, SamplingParams(max_tokens=40), "KV blocks"),
    "empty": ("", GREEDY, "at least one token"),
    "no ids": ([], GREEDY, "at least one token"),
    "unknown token": ([4096], GREEDY, "between 0 and 4095"),
    "too many stops": ("x", SamplingParams(stop=tuple("abcdefghijklmnopq")), "at most 16 texts"),
}


def test_a_request_that_cannot_be_served_harms_no_other(llm):
    prompts = [PROMPT, *(prompt for prompt, _, _ in WRONG.values()), PROMPT]
    outputs = llm.generate(prompts, [GREEDY, *(params for _, params, _ in WRONG.values()), GREEDY])
    for output, (_, _, reason) in zip(outputs[1:-1], WRONG.values(), strict=True):
        assert reason in output.error
        assert output.outputs == []
    assert outputs[0].error is None
    assert outputs[0].outputs[0].tokens == outputs[-1].outputs[0].tokens


def test_a_single_prompt_raises_instead(llm):
    with pytest.raises(RequestError, match="at least one token"):
        llm.generate("", GREEDY)
    with pytest.raises(RequestError, match="at most 256"):
        list(llm.stream([7] * 256, GREEDY))
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hello"}])
    assert llm.generate([], GREEDY) == []


def test_several_threads_may_ask(llm):
    (expected,) = llm.generate(PROMPT, GREEDY)
    found = []
    threads = [threading.Thread(target=lambda: found.extend(llm.generate(PROMPT, GREEDY))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert [output.outputs[0].text for output in found] == [expected.outputs[0].text] * 4


def test_times_and_callbacks(llm):
    done = []
    outputs = llm.generate([PROMPT] * 3, GREEDY, on_done=lambda: done.append(1))
    assert len(done) == 3
    for output in outputs:
        assert 0 < output.outputs[0].first_token_s <= output.outputs[0].last_token_s


def test_figures_count_what_was_read(llm):
    figures = llm.figures()
    assert set(figures) == set(range(4))
    assert all(0 < f.weight_bytes < (NOVELS / "model.safetensors").stat().st_size for f in figures.values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "no-such-model"}, ConfigurationError, "no-such-model"),
        ({"model": "/nowhere"}, ConfigurationError, "/nowhere"),
        ({"model": "ref-16l"}, ConfigurationError, "give random_weights a seed"),
        ({"layout": "ep3x"}, ConfigurationError, "layout"),
        ({"kv_token": 5}, ConfigurationError, "kv_token = 5: is no engine option; there is kv_tokens"),
        ({"deadline_s": "soon"}, ConfigurationError, "deadline_s = 'soon'"),
        ({"options": EngineOptions(), "kv_tokens": 5}, ConfigurationError, "either options or"),
        ({"placement": "/no/file"}, ConfigurationError, "placement"),
        ({"layout": "ep2", "transport": "local"}, ConfigurationError, "rank .: transport = 'local'"),
    ],
)
def test_mistakes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        LLM(**{"model": NOVELS, "device": "cpu", **arguments})


def test_a_placement_is_checked_and_used(llm, alone):
    placement = Placement.round_robin(llm.spec, 2)
    with LLM(NOVELS, layout="ep2", placement=placement, device="cpu") as other:
        assert other.generate(PROMPT, GREEDY)[0].outputs[0].text == alone.generate(PROMPT, GREEDY)[0].outputs[0].text
    with pytest.raises(ConfigurationError, match="placement groups"):
        LLM(NOVELS, layout="ep4", placement=placement, device="cpu")


def test_a_damaged_checkpoint_is_told_by_the_rank_that_reads_it(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((NOVELS / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((NOVELS / "model.safetensors").read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"rank 0: .*model.safetensors"):
        LLM(tmp_path, device="cpu")


def test_after_closing_nothing_is_answered():
    llm = LLM(NOVELS, device="cpu", random_weights=1, make_executor=FakeExecutor)
    llm.close()
    llm.close()
    with pytest.raises(ClusterError, match="closed"):
        llm.generate([[1]], GREEDY)


def test_when_a_rank_is_lost_the_others_are_ended():
    llm = LLM(NOVELS, layout="ep2", device="cpu", random_weights=1, make_executor=Slow)
    (_, survivor) = llm._ranks.processes
    stream = llm.stream([1], SamplingParams(max_tokens=1000, ignore_eos=True))
    next(stream)
    llm._ranks.processes[0].kill()
    with pytest.raises(ClusterError, match="rank 0 was killed by SIGKILL"):
        list(stream)
    assert not survivor.is_alive()


def test_the_front_end_does_not_import_torch():
    code = "import sys, soloist.engine.llm; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
