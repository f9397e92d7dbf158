// A small client of Baton for Node.js, made from the same .proto files as every other: copy it, change it.
//
//     const baton = new Baton("127.0.0.1:50051");
//     for await (const event of baton.generate({ text: "Once upon a time" }, { timeoutMs: 30_000 })) {
//       if (event.chunk) process.stdout.write(event.chunk.text);
//     }
//     baton.close();
//
// A deadline on every call; failures are BatonError; leaving the loop cancels the call. With `resume` in the request
// a cut connection is attached to again, unseen: no token is missing and none comes twice.

"use strict";

const fs = require("node:fs");
const path = require("node:path");
const { setTimeout: sleep } = require("node:timers/promises");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const PROTO = process.env.BATON_PROTO || path.join(__dirname, "..", "..", "proto");
const LOADED = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };

const api = grpc.loadPackageDefinition(
  protoLoader.loadSync(["baton/v1/generation.proto", "baton/v1/model.proto"], { ...LOADED, includeDirs: [PROTO] }),
).baton.v1;
const rpc = protoLoader.loadSync("google_rpc.proto", { ...LOADED, includeDirs: [__dirname] });

// Retries of calls that were refused before anything was sent; a call that has begun to answer is never sent twice.
const SERVICE_CONFIG = {
  methodConfig: [
    {
      name: [{ service: "baton.v1.GenerationService" }, { service: "baton.v1.ModelService" }],
      retryPolicy: {
        maxAttempts: 3,
        initialBackoff: "0.2s",
        maxBackoff: "2s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
  retryThrottling: { maxTokens: 20, tokenRatio: 0.5 },
};

const MAX_SAMPLES = 16; // the server refuses more

// A call failed. `status`: gRPC's name of the code, by which to decide what to do; `reason`: why (docs/errors.md), or
// null if the server did not say, as when it cannot be reached; `violations`: [{field, description}];
// `retryAfterMs`: when to come back, or null.
class BatonError extends Error {
  constructor(status, reason, message, { metadata = {}, violations = [], retryAfterMs = null } = {}) {
    super(message);
    this.name = "BatonError";
    Object.assign(this, { status, reason, metadata, violations, retryAfterMs });
  }

  static from(error) {
    const status = grpc.status[error.code] ?? "UNKNOWN";
    const found = { reason: null, metadata: {}, violations: [], retryAfterMs: null };
    for (const trailer of error.metadata?.get("grpc-status-details-bin") ?? []) {
      for (const detail of decoded("google.rpc.Status", trailer).details) {
        const name = detail.type_url.split("/").pop();
        if (name === "google.rpc.ErrorInfo") {
          const info = decoded(name, detail.value);
          if (info.domain === "baton") Object.assign(found, { reason: info.reason, metadata: info.metadata });
        } else if (name === "google.rpc.BadRequest") {
          found.violations = decoded(name, detail.value).field_violations;
        } else if (name === "google.rpc.RetryInfo") {
          const delay = decoded(name, detail.value).retry_delay;
          found.retryAfterMs = delay.seconds * 1000 + delay.nanos / 1e6;
        }
      }
    }
    return new BatonError(status, found.reason, error.details || error.message, found);
  }
}

function decoded(name, bytes) {
  return rpc[name].deserialize(bytes);
}

const LOCAL = /^(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+$/;

// How to speak TLS, or null: { ca, certificate, key }, each PEM; without `ca` the public ones. From the variables that
// every client of Baton has: BATON_TLS=1, or files in BATON_TLS_CA, BATON_TLS_CERTIFICATE and BATON_TLS_KEY. One that is
// set and empty is a mistake, unless BATON_TLS=0: without TLS the prompt would go in clear.
function tlsOf(env) {
  for (const name of ["CA", "CERTIFICATE", "KEY", "SERVER_NAME"].map((each) => `BATON_TLS_${each}`)) {
    if (env[name] === "" && env.BATON_TLS !== "0") throw new TypeError(`${name} is set and empty; unset it`);
  }
  const [ca, certificate, key] = ["CA", "CERTIFICATE", "KEY"].map((name) => {
    const file = env[`BATON_TLS_${name}`];
    return file ? fs.readFileSync(file) : null;
  });
  if (ca || certificate || key || !["0", ""].includes(env.BATON_TLS ?? "")) return { ca, certificate, key };
  if (env.BATON_TLS_SERVER_NAME) throw new TypeError("BATON_TLS_SERVER_NAME alone is not for this client; add BATON_TLS=1");
  return null;
}

// Owns one channel; reuse it, it carries many calls at once.
class Baton {
  constructor(address = "127.0.0.1:50051", { apiKey = "", tls = null, allowPlaintextApiKey = false } = {}) {
    if (apiKey && !tls && !allowPlaintextApiKey && !LOCAL.test(address)) {
      throw new TypeError(`the API key would travel in clear to ${address}; use TLS, or allowPlaintextApiKey`);
    }
    const options = {
      "grpc.service_config": JSON.stringify(SERVICE_CONFIG),
      "grpc.enable_retries": 1,
      "grpc.keepalive_time_ms": 60_000, // the prefill of a long prompt is silence
      "grpc.keepalive_timeout_ms": 20_000,
      "grpc.initial_reconnect_backoff_ms": 100,
      "grpc.max_reconnect_backoff_ms": 2_000,
    };
    if (LOCAL.test(address)) options["grpc.enable_http_proxy"] = 0;
    const credentials = tls
      ? grpc.credentials.createSsl(tls.ca, tls.key, tls.certificate)
      : grpc.credentials.createInsecure();
    this.generation = new api.GenerationService(address, credentials, options);
    this.models = new api.ModelService(address, credentials, options);
    this.headers = new grpc.Metadata();
    if (apiKey) this.headers.set("authorization", `Bearer ${apiKey}`);
  }

  close() {
    this.generation.close();
    this.models.close();
  }

  // Yields {started}, {chunk}*, {finished}: the messages of baton.v1.GenerateResponse by their field's name.
  async *generate(request, { timeoutMs, signal } = {}) {
    if (!(timeoutMs > 0)) throw new TypeError("timeoutMs is required: milliseconds for the whole answer");
    const deadline = Date.now() + timeoutMs;
    if (request.resume) request = { ...request, output: { ...request.output, content: withTokenIds(request.output) } };
    const samples = Array.from({ length: Math.min(request.sample_count || 1, MAX_SAMPLES) }, newSample);
    const sofar = { token: "", samples, isFinished: false, isTaken: false, isAttached: false, resumeCount: 0 };
    let call = this.generation.Generate(request, this.headers, { deadline });
    try {
      for (;;) {
        let delayMs = Math.min(100 * 2 ** Math.min(sofar.resumeCount, 4), 1000);
        try {
          yield* events(call, sofar, signal);
          return;
        } catch (error) {
          sofar.isTaken = error.reason === "ATTACHED_ELSEWHERE";
          delayMs = Math.max(delayMs, error.retryAfterMs ?? 0);
          const mayWait = Date.now() + delayMs < deadline && !signal?.aborted;
          // Read too slowly, the window moved on: the tokens are here, so a continuation serves.
          const isTooSlow = sofar.isAttached && error.reason === "RESUME_TOO_LATE";
          if (!(sofar.token && (isCut(error) || isTooSlow) && mayWait)) throw error;
        }
        await sleep(delayMs);
        sofar.resumeCount += 1;
        call = this.generation.ResumeGenerate(
          {
            resume_token: sofar.token,
            ...nextIndices(samples),
            tenant: request.tenant,
            continuation: { request, samples: samples.map(({ ids }) => ({ ids })) },
          },
          this.headers,
          { deadline },
        );
      }
    } finally {
      call.cancel(); // a finished call ignores it; an abandoned one must not run on
      // What another call of ours took over has its reader.
      if (sofar.token && !sofar.isFinished && !sofar.isTaken) await this.#end(sofar.token, request.tenant);
    }
  }

  listModels({ timeoutMs = 10_000 } = {}) {
    return unary(this.models, "ListModels", {}, this.headers, timeoutMs).then((reply) => reply.models);
  }

  // A resumable generation waits for its caller after a cut; one that nobody wants must be told.
  async #end(resumeToken, tenant) {
    try {
      const request = { resume_token: resumeToken, tenant };
      await unary(this.generation, "CancelGeneration", request, this.headers, 5_000);
    } catch (error) {
      // It ends by itself when its grace is over, and the failure that brought us here is the one to tell.
    }
  }
}

async function* events(call, sofar, signal) {
  const abort = () => call.cancel();
  signal?.addEventListener("abort", abort);
  if (signal?.aborted) abort();
  const isFirst = sofar.resumeCount === 0;
  sofar.isAttached = false;
  try {
    for await (const response of call) {
      const name = response.event;
      if (name === "started") {
        sofar.token = response.started.resume_token;
        sofar.isAttached = true;
        if (!isFirst) continue; // the caller was told
      } else if (name === "chunk") {
        take(response.chunk, sofar);
      } else if (name === "finished") {
        sofar.isFinished = true;
      } else if (name !== "prompt") {
        continue; // an event that this program does not know
      }
      yield { [name]: response[name] };
    }
    if (!sofar.isFinished) throw new BatonError("INTERNAL", null, "the stream ended without Finished");
  } catch (error) {
    throw error instanceof BatonError || error.code === undefined ? error : BatonError.from(error);
  } finally {
    signal?.removeEventListener("abort", abort);
  }
}

// Each sample has its own place, from which it is gone on with.
function take(chunk, { token, samples }) {
  const sample = samples[chunk.sample_index];
  if (!sample) throw new BatonError("INTERNAL", "INTERNAL", `sample ${chunk.sample_index} was not asked for`);
  if (chunk.first_token_index !== sample.nextIndex) {
    const message = `token ${sample.nextIndex} was expected, ${chunk.first_token_index} came`;
    throw new BatonError("INTERNAL", "INTERNAL", message);
  }
  // Text held back to the answer's end comes without a token, and counts as one: it is not to come again.
  sample.nextIndex += chunk.token_count || 1;
  if (token) sample.ids.push(...chunk.token_ids);
}

function newSample() {
  return { ids: [], nextIndex: 0 };
}

function nextIndices(samples) {
  const indices = samples.map(({ nextIndex }) => nextIndex);
  return indices.length === 1 ? { next_token_index: indices[0] } : { next_token_indices: indices };
}

// What ended at one router, and may go on there or at another (docs/api/resume.md).
const MAY_GO_ON = new Set(["DRAINING", "NO_WORKER", "QUEUE_FULL", "ATTEMPTS_EXHAUSTED", "STALLED"]);

// The connection, not the generation: the server says of everything else why it ended the call.
function isCut(error) {
  if (!(error instanceof BatonError)) return false;
  if (MAY_GO_ON.has(error.reason)) return true;
  return error.reason === null && ["UNAVAILABLE", "CANCELLED", "UNKNOWN", "INTERNAL"].includes(error.status);
}

// Another router can go on only from the token ids.
function withTokenIds(output) {
  const content = output?.content ?? "CONTENT_TEXT";
  return content === "CONTENT_TOKEN_IDS" ? content : "CONTENT_BOTH";
}

function unary(client, method, request, headers, timeoutMs) {
  return new Promise((resolve, reject) => {
    client[method](request, headers, { deadline: Date.now() + timeoutMs }, (error, reply) =>
      error ? reject(BatonError.from(error)) : resolve(reply),
    );
  });
}

module.exports = { Baton, BatonError, tlsOf };
