// One chat answer from the command line:
//
//     node chat.js [--address HOST:PORT] [--timeout S] [--max-tokens N] [--temperature T] [--resume] "prompt"
//     node chat.js --models
//
// The answer goes to standard output; what it cost, or why it failed, to standard error. BATON_API_KEY: the key, where
// the server asks for one; BATON_TLS_CA: the file with its CA, where it speaks TLS (baton.js has the others). Exit codes: 0 answered, 1 failed, 2 a wrong request, 3 come back later, 4 the deadline passed.

"use strict";

const { parseArgs } = require("node:util");
const { Baton, BatonError, tlsOf } = require("./baton.js");

const EXIT_CODES = { INVALID_ARGUMENT: 2, NOT_FOUND: 2, UNAVAILABLE: 3, RESOURCE_EXHAUSTED: 3, ABORTED: 3, DEADLINE_EXCEEDED: 4 };

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      address: { type: "string", default: "127.0.0.1:50051" },
      timeout: { type: "string", default: "120" },
      "max-tokens": { type: "string" },
      temperature: { type: "string", default: "0" },
      resume: { type: "boolean", default: false },
      models: { type: "boolean", default: false },
    },
  });
  const baton = new Baton(values.address, { apiKey: process.env.BATON_API_KEY, tls: tlsOf(process.env) });
  const interrupt = new AbortController();
  process.once("SIGINT", () => interrupt.abort());
  try {
    if (values.models) {
      for (const model of await baton.listModels()) console.log(`${model.name}\t${model.max_context_token_count} tokens`);
      return 0;
    }
    const request = {
      chat: { messages: [{ role: "user", content: positionals.join(" ") }] },
      sampling: { temperature: Number(values.temperature) },
      stop: values["max-tokens"] ? { max_output_token_count: Number(values["max-tokens"]) } : undefined,
      resume: values.resume ? {} : undefined,
    };
    const options = { timeoutMs: Number(values.timeout) * 1000, signal: interrupt.signal };
    for await (const event of baton.generate(request, options)) {
      if (event.chunk) process.stdout.write(event.chunk.text);
      if (event.finished) {
        const { usage, reason } = event.finished;
        process.stdout.write("\n");
        console.error(`${usage.prompt_token_count} tokens in, ${usage.output_token_count} out, ended by ${reason}`);
      }
    }
    return 0;
  } catch (error) {
    if (!(error instanceof BatonError)) throw error;
    if (interrupt.signal.aborted) return 130;
    console.error(`${error.status} ${error.reason ?? "(no reason given)"}: ${error.message}`);
    for (const { field, description } of error.violations) console.error(`  ${field} ${description}`);
    if (error.retryAfterMs !== null) console.error(`  come back in ${error.retryAfterMs} ms`);
    return EXIT_CODES[error.status] ?? 1;
  } finally {
    baton.close();
  }
}

main().then(
  (code) => (process.exitCode = code),
  (error) => {
    console.error(error);
    process.exitCode = 1;
  },
);
