// The official Node client against a running gateway whose upstream is `tollgate mock`.
//
// Environment:
//   TOLLGATE_BASE_URL       the gateway, for example http://127.0.0.1:8080/v1
//   TOLLGATE_API_KEY        a key that may use every model
//   TOLLGATE_TLS_BASE_URL   the same gateway over HTTPS; optional, with
//   TOLLGATE_CA_FILE        the authority that its certificate is from
//   TOLLGATE_FORBIDDEN_KEY  a key that this machine's address may not use; optional
//
// Run: npm ci && npm test
//
// Faults of the upstream are asked for in the model's name (`gpt-4o-mini@status=500`). None is asked for that would take
// the upstream out of the pool for longer than the request: 401, 403 and an exhausted quota are not among them, and its
// breaker does not count failures.

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, test } from 'node:test';

import OpenAI from 'openai';
import { Agent, fetch as undiciFetch } from 'undici';

const need = (name) => process.env[name] ?? assert.fail(`set ${name}; the head of this file says to what`);
const BASE_URL = need('TOLLGATE_BASE_URL');
const API_KEY = need('TOLLGATE_API_KEY');
const { TOLLGATE_TLS_BASE_URL: TLS_BASE_URL, TOLLGATE_CA_FILE: CA_FILE } = process.env;
const FORBIDDEN_KEY = process.env.TOLLGATE_FORBIDDEN_KEY;

const MODEL = 'gpt-4o-mini';
const HELLO = [{ role: 'user', content: 'Hello' }];
const CHAT = { model: MODEL, messages: HELLO };
const TOOLS = [
  {
    type: 'function',
    function: {
      name: 'weather',
      description: 'The weather in a city',
      parameters: { type: 'object', properties: { city: { type: 'string' }, days: { type: 'integer' } } },
    },
  },
];
// What an upstream says about itself and its account, and nobody else needs to know.
const PROVIDER_HEADERS = [
  'openai-organization',
  'openai-project',
  'openai-version',
  'openai-processing-ms',
  'set-cookie',
  'cf-ray',
  'cf-cache-status',
  'alt-svc',
];
const UUID_V7 = /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;

// No retries: a test that needs luck twice is no test.
const plainClient = (options) =>
  new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0, timeout: 30_000, ...options });

// The fetch of Node itself takes a private authority only from the environment, before it starts.
const tlsClient = (options) =>
  plainClient({
    baseURL: TLS_BASE_URL,
    fetch: undiciFetch,
    fetchOptions: { dispatcher: new Agent({ connect: { ca: readFileSync(CA_FILE, 'utf8') } }) },
    ...options,
  });

const collect = async (stream) => {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
};
const textOf = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('');
const caught = async (promise, kind) => {
  try {
    await promise;
  } catch (error) {
    assert.ok(error instanceof kind, `${error.constructor.name} instead of ${kind.name}: ${error.message}`);
    return error;
  }
  assert.fail(`no ${kind.name}`);
};
// The class is chosen by the status; code, type and param come from the body, requestID from the header.
const check = (error, status, type, code) => {
  assert.deepEqual([error.status, error.type, error.code ?? null], [status, type, code]);
  assert.match(error.requestID, UUID_V7);
};

