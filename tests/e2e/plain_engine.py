"""One plain vLLM engine, no connector, no Baton: several samples and the prompt's log probabilities as vLLM has them.

    python tests/e2e/plain_engine.py --model DIR --questions questions.json --out answers.json

A helper of ``test_samples_real.py``, run as a process of its own. A question has ``prompt_token_ids`` and keywords of
vLLM's SamplingParams under ``params``; an answer has ``samples`` (token ids, and for each token its log probability
and rank) and ``prompt`` (for each token but the first: log probability, rank, and the likeliest with theirs).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from bench.oracle import Oracle, OracleOptions
from kvtransfer.connector_parent import become_engine_process


class PlainEngine(Oracle):
    """The oracle's engine, asked for what the oracle does not ask for."""

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        keywords = dict(question["params"])
        if "structured_outputs" in keywords:
            keywords["structured_outputs"] = self._structure_type(**keywords["structured_outputs"])
        params = self._params_type(**keywords)
        (output,) = self._llm.generate([{"prompt_token_ids": question["prompt_token_ids"]}], params, use_tqdm=False)
        samples = [
            {
                "token_ids": list(each.token_ids),
                "logprobs": [
                    (candidates[token_id].logprob, candidates[token_id].rank)
                    for token_id, candidates in zip(each.token_ids, each.logprobs or (), strict=False)
                ],
            }
            for each in sorted(output.outputs, key=lambda each: each.index)
        ]
        prompt = []
        for token_id, candidates in zip(question["prompt_token_ids"], output.prompt_logprobs or (), strict=False):
            if candidates is not None:
                own = candidates[token_id]
                likeliest = sorted(candidates.items(), key=lambda item: item[1].rank)
                prompt.append((own.logprob, own.rank, [(other, each.logprob) for other, each in likeliest]))
        return {"samples": samples, "prompt": prompt}


def main() -> None:
    become_engine_process()
    parser = argparse.ArgumentParser()
    for name in ("--model", "--questions", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--core", type=int, required=True)
    parsed = parser.parse_args()
    os.sched_setaffinity(0, {parsed.core})
    questions = json.loads(parsed.questions.read_text())
    # Every prompt in one step: vLLM on CPUs cannot draw with a seed after a part of one.
    options = OracleOptions(
        model=parsed.model, dtype="float32", max_model_len=4096, concurrency=16, max_batched_tokens=12_000
    )
    engine = PlainEngine(options)
    parsed.out.write_text(json.dumps([engine.ask(question) for question in questions]))


if __name__ == "__main__":
    main()
