"""The server as its clients see it: OpenAI's own client, and bare HTTP."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

import soloist
from soloist.errors import ConfigurationError
from soloist.server.run import Listening
from tests.server.live import http, live, patient

GREEDY = {"model": "novels", "prompt": "The old house upon the hill", "max_tokens": 12, "temperature": 0}
CHAT = {"model": "novels", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=patient()) as client:
        yield client


def post(server, body, path="/v1/completions", **options) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body)
    return http.post(server.url + path, content=content, **options)


def events(response: httpx.Response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# -- answers ----------------------------------------------------------------------------------------------------------
def test_a_streamed_completion_is_the_whole_one(client):
    whole = client.completions.create(**GREEDY)
    parts = list(client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert parts[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 12
    assert len({part.id for part in parts}) == 1


def test_a_streamed_chat_is_the_whole_one(client):
    whole = client.chat.completions.create(**CHAT)
    parts = list(client.chat.completions.create(**CHAT, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content for part in parts) == whole.choices[0].message.content
    assert whole.choices[0].message.role == "assistant"


def test_chat_messages_go_through_the_template(server, client):
    text = post(server, {"messages": CHAT["messages"]}, "/tokenize").json()
    plain = post(server, {"prompt": "user: Who are you?\nassistant:"}, "/tokenize").json()
    assert text["tokens"] == plain["tokens"]
    parts = [{"type": "text", "text": "Who are"}, {"type": "text", "text": " you?"}]
    assert post(server, {"messages": [{"role": "user", "content": parts}]}, "/tokenize").json() == text


def test_tokens_as_text(server):
    tokens = post(server, {"prompt": GREEDY["prompt"]}, "/tokenize").json()["tokens"]
    assert post(server, {"tokens": tokens}, "/detokenize").json() == {"prompt": GREEDY["prompt"]}
    assert post(server, {"tokens": [4096]}, "/detokenize").json()["error"]["param"] == "tokens"


def test_a_chat_without_max_tokens_goes_on_to_the_limit(server):
    tokens = [5] * 2040
    completion = post(server, GREEDY | {"prompt": tokens, "max_tokens": 8, "ignore_eos": True}).json()
    assert completion["usage"]["total_tokens"] == 2048
    limit = post(server, GREEDY | {"prompt": tokens, "max_tokens": 9})
    assert limit.status_code == 400
    assert limit.json()["error"]["code"] == "context_length_exceeded"


def test_several_prompts_and_continuations_keep_their_order(server):
    sampled = {"temperature": 1.0, "seed": 7}
    body = GREEDY | sampled | {"prompt": ["She said", "The old house upon the hill"], "n": 2}
    choices = post(server, body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    alone = [post(server, GREEDY | sampled | {"prompt": p, "n": 2}).json()["choices"] for p in body["prompt"]]
    assert [c["text"] for c in choices] == [c["text"] for answer in alone for c in answer]
    streamed = dict.fromkeys(range(4), "")
    for event in events(post(server, body | {"stream": True})):
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert list(streamed.values()) == [choice["text"] for choice in choices]


def test_a_conversation_finds_its_beginning_in_the_cache(server, client):
    """Its first turn is answered while the first leader is busy; the others come when nobody is."""
    prompt = [7 + i for i in range(40)]
    busy = client.completions.create(model="novels", prompt=[1], max_tokens=2000, stream=True)
    next(iter(busy))
    for turn in range(3):
        wanted = {"ignore_eos": True, "return_token_ids": True}
        answer = client.completions.create(model="novels", prompt=prompt, max_tokens=8, extra_body=wanted)
        assert answer.usage.prompt_tokens_details.cached_tokens == (len(prompt) - 13) // 16 * 16 * (turn > 0)
        prompt += [*answer.choices[0].token_ids, 9, 9, 9, 9]
        busy.close()
        server.wait(lambda: not server.desk.calls)


def test_stop_texts_end_the_answer(client):
    text = client.completions.create(**GREEDY).choices[0].text
    stop = text[6:9]
    cut = client.completions.create(**GREEDY, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == text[: text.find(stop)]


def test_logprobs_stand_beside_their_tokens(client, novels):
    completion = client.completions.create(**GREEDY, logprobs=2).choices[0]
    assert "".join(completion.logprobs.tokens) == completion.text
    assert all(len(top) == 2 for top in completion.logprobs.top_logprobs)
    offsets = [len("".join(completion.logprobs.tokens[:i])) for i in range(12)]
    assert completion.logprobs.text_offset == offsets
    entries = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(entry.top_logprobs[0].logprob == pytest.approx(entry.logprob) for entry in entries)
    assert bytes(entries[0].bytes).decode() == entries[0].token


def test_a_token_stands_among_the_best_though_it_be_none_of_them(client):
    """So do those of a prompt."""
    odd = GREEDY["prompt"] + " house house house"
    found = (
        client.completions.create(**GREEDY | {"prompt": odd, "max_tokens": 4}, echo=True, logprobs=1)
        .choices[0]
        .logprobs
    )
    for token, logprob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert top[token] == logprob
        assert len(top) == (1 if logprob == max(top.values()) else 2)
    none = client.completions.create(**GREEDY, logprobs=0).choices[0].logprobs
    assert none.top_logprobs == [{t: v} for t, v in zip(none.tokens, none.token_logprobs, strict=True)]


def test_a_prompt_is_echoed_with_its_log_probabilities(client):
    """What a model makes of a text that is given: of the answer sent back as a prompt, what it had as an answer."""
    answer = client.completions.create(**GREEDY, logprobs=1).choices[0]
    text = GREEDY["prompt"] + answer.text
    (echoed,) = client.completions.create(**GREEDY | {"prompt": text, "max_tokens": 1}, echo=True, logprobs=1).choices
    assert echoed.text.startswith(text)
    found = echoed.logprobs
    assert "".join(found.tokens) == echoed.text
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    assert found.token_logprobs[-13:-1] == pytest.approx(answer.logprobs.token_logprobs, abs=1e-4)
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
    plain = client.completions.create(**GREEDY, echo=True, n=2).choices
    assert [choice.text for choice in plain] == [text, text]
    streamed = client.completions.create(**GREEDY, echo=True, n=2, stream=True)
    texts = ["", ""]
    for part in streamed:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == [text, text]
    with pytest.raises(
        openai.BadRequestError, match="echo = true: the log probabilities of a prompt come with a whole"
    ):
        client.completions.create(**GREEDY, echo=True, stream=True, logprobs=1)


def test_a_prompt_is_scored_without_a_continuation(client):
    wanted = GREEDY | {"max_tokens": 0, "echo": True, "logprobs": 1}
    scored = client.completions.create(**wanted)
    longer = client.completions.create(**wanted | {"max_tokens": 1}).choices[0]
    (choice,) = scored.choices
    assert choice.text == GREEDY["prompt"] == "".join(choice.logprobs.tokens)
    assert choice.logprobs.token_logprobs == longer.logprobs.token_logprobs[:-1]
    assert (scored.usage.completion_tokens, choice.finish_reason) == (0, "length")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(**GREEDY | {"max_tokens": 0})


# -- wishes -----------------------------------------------------------------------------------------------------------
def test_penalties_and_biases_change_what_is_said(client):
    def ids(**wishes) -> list[int]:
        extra = {"return_token_ids": True, "ignore_eos": True} | wishes.pop("extra", {})
        given = GREEDY | {"max_tokens": 24} | wishes
        return client.completions.create(**given, extra_body=extra).choices[0].token_ids

    plain = ids()
    said = max(plain, key=plain.count)
    assert len(set(ids(presence_penalty=2, frequency_penalty=2))) > len(set(plain))
    assert len(set(ids(extra={"repetition_penalty": 1.5}))) > len(set(plain))
    assert said not in ids(logit_bias={str(said): -100})
    assert ids(logit_bias={"77": 100}) == [77] * 24


def test_an_answer_is_no_shorter_than_asked_for(client):
    text = client.completions.create(**GREEDY).choices[0]
    first = client.completions.create(**GREEDY, extra_body={"return_token_ids": True}).choices[0].token_ids[0]
    for early in ({"stop_token_ids": [first]}, {"stop": text.text[:2]}):
        wishes = {"extra_body": {"min_tokens": 12} | early}
        assert client.completions.create(**GREEDY, extra_body=early).usage.completion_tokens < 12
        assert client.completions.create(**GREEDY, **wishes).usage.completion_tokens == 12


def test_what_ended_an_answer_is_shown_where_asked_for(client):
    text = client.completions.create(**GREEDY).choices[0].text
    cut = client.completions.create(**GREEDY, stop=text[6:9], extra_body={"include_stop_str_in_output": True})
    assert cut.choices[0].text == text[: text.find(text[6:9]) + 3]


def test_a_template_gets_what_it_knows_beyond_messages(server):
    def tokens(**fields) -> list[int]:
        return post(server, {"messages": CHAT["messages"]} | fields, "/tokenize").json()["tokens"]

    assert len(tokens(chat_template_kwargs={"name": "Sherlock Holmes"})) > len(tokens())
    assert len(tokens(add_generation_prompt=False)) < len(tokens())
    taken = post(server, CHAT | {"chat_template_kwargs": {"messages": []}}, "/v1/chat/completions")
    assert taken.json()["error"]["param"] == "chat_template_kwargs"


def test_token_ids_on_demand(server):
    whole = post(server, GREEDY | {"return_token_ids": True}).json()["choices"][0]["token_ids"]
    streamed = events(post(server, GREEDY | {"return_token_ids": True, "stream": True}))
    assert [token for event in streamed for token in event["choices"][0]["token_ids"]] == whole


def test_fields_that_ask_for_nothing_are_taken(server):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None, "echo": False, "user": "me"}
    neutral |= {"best_of": 1, "suffix": "", "response_format": {"type": "text"}, "prompt_cache_key": "mine"}
    vllms = {"min_tokens": 0, "top_k": -1, "skip_special_tokens": True, "prompt_logprobs": None, "guided_json": None}
    vllms |= {"use_beam_search": False, "add_special_tokens": True}
    streamed = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": False}}
    assert post(server, GREEDY | neutral | vllms | streamed).status_code == 200


def test_an_answer_can_be_sent_back_as_it_came(client):
    """The client's message has fields of features that nobody used."""
    messages = [*CHAT["messages"], client.chat.completions.create(**CHAT).choices[0].message]
    again = client.chat.completions.create(**CHAT | {"messages": [*messages, {"role": "user", "content": "And then?"}]})
    assert again.usage.prompt_tokens > 20


