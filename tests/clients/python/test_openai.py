"""The official Python client against a running gateway whose upstream is `tollgate mock`.

Environment:
  TOLLGATE_BASE_URL       the gateway, for example http://127.0.0.1:8080/v1
  TOLLGATE_API_KEY        a key that may use every model
  TOLLGATE_TLS_BASE_URL   the same gateway over HTTPS; optional, with
  TOLLGATE_CA_FILE        the authority that its certificate is from
  TOLLGATE_FORBIDDEN_KEY  a key that this machine's address may not use; optional

Run: pip install -r requirements.txt && pytest test_openai.py

Faults of the upstream are asked for in the model's name (`gpt-4o-mini@status=500`). None is asked for that would take
the upstream out of the pool for longer than the request: 401, 403 and an exhausted quota are not among them, and its
breaker does not count failures.
"""

import asyncio
import json
import os
import ssl
import time
import uuid

import httpx
import openai
import pytest

BASE_URL = os.environ["TOLLGATE_BASE_URL"]
API_KEY = os.environ["TOLLGATE_API_KEY"]
TLS_BASE_URL = os.environ.get("TOLLGATE_TLS_BASE_URL")
CA_FILE = os.environ.get("TOLLGATE_CA_FILE")
FORBIDDEN_KEY = os.environ.get("TOLLGATE_FORBIDDEN_KEY")

MODEL = "gpt-4o-mini"
HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
# What an upstream says about itself and its account, and nobody else needs to know.
PROVIDER_HEADERS = [
    "openai-organization",
    "openai-project",
    "openai-version",
    "openai-processing-ms",
    "set-cookie",
    "cf-ray",
    "cf-cache-status",
    "alt-svc",
]

over_tls = pytest.mark.skipif(not (TLS_BASE_URL and CA_FILE), reason="TOLLGATE_TLS_BASE_URL, TOLLGATE_CA_FILE not set")


def make_client(scheme="http", **options):
    """A client that does not retry: a test that needs luck twice is no test."""
    settings = {"base_url": BASE_URL, "api_key": API_KEY, "max_retries": 0, "timeout": 30}
    if scheme == "https":
        trust = ssl.create_default_context(cafile=CA_FILE)
        settings |= {"base_url": TLS_BASE_URL, "http_client": openai.DefaultHttpxClient(verify=trust)}
    return openai.OpenAI(**(settings | options))


@pytest.fixture(params=["http", pytest.param("https", marks=over_tls)])
def client(request):
    with make_client(request.param) as client:
        yield client


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# Answers


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert "漢字" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_max_tokens(client):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def test_several_choices(client):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_a_long_prompt(client):
    messages = [{"role": "user", "content": "word " * 100_000}]
    answer = client.chat.completions.create(model=MODEL, messages=messages)
    assert answer.usage.prompt_tokens > 100_000


def test_stream_without_usage(client):
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    assert "漢字" in text_of(chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.choices for chunk in chunks), "a chunk without choices carries usage that nobody asked for"
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_stream_with_usage(client):
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, stream_options=options))
    *others, last = chunks
    assert all(chunk.choices and chunk.usage is None and "usage" in chunk.model_fields_set for chunk in others)
    assert last.choices == []
    whole = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert last.usage == whole.usage
    assert text_of(others) == whole.choices[0].message.content


def test_stream_without_usage_on_request(client):
    options = {"include_usage": False}
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, stream_options=options))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("fault", ["split-utf8", "crlf", "split-utf8;crlf"])
def test_stream_in_odd_pieces(client, fault):
    plain = text_of(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    odd = text_of(client.chat.completions.create(model=f"{MODEL}@{fault}", messages=HELLO, stream=True))
    assert odd == plain


def test_stream_comes_as_it_is_made(client):
    """Were the answer held back to its end, the first chunk would come with the last."""
    stream = client.chat.completions.create(model=f"{MODEL}@chunk-delay=50;tokens=10", messages=HELLO, stream=True)
    times = [time.monotonic() for _ in stream]
    assert times[-1] - times[0] > 0.3


def test_a_tool_is_called(client):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS)
    assert answer.choices[0].finish_reason == "tool_calls"
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    answer = client.chat.completions.create(
        model=MODEL, messages=[*HELLO, answer.choices[0].message, result], tools=TOOLS
    )
    assert answer.choices[0].finish_reason == "stop"


def test_a_tool_is_called_in_a_stream(client):
    name, arguments = "", ""
    for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert name == "weather"
    assert set(json.loads(arguments)) == {"city", "days"}


def test_the_streaming_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=TOOLS, tool_choice="none") as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in events
    assert "漢字" in final.choices[0].message.content