const suite = (makeClient) => {
  const client = makeClient();

  test('chat', async () => {
    const answer = await client.chat.completions.create(CHAT);
    assert.ok(answer.choices[0].message.content.includes('漢字'));
    assert.equal(answer.choices[0].finish_reason, 'stop');
    assert.equal(answer.usage.prompt_tokens, 8);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
    assert.match(answer._request_id, UUID_V7);
  });

  test('a long prompt', async () => {
    const messages = [{ role: 'user', content: 'word '.repeat(100_000) }];
    const answer = await client.chat.completions.create({ model: MODEL, messages });
    assert.ok(answer.usage.prompt_tokens > 100_000);
  });

  test('a stream without usage has none', async () => {
    const chunks = await collect(await client.chat.completions.create({ ...CHAT, stream: true }));
    assert.ok(textOf(chunks).includes('漢字'));
    assert.equal(chunks.at(-1).choices[0].finish_reason, 'stop');
    for (const chunk of chunks) {
      assert.equal(chunk.choices.length, 1);
      assert.ok(!('usage' in chunk));
    }
  });

  test('a stream with usage ends with it', async () => {
    const stream_options = { include_usage: true };
    const chunks = await collect(await client.chat.completions.create({ ...CHAT, stream: true, stream_options }));
    const last = chunks.pop();
    assert.ok(chunks.every((chunk) => chunk.choices.length === 1 && chunk.usage === null));
    assert.deepEqual(last.choices, []);
    const whole = await client.chat.completions.create(CHAT);
    assert.deepEqual(last.usage, whole.usage);
    assert.equal(textOf(chunks), whole.choices[0].message.content);
  });

  for (const fault of ['split-utf8', 'crlf', 'split-utf8;crlf']) {
    test(`a stream in odd pieces: ${fault}`, async () => {
      const plain = textOf(await collect(await client.chat.completions.create({ ...CHAT, stream: true })));
      const model = `${MODEL}@${fault}`;
      const odd = textOf(await collect(await client.chat.completions.create({ ...CHAT, model, stream: true })));
      assert.equal(odd, plain);
    });
  }

  test('a tool is called', async () => {
    const answer = await client.chat.completions.create({ ...CHAT, tools: TOOLS });
    assert.equal(answer.choices[0].finish_reason, 'tool_calls');
    const call = answer.choices[0].message.tool_calls[0];
    assert.equal(call.function.name, 'weather');
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ['city', 'days']);
  });

  test('a tool is called in a stream', async () => {
    const stream = client.chat.completions.stream({ ...CHAT, tools: TOOLS });
    const final = await stream.finalChatCompletion();
    const call = final.choices[0].message.tool_calls[0];
    assert.equal(call.function.name, 'weather');
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ['city', 'days']);
  });

  test('completions', async () => {
    const request = { model: 'gpt-3.5-turbo-instruct', prompt: 'one', max_tokens: 4 };
    const answer = await client.completions.create(request);
    const chunks = await collect(await client.completions.create({ ...request, stream: true }));
    assert.equal(answer.usage.completion_tokens, 4);
    assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(''), answer.choices[0].text);
    assert.ok(chunks.every((chunk) => !('usage' in chunk)));
  });

  test('embeddings', async () => {
    const request = { model: 'text-embedding-3-small', input: ['café', '漢字'] };
    // Without a format the client asks for base64 and decodes it itself.
    const decoded = await client.embeddings.create(request);
    const floats = await client.embeddings.create({ ...request, encoding_format: 'float' });
    for (const [i, { embedding }] of decoded.data.entries()) {
      assert.equal(embedding.length, 1536);
      assert.ok(embedding.every((x, j) => Math.abs(x - floats.data[i].embedding[j]) < 1e-7));
    }
    assert.deepEqual(decoded.usage, floats.usage);
  });

  test('responses', async () => {
    const answer = await client.responses.create({ model: MODEL, input: 'Hello' });
    assert.equal(answer.status, 'completed');
    assert.ok(answer.output_text.includes('漢字'));
    assert.equal(answer.usage.total_tokens, answer.usage.input_tokens + answer.usage.output_tokens);
  });

  test('responses, streamed', async () => {
    const events = await collect(await client.responses.create({ model: MODEL, input: 'Hello', stream: true }));
    assert.deepEqual(events.map((event) => event.sequence_number), events.map((_, i) => i));
    assert.equal(events[0].type, 'response.created');
    assert.equal(events.at(-1).type, 'response.completed');
    const deltas = events.filter((event) => event.type === 'response.output_text.delta');
    assert.equal(deltas.map((event) => event.delta).join(''), events.at(-1).response.output[0].content[0].text);
    assert.ok(events.at(-1).response.usage.output_tokens > 0);
  });

  test('models', async () => {
    const models = await collect(client.models.list());
    assert.ok(models.some((model) => model.id === MODEL));
    assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
  });

  test('the key may come as Azure clients send it', async () => {
    const headers = { Authorization: null, 'api-key': API_KEY };
    const answer = await client.chat.completions.create(CHAT, { headers });
    assert.equal(answer.choices[0].finish_reason, 'stop');
  });

  for (const stream of [false, true]) {
    test(`headers are the gateway's own${stream ? ', of a stream too' : ''}`, async () => {
      const { data, response } = await client.chat.completions.create({ ...CHAT, stream }).withResponse();
      if (stream) await collect(data);
      assert.deepEqual(PROVIDER_HEADERS.filter((name) => response.headers.has(name)), []);
      assert.notEqual(response.headers.get('server'), 'cloudflare');
      assert.match(response.headers.get('x-request-id'), UUID_V7);
    });
  }

  for (const apiKey of ['invalid', `tg-${'A'.repeat(43)}`, 'sk-proj-of-somebody-else']) {
    test(`AuthenticationError for ${apiKey}`, async () => {
      const error = await caught(makeClient({ apiKey }).chat.completions.create(CHAT), OpenAI.AuthenticationError);
      check(error, 401, 'invalid_request_error', 'invalid_api_key');
    });
  }

  test('PermissionDeniedError', { skip: FORBIDDEN_KEY ? false : 'TOLLGATE_FORBIDDEN_KEY not set' }, async () => {
    const forbidden = makeClient({ apiKey: FORBIDDEN_KEY });
    const error = await caught(forbidden.chat.completions.create(CHAT), OpenAI.PermissionDeniedError);
    check(error, 403, 'invalid_request_error', 'ip_not_allowed');
  });

  test('NotFoundError', async () => {
    const request = client.chat.completions.create({ ...CHAT, model: 'unknown-model' });
    check(await caught(request, OpenAI.NotFoundError), 404, 'invalid_request_error', 'model_not_found');
    await caught(client.get('/organization/users'), OpenAI.NotFoundError);
  });

  test('BadRequestError of the gateway', async () => {
    for (const text of ['{"model": "gpt-4o-mini", "messages"', '[]', '{"model": "a", "model": "b"}']) {
      const body = new TextEncoder().encode(text);
      const headers = { 'content-type': 'application/json' };
      const error = await caught(client.post('/chat/completions', { body, headers }), OpenAI.BadRequestError);
      check(error, 400, 'invalid_request_error', 'invalid_body');
    }
  });

  test('BadRequestError of the upstream', async () => {
    const request = client.chat.completions.create({ model: MODEL, messages: 'not a list' });
    const error = await caught(request, OpenAI.BadRequestError);
    check(error, 400, 'invalid_request_error', 'invalid_type');
    assert.equal(error.param, 'messages');
  });

  test('ConflictError and UnprocessableEntityError', async () => {
    for (const [status, kind] of [[409, OpenAI.ConflictError], [422, OpenAI.UnprocessableEntityError]]) {
      const request = client.chat.completions.create({ ...CHAT, model: `${MODEL}@status=${status}` });
      check(await caught(request, kind), status, 'invalid_request_error', null);
    }
  });

  test('RateLimitError', async () => {
    const request = client.chat.completions.create({ ...CHAT, model: `${MODEL}@status=429;retry-after-ms=1` });
    const error = await caught(request, OpenAI.RateLimitError);
    assert.equal(error.code, 'rate_limit_exceeded');
    assert.ok(!error.message.includes('org-'), "the message names the upstream's organization");
  });

  for (const status of [500, 503]) {
    test(`InternalServerError of ${status}`, async () => {
      const request = client.chat.completions.create({ ...CHAT, model: `${MODEL}@status=${status}` });
      const error = await caught(request, OpenAI.InternalServerError);
      assert.ok(error.status >= 500);
      assert.equal(error.type, 'server_error');
      // The failure of one request is not to stand in the way of the next.
      assert.ok((await client.chat.completions.create(CHAT)).choices);
    });
  }

  test('an answer that breaks off is an error, whole or streamed', async () => {
    await assert.rejects(client.chat.completions.create({ ...CHAT, model: `${MODEL}@break=1` }));
    const model = `${MODEL}@break=3`;
    await assert.rejects(async () => collect(await client.chat.completions.create({ ...CHAT, model, stream: true })));
  });

  test('an error within a stream is an error', async () => {
    const model = `${MODEL}@error-event=3`;
    const stream = await client.chat.completions.create({ ...CHAT, model, stream: true });
    await caught(collect(stream), OpenAI.APIError);
  });

  test('APIConnectionTimeoutError', async () => {
    const model = `${MODEL}@stall`;
    const request = client.chat.completions.create({ ...CHAT, model }, { timeout: 500 });
    await caught(request, OpenAI.APIConnectionTimeoutError);
  });
};

describe('over HTTP', () => suite(plainClient));

describe('over HTTPS with a private authority', { skip: TLS_BASE_URL && CA_FILE ? false : 'not configured' }, () => {
  if (!(TLS_BASE_URL && CA_FILE)) return;
  suite(tlsClient);

  test('another authority is refused', async () => {
    const stranger = plainClient({ baseURL: TLS_BASE_URL });
    await caught(stranger.chat.completions.create(CHAT), OpenAI.APIConnectionError);
  });
});

test('APIConnectionError', async () => {
  const nobody = plainClient({ baseURL: 'http://127.0.0.1:1/v1' });
  await caught(nobody.chat.completions.create(CHAT), OpenAI.APIConnectionError);
});