# -- refusals ---------------------------------------------------------------------------------------------------------
WRONG = {
    "broken JSON": (b'{"model": ', None, "not JSON"),
    "no object": (b"[1]", None, "JSON object"),
    "bad unicode": (b'{"model":"novels","prompt":"a\xff"}', None, "not JSON"),
    "half a surrogate": (b'{"model":"novels","prompt":"a\\ud800"}', None, "not JSON"),
    "no prompt": ({"prompt": None}, "prompt", "expected"),
    "empty prompt": ({"prompt": []}, "prompt", "empty"),
    "mixed prompt": ({"prompt": [1, "a"]}, "prompt", "list of texts"),
    "unknown token": ({"prompt": [10**30]}, "prompt", "between 0 and 4095"),
    "wrong type": ({"max_tokens": "many"}, "max_tokens", "expected `int"),
    "negative": ({"max_tokens": -1}, "max_tokens", "at least 1"),
    "no number": ({"temperature": -0.5}, "temperature", "positive"),
    "too hot": ({"temperature": 10**400}, "temperature", ""),
    "huge": ({"max_tokens": 10**9}, "max_tokens", "2048"),
    "huger": ({"max_tokens": 10**40}, "max_tokens", ""),
    "unknown field": ({"max_token": 1}, "max_token", "unknown field"),
    "deep nesting": (b'{"model":"novels","messages":' + b"[" * 900 + b"]" * 900 + b"}", "messages", ""),
    "unsupported field": ({"suffix": "."}, "suffix", 'suffix = ".": is not supported by this server; leave it out'),
    "unsupported form": ({"response_format": {"type": "json_object"}}, "response_format", 'give {"type":"text"}'),
    "mistyped field": ({"presense_penalty": 1}, "presense_penalty", "there is presence_penalty"),
    "thrown away": ({"best_of": 3}, "best_of", "ask for n = 3"),
    "too strict": ({"frequency_penalty": 3}, "frequency_penalty", "[-2, 2]"),
    "too biased": ({"logit_bias": {"7": 101}}, "logit_bias", "between -100 and 100"),
    "biased word": ({"logit_bias": {"the": 1}}, "logit_bias", "expected `int`"),
    "biased nothing": ({"logit_bias": {"4096": 1}}, "logit_bias", "between 0 and 4095"),
    "unknown stop token": ({"stop_token_ids": [-1]}, "stop_token_ids", "between 0 and 4095"),
    "too long": ({"min_tokens": 13}, "min_tokens", "[0, max_tokens = 12]"),
    "too many": ({"n": 1000}, "n", "between 1 and 128"),
    "wrong stop": ({"stop": ["a", 3]}, "stop[1]", "expected `str`"),
    "options without a stream": ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_served_is_refused_by_name(server, case):
    body, param, reason = WRONG[case]
    response = post(server, body if isinstance(body, bytes) else GREEDY | body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert reason in error["message"]


def test_wrong_chats(server):
    for messages in ([], [{"role": "robot", "content": "x"}], [{"role": "user"}], "Hello"):
        assert post(server, CHAT | {"messages": messages}, "/v1/chat/completions").status_code == 400
    tools = post(server, CHAT | {"tools": [{"type": "function"}]}, "/v1/chat/completions")
    assert tools.json()["error"]["param"] == "tools"
    called = {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}
    answer = post(server, CHAT | {"messages": [called]}, "/v1/chat/completions")
    assert answer.json()["error"]["param"] == "messages[0].tool_calls"


def test_a_mistake_raises_the_clients_own_exception(client):
    with pytest.raises(openai.NotFoundError, match="this server has 'novels'"):
        client.completions.create(**GREEDY | {"model": "gpt"})
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.completions.create(**GREEDY, top_p=2.0)


def test_routes_that_are_none(server):
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)):
        response = http.request(method, server.url + path)
        assert response.status_code == status
        assert path in response.json()["error"]["message"]


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["novels"]
    assert client.models.retrieve("novels").max_model_len == 2048
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert http.get(f"{server.url}/health").json() == {"status": "ok"}
    assert http.get(f"{server.url}/version").json() == {"version": soloist.__version__}