def test_completions(client):
    answer = client.completions.create(model="gpt-3.5-turbo-instruct", prompt=["one", "two"], max_tokens=4)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage.completion_tokens == 8
    stream = client.completions.create(model="gpt-3.5-turbo-instruct", prompt="one", max_tokens=4, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_embeddings(client):
    # Without a format the client asks for base64 and decodes it itself.
    decoded = client.embeddings.create(model="text-embedding-3-small", input=["café", "漢字"])
    floats = client.embeddings.create(model="text-embedding-3-small", input=["café", "漢字"], encoding_format="float")
    for one, other in zip(decoded.data, floats.data, strict=True):
        assert len(one.embedding) == 1536
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
    assert decoded.usage == floats.usage
    assert decoded.usage.prompt_tokens > 0


def test_embeddings_of_tokens(client):
    answer = client.embeddings.create(model="text-embedding-3-large", input=[[1, 2, 3], [4]], dimensions=256)
    assert [len(item.embedding) for item in answer.data] == [256, 256]
    assert answer.usage.prompt_tokens == 4


def test_responses(client):
    answer = client.responses.create(model=MODEL, input="Hello")
    assert (answer.status, "漢字" in answer.output_text) == ("completed", True)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_responses_stream(client):
    events = list(client.responses.create(model=MODEL, input="Hello", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens > 0


def test_responses_helper(client):
    with client.responses.stream(model=MODEL, input="Hello") as stream:
        final = stream.get_final_response()
    assert "漢字" in final.output_text


def test_models(client):
    models = [model.id for model in client.models.list()]
    assert MODEL in models
    assert client.models.retrieve(MODEL).id == MODEL


def test_the_key_may_come_as_azure_clients_send_it(client):
    headers = {"Authorization": openai.Omit(), "api-key": API_KEY}
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, extra_headers=headers)
    assert answer.choices[0].finish_reason == "stop"


def test_many_at_once():
    async def run():
        async with openai.AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0) as client:

            async def one():
                stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
                return text_of([chunk async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(32)))

    texts = asyncio.run(run())
    assert len(set(texts)) == 1 and "漢字" in texts[0]


# Headers


@pytest.mark.parametrize("stream", [False, True])
def test_headers_are_the_gateways_own(client, stream):
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, stream=stream)
    assert [name for name in PROVIDER_HEADERS if name in raw.headers] == []
    assert raw.headers.get("server") != "cloudflare"
    assert uuid.UUID(raw.headers["x-request-id"]).version == 7
    assert raw.request_id == raw.headers["x-request-id"]
    raw.http_response.close()


# Errors: the class is chosen by the status, `code`, `type` and `param` come from the body, `request_id` from the header.


def check(error, status, kind, code):
    assert (error.status_code, error.type, error.code) == (status, kind, code)
    assert uuid.UUID(error.request_id).version == 7


@pytest.mark.parametrize("key", ["invalid", "tg-" + "A" * 43, "sk-proj-of-somebody-else"])
def test_authentication_error(client, key):
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key=key).chat.completions.create(model=MODEL, messages=HELLO)
    check(caught.value, 401, "invalid_request_error", "invalid_api_key")


@pytest.mark.skipif(not FORBIDDEN_KEY, reason="TOLLGATE_FORBIDDEN_KEY not set")
def test_permission_denied_error(client):
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.with_options(api_key=FORBIDDEN_KEY).chat.completions.create(model=MODEL, messages=HELLO)
    check(caught.value, 403, "invalid_request_error", "ip_not_allowed")


def test_not_found_error(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="unknown-model", messages=HELLO)
    check(caught.value, 404, "invalid_request_error", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.get("/organization/users", cast_to=httpx.Response)


@pytest.mark.parametrize("body", [b'{"model": "gpt-4o-mini", "messages"', b"[]", b'{"model": "a", "model": "b"}', b"\xff"])
def test_bad_request_error_of_the_gateway(client, body):
    headers = {"content-type": "application/json"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", cast_to=httpx.Response, content=body, options={"headers": headers})
    check(caught.value, 400, "invalid_request_error", "invalid_body")


def test_bad_request_error_of_the_upstream(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"messages": "not a list"})
    check(caught.value, 400, "invalid_request_error", "invalid_type")
    assert caught.value.param == "messages"


def test_conflict_and_unprocessable_entity_error(client):
    for status, kind in [(409, openai.ConflictError), (422, openai.UnprocessableEntityError)]:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(model=f"{MODEL}@status={status}", messages=HELLO)
        check(caught.value, status, "invalid_request_error", None)


def test_rate_limit_error(client):
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model=f"{MODEL}@status=429;retry-after-ms=1", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (429, "rate_limit_exceeded")
    assert "org-" not in caught.value.message, "the message names the upstream's organization"


@pytest.mark.parametrize("status", [500, 503])
def test_internal_server_error(client, status):
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=f"{MODEL}@status={status}", messages=HELLO)
    assert caught.value.status_code >= 500
    assert caught.value.type == "server_error"
    # The failure of one request is not to stand in the way of the next.
    assert client.chat.completions.create(model=MODEL, messages=HELLO).choices


def test_a_whole_answer_that_breaks_off_is_an_error(client):
    with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
        client.chat.completions.create(model=f"{MODEL}@break=1", messages=HELLO)


def test_a_stream_that_breaks_off_is_an_error(client):
    stream = client.chat.completions.create(model=f"{MODEL}@break=3", messages=HELLO, stream=True)
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(stream)


def test_an_error_within_a_stream_is_an_error(client):
    stream = client.chat.completions.create(model=f"{MODEL}@error-event=3", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError):
        list(stream)


def test_timeout_error(client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model=f"{MODEL}@stall", messages=HELLO)


def test_connection_error():
    with pytest.raises(openai.APIConnectionError):
        make_client(base_url="http://127.0.0.1:1/v1").chat.completions.create(model=MODEL, messages=HELLO)


@over_tls
def test_an_unknown_authority_is_refused():
    with pytest.raises(openai.APIConnectionError):
        make_client(base_url=TLS_BASE_URL).chat.completions.create(model=MODEL, messages=HELLO)


def test_retries_are_left_to_the_client(client):
    """A 429 that the client retries succeeds once the upstream does; here it never does, and the client gives up."""
    with pytest.raises(openai.RateLimitError):
        client.with_options(max_retries=1).chat.completions.create(
            model=f"{MODEL}@status=429;retry-after-ms=1", messages=HELLO
        )