def test_request_ids(server):
    assert post(server, GREEDY, headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert post(server, b"{", headers={"X-Request-Id": "not valid!"}).headers["x-request-id"] != "not valid!"


# -- limits -----------------------------------------------------------------------------------------------------------
def test_keys(fake):
    body = {"model": "fake", "prompt": [1], "max_tokens": 3}
    with live(fake.served, Listening(port=0, keys=("first", "second"))) as server:
        assert post(server, body).headers["www-authenticate"] == "Bearer"
        wrong = post(server, body, headers={"Authorization": "Bearer third"})
        assert wrong.json()["error"]["code"] == "invalid_api_key"
        assert http.head(f"{server.url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="second", http_client=patient()) as client:
            assert client.completions.create(**body).choices[0].text == " 0 1 2"


def test_pages_of_other_origins_are_let_in_where_named(fake):
    """A browser asks first, without a key; it shows a page the answer only if the page's origin is named in it."""
    page, other = {"Origin": "https://chat.example.org"}, {"Origin": "https://elsewhere.example.org"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    body, key = {"model": "fake", "prompt": [1], "max_tokens": 3}, {"Authorization": "Bearer one"}
    named = "access-control-allow-origin"
    with live(fake.served, Listening(port=0, keys=("one",), origins=(page["Origin"],))) as server:
        asked = http.options(f"{server.url}/v1/completions", headers=page | asks)
        assert (asked.status_code, asked.headers[named]) == (200, page["Origin"])
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        assert post(server, body, headers=page | key).headers[named] == page["Origin"]
        assert post(server, body, headers=page).headers[named] == page["Origin"]  # a page may read why it was refused
        assert named not in post(server, body, headers=other | key).headers
    with live(fake.served) as server:
        assert named not in post(server, body, headers=page).headers
    with pytest.raises(ConfigurationError, match="cors_origin = 'chat.example.org': write"):
        Listening(origins=("chat.example.org",))


def test_bodies_are_bounded(fake):
    body = {"model": "fake", "prompt": [1], "max_tokens": 3}
    with live(fake.served, max_body_bytes=1000) as server:
        assert post(server, body).status_code == 200
        assert post(server, body | {"prompt": [1] * 500}).status_code == 413
        in_pieces = http.post(f"{server.url}/v1/completions", content=(b"x" * 100 for _ in range(20)))
        assert in_pieces.status_code == 413


def test_a_full_queue_says_when_to_come_back(fake):
    fake.paused = True
    with live(fake.served, max_waiting=2) as server, ThreadPoolExecutor(2) as pool:
        body = {"model": "fake", "prompt": [1, 2], "max_tokens": 3}
        first = [pool.submit(post, server, body) for _ in range(2)]
        server.wait(lambda: server.desk.waiting == 2)
        refused = post(server, body)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
        fake.paused = False
        assert [f.result().json()["choices"][0]["text"] for f in first] == [" 0 1 2"] * 2
        assert post(server, body).status_code == 200
    assert server.desk.calls == server.desk.waiting == 0


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_bounded(fake, stream):
    fake.paused = not stream
    fake.step_s = 0.05
    with live(fake.served, request_timeout_s=4.0 if stream else 1.0) as server:
        response = post(server, {"model": "fake", "prompt": [1], "max_tokens": 5000, "stream": stream})
        if stream:  # it had begun
            *pieces, last = (json.loads(line[6:]) for line in response.text.split("\n\n") if line)
            text = "".join(piece["choices"][0]["text"] for piece in pieces)  # a late server joins tokens
            assert text == "".join(f" {i}" for i in range(len(text.split()))) != ""
            assert last["error"]["code"] == "timeout"
        else:
            assert response.status_code == 504
            fake.paused = False
        server.wait(lambda: fake.left == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_leaves_no_work(fake, stream):
    with live(fake.served) as server:
        body = json.dumps({"model": "fake", "prompt": [1], "max_tokens": 60000, "n": 2, "stream": stream}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            server.wait(lambda: fake.left == 2)
        server.wait(lambda: fake.left == 0)
        server.wait(lambda: server.desk.calls == 0)
        assert sum(leader.aborted for leader in fake.leaders) == 2


def test_a_slow_reader_gets_every_token_joined(fake):
    fake.step_s = 0
    with live(fake.served) as server:
        body = {"model": "fake", "prompt": [1], "max_tokens": 20000, "stream": True}
        with http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            first = next(lines)
            server.wait(lambda: fake.left == 0)  # it reads nothing meanwhile
            found = [first, *(line for line in lines if line)]
    assert found.pop() == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in found)
    assert text == "".join(f" {i}" for i in range(20000))
    assert len(found) < 20000


def test_a_lost_rank_ends_every_call_with_the_cause(fake):
    fake.paused = True
    with live(fake.served) as server, ThreadPoolExecutor(3) as pool:
        body = {"model": "fake", "prompt": [1], "max_tokens": 3}
        waiting = [pool.submit(post, server, body | {"stream": stream}) for stream in (True, False, True)]
        server.wait(lambda: server.desk.waiting == 3)
        fake.gone[1] = "was killed by SIGKILL"
        for future in waiting:
            assert future.result().status_code == 503
            assert "rank 1 was killed by SIGKILL" in future.result().json()["error"]["message"]
        assert post(server, body).status_code == 503
        assert "SIGKILL" in http.get(f"{server.url}/health").json()["status"]
