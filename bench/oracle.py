"""The monolithic oracle: one plain vLLM engine, no KV connector, whose tokens Baton must repeat in every mode.

    python -m bench.oracle --model DIR --prompts prompts.json --out answers.json

One process, no child: the engine core runs inside it (UniProc executor, eager, prefix caching off, explicit
KV bytes), so killing this process kills everything. By default one prompt is computed at a time and on one
core, which makes every answer independent of its neighbours. It never serves anybody and knows nothing of
Baton.

Prompts file::

    {"prompts": [{"id": "p0",                  # unique, any string
                  "prompt_token_ids": [1, 2],  # at least one, all within the vocabulary
                  "max_tokens": 16,            # at least 1; prompt + max_tokens must fit --max-model-len
                  "ignore_eos": false,         # optional, default false
                  "stop_token_ids": [],        # optional
                  "modes": {"seed": 7}}]}      # optional, default {}: greedy. Further keywords of vLLM's own
                                               # SamplingParams, and of its StructuredOutputsParams under
                                               # "structured_outputs"

Answers file (same order)::

    {"oracle": {...what ran: model, dtype, cores, versions, engine settings...},
     "answers": [{"id": "p0",
                  "prompt_token_count": 2,
                  "token_ids": [...],          # the stop token, if one ended it, is the last
                  "finish_reason": "length",   # or "stop"
                  "stop_token_id": null,       # the id that ended it: EOS or one of stop_token_ids
                  "text": "...",               # as vLLM detokenises it
                  "logprobs": [[-0.5, 1]],     # per position: of the token drawn, log probability and rank
                  "rivals": [[[9, 0.25]]]}]}   # per position: the next best tokens, each with how many nats
                                               # its log probability lies below the best

Log probabilities are the model's own, before penalties and masks, unless ``--processed``: then after them, which is
what a greedy answer under penalties turns on.

``bench.exactness`` judges what a service said against these; ``read_answers`` gives them in its words.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from bench.cores import pinned_engine_environment
from bench.exactness import OracleAnswer
from kvtransfer.connector_parent import become_engine_process

MODE_KEYWORDS = frozenset({
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "stop", "structured_outputs",
})  # fmt: skip
DEFAULT_KV_CACHE_BYTES = 512 * 2**20
RIVAL_COUNT = 5
_PINNED_MARK = "BATON_ORACLE_PINNED"


class OracleInputError(ValueError):
    """The prompts file or an option is wrong; the message names the field and what it should be."""


@dataclass(frozen=True, slots=True)
class OraclePrompt:
    """One prompt to answer, greedily unless ``modes`` say otherwise, in vLLM's own words."""

    id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    modes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """One entry of the answers file; the lists are parallel, one entry per output token."""

    id: str
    prompt_token_count: int
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_token_id: int | None
    text: str
    logprobs: tuple[tuple[float, int], ...]
    rivals: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True, slots=True)
class OracleOptions:
    """How the engine runs. ``cores`` is one core by default: the thread count can move the last bits."""

    model: Path
    dtype: str = "bfloat16"
    cores: tuple[int, ...] = (0,)
    max_model_len: int = 8192
    kv_cache_bytes: int = DEFAULT_KV_CACHE_BYTES
    max_batched_tokens: int = 2048
    concurrency: int = 1
    is_processed: bool = False


def parse_prompts(document: object, *, vocab_size: int, max_model_len: int) -> list[OraclePrompt]:
    """Reads the prompts file's content. Raises ``OracleInputError`` naming the first wrong field."""
    if not isinstance(document, dict) or not isinstance(document.get("prompts"), list):
        raise OracleInputError('the prompts file must be {"prompts": [...]}')
    prompts: list[OraclePrompt] = []
    seen: set[str] = set()
    for index, entry in enumerate(document["prompts"]):
        prompt = _parse_prompt(f"prompts[{index}]", entry, vocab_size, max_model_len)
        if prompt.id in seen:
            raise OracleInputError(f"prompts[{index}].id {prompt.id!r} appears twice; ids must be unique")
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise OracleInputError("prompts is empty; give at least one")
    return prompts


def _parse_prompt(where: str, entry: object, vocab_size: int, max_model_len: int) -> OraclePrompt:
    if not isinstance(entry, dict):
        raise OracleInputError(f"{where} must be an object")
    allowed = {"id", "prompt_token_ids", "max_tokens", "ignore_eos", "stop_token_ids", "modes"}
    unknown = sorted(set(entry) - allowed)
    if unknown:
        raise OracleInputError(f"{where}.{unknown[0]} is not known; fields are {', '.join(sorted(allowed))}")
    if not isinstance(entry.get("id"), str):
        raise OracleInputError(f"{where}.id must be a string")
    ids = _token_ids(f"{where}.prompt_token_ids", entry.get("prompt_token_ids"), vocab_size)
    if not ids:
        raise OracleInputError(f"{where}.prompt_token_ids must have at least one token")
    max_tokens = entry.get("max_tokens")
    if type(max_tokens) is not int or max_tokens < 1:
        raise OracleInputError(f"{where}.max_tokens must be an integer of at least 1")
    if len(ids) + max_tokens > max_model_len:
        raise OracleInputError(
            f"{where}: {len(ids)} prompt tokens + max_tokens {max_tokens} exceed --max-model-len {max_model_len}"
        )
    ignore_eos = entry.get("ignore_eos", False)
    if not isinstance(ignore_eos, bool):
        raise OracleInputError(f"{where}.ignore_eos must be true or false")
    stop_ids = _token_ids(f"{where}.stop_token_ids", entry.get("stop_token_ids", []), vocab_size)
    modes = entry.get("modes", {})
    if not isinstance(modes, dict):
        raise OracleInputError(f"{where}.modes must be an object")
    if strange := sorted(set(modes) - MODE_KEYWORDS):
        raise OracleInputError(
            f"{where}.modes.{strange[0]} is not known; they are {', '.join(sorted(MODE_KEYWORDS))}"
        )
    return OraclePrompt(entry["id"], ids, max_tokens, ignore_eos, stop_ids, modes)


def _token_ids(where: str, value: object, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise OracleInputError(f"{where} must be a list of token ids")
    for position, token in enumerate(value):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise OracleInputError(f"{where}[{position}] must be an integer in 0..{vocab_size - 1}")
    return tuple(value)


def read_answers(path: Path) -> dict[str, OracleAnswer]:
    """An answers file by prompt id, in the words of ``bench.exactness``."""
    document = json.loads(path.read_text())
    return {
        entry["id"]: OracleAnswer(
            token_ids=tuple(entry["token_ids"]),
            rivals=tuple(tuple((token, gap) for token, gap in position) for position in entry["rivals"]),
            text=entry.get("text", ""),
            finish=entry.get("finish_reason", ""),
            logprobs=tuple((logprob, rank) for logprob, rank in entry.get("logprobs", ())),
        )
        for entry in document["answers"]
    }


def write_prompts(path: Path, prompts: Sequence[OraclePrompt]) -> None:
    """Writes a prompts file."""
    path.write_text(json.dumps({"prompts": [asdict(prompt) for prompt in prompts]}))


def model_limits(model: Path) -> tuple[int, int]:
    """(vocabulary size, longest context) of a model directory."""
    config_path = model / "config.json"
    try:
        config = json.loads(config_path.read_text())
        return int(config["vocab_size"]), int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError) as error:
        raise OracleInputError(f"--model: {config_path} cannot be read as a model config: {error}") from error


class Oracle:
    """The engine. ``answer`` blocks; ``close`` frees it. Import of vLLM happens here and not before."""

    def __init__(self, options: OracleOptions) -> None:
        import vllm

        self._options = options
        self._vllm_version: str = vllm.__version__
        self._params_type: Any = vllm.SamplingParams
        self._structure_type: Any = vllm.sampling_params.StructuredOutputsParams
        self._llm: Any = vllm.LLM(
            model=str(options.model),
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            kv_cache_memory_bytes=options.kv_cache_bytes,
            max_num_batched_tokens=options.max_batched_tokens,
            max_num_seqs=options.concurrency,
            enforce_eager=True,
            enable_prefix_caching=False,
            distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
            disable_log_stats=True,
            logprobs_mode="processed_logprobs" if options.is_processed else "raw_logprobs",
            # As the engines it judges: another compiler of grammars permits another white space.
            structured_outputs_config={"backend": "guidance"},
            seed=0,
        )

    def describe(self) -> dict[str, Any]:
        settings = asdict(self._options)
        settings["model"] = self._options.model.name
        config = self._llm.llm_engine.vllm_config
        return {
            **settings,
            "vllm_version": self._vllm_version,
            "block_token_count": config.cache_config.block_size,
            "omp_thread_count": os.environ.get("OMP_NUM_THREADS"),
            "enforce_eager": True,
            "prefix_caching": False,
        }

    def answer(self, prompts: Sequence[OraclePrompt]) -> list[AnswerRecord]:
        """Answers in the given order, at most ``concurrency`` at a time. Prints progress to stderr."""
        engine = self._llm.llm_engine
        waiting = list(enumerate(prompts))[::-1]
        answers: dict[int, AnswerRecord] = {}
        running = 0
        while waiting or running:
            while waiting and running < self._options.concurrency:
                index, prompt = waiting.pop()
                engine.add_request(
                    str(index),
                    {"prompt_token_ids": list(prompt.prompt_token_ids)},
                    self._params(prompt),
                )
                running += 1
            for output in engine.step():
                if not output.finished:
                    continue
                running -= 1
                index = int(output.request_id)
                answers[index] = _answer_of(prompts[index], output.outputs[0])
                print(f"oracle: {len(answers)}/{len(prompts)}", file=sys.stderr, flush=True)
        return [answers[index] for index in range(len(prompts))]

    def _params(self, prompt: OraclePrompt) -> Any:
        modes = dict(prompt.modes)
        structure = modes.pop("structured_outputs", None)
        if "logit_bias" in modes:
            modes["logit_bias"] = {int(token): bias for token, bias in modes["logit_bias"].items()}  # JSON's keys
        return self._params_type(
            **{
                "temperature": 0.0,
                "max_tokens": prompt.max_tokens,
                "ignore_eos": prompt.ignore_eos,
                "stop_token_ids": list(prompt.stop_token_ids),
                "logprobs": RIVAL_COUNT,
                "structured_outputs": None if structure is None else self._structure_type(**structure),
                **modes,
            }
        )


def _answer_of(prompt: OraclePrompt, completion: Any) -> AnswerRecord:
    token_ids = tuple(int(token) for token in completion.token_ids)
    rivals: list[tuple[tuple[int, float], ...]] = []
    for position, (chosen, candidates) in enumerate(zip(token_ids, completion.logprobs, strict=True)):
        ranked = sorted(candidates.items(), key=lambda item: -item[1].logprob)
        best = ranked[0][1].logprob
        if not prompt.modes and best != candidates[chosen].logprob:
            raise RuntimeError(f"oracle prompt {prompt.id}: position {position} was not sampled greedily")
        # In an exact tie argmax may take any of the best; the rivals are those that were not taken.
        rivals.append(tuple((int(token), float(best - entry.logprob)) for token, entry in ranked if token != chosen))
    stopped = completion.finish_reason == "stop"
    return AnswerRecord(
        id=prompt.id,
        prompt_token_count=len(prompt.prompt_token_ids),
        token_ids=token_ids,
        finish_reason=completion.finish_reason,
        stop_token_id=token_ids[-1] if stopped and not isinstance(completion.stop_reason, str) else None,
        text=completion.text,
        logprobs=tuple(
            (float(candidates[chosen].logprob), int(candidates[chosen].rank))
            for chosen, candidates in zip(token_ids, completion.logprobs, strict=True)
        ),
        rivals=tuple(rivals),
    )


def _parse_arguments(arguments: Sequence[str] | None) -> tuple[OracleOptions, Path, Path]:
    parser = argparse.ArgumentParser(prog="python -m bench.oracle", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--prompts", type=Path, required=True, help="prompts file (JSON)")
    parser.add_argument("--out", type=Path, required=True, help="answers file to write (JSON)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--cores", default="0", help='cores to pin to, one thread each: "0" or "0,1"')
    parser.add_argument("--max-model-len", type=int, help="default: the model's own, at most 8192")
    parser.add_argument("--kv-cache-bytes", type=int, default=DEFAULT_KV_CACHE_BYTES)
    parser.add_argument("--max-batched-tokens", type=int, default=2048, help="prefill chunk")
    parser.add_argument("--processed", action="store_true", help="log probabilities after penalties and masks")
    parser.add_argument("--concurrency", type=int, default=1, help="prompts in the batch at once")
    parsed = parser.parse_args(arguments)
    try:
        cores = tuple(int(core) for core in parsed.cores.split(","))
    except ValueError:
        parser.error(f'--cores must be numbers with commas between, like "0,1"; got {parsed.cores!r}')
    missing = set(cores) - os.sched_getaffinity(0)
    if missing or len(set(cores)) != len(cores):
        parser.error(f"--cores must be distinct cores of this machine {sorted(os.sched_getaffinity(0))}")
    if parsed.concurrency < 1:
        parser.error("--concurrency must be at least 1")
    longest = model_limits(parsed.model)[1]
    options = OracleOptions(
        model=parsed.model,
        dtype=parsed.dtype,
        cores=cores,
        max_model_len=parsed.max_model_len or min(longest, 8192),
        kv_cache_bytes=parsed.kv_cache_bytes,
        max_batched_tokens=parsed.max_batched_tokens,
        concurrency=parsed.concurrency,
        is_processed=parsed.processed,
    )
    return options, parsed.prompts, parsed.out


def main(arguments: Sequence[str] | None = None) -> int:
    become_engine_process()  # where somebody owns it, it does not outlive them
    try:
        options, prompts_path, out_path = _parse_arguments(arguments)
        prompts = _load(prompts_path, options)
    except OracleInputError as error:
        print(f"oracle: {error}", file=sys.stderr)
        return 2
    if os.environ.get(_PINNED_MARK) != "1":
        _exec_pinned(options, sys.argv[1:] if arguments is None else arguments)
    oracle = Oracle(options)
    answers = oracle.answer(prompts)
    document = {"oracle": oracle.describe(), "answers": [asdict(answer) for answer in answers]}
    partial = out_path.with_suffix(out_path.suffix + ".partial")
    partial.write_text(json.dumps(document))
    partial.replace(out_path)  # a reader never sees half an answer
    return 0


def _exec_pinned(options: OracleOptions, arguments: Sequence[str]) -> NoReturn:
    """Pins this process and starts it anew, because preloads and thread counts act at exec only."""
    os.sched_setaffinity(0, options.cores)
    environment = pinned_engine_environment(os.environ, options.cores)
    # The engine core inside this process: nothing to orphan.
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", _PINNED_MARK: "1"}
    command = [sys.executable, "-m", "bench.oracle", *arguments]
    os.execve(sys.executable, command, environment)  # noqa: S606 ourselves, and no shell wanted


def _load(prompts_path: Path, options: OracleOptions) -> list[OraclePrompt]:
    vocab_size, longest = model_limits(options.model)
    if options.max_model_len > longest:
        raise OracleInputError(f"--max-model-len {options.max_model_len} exceeds the model's {longest}")
    try:
        document = json.loads(prompts_path.read_text())
    except (OSError, ValueError) as error:
        raise OracleInputError(f"--prompts: {prompts_path} cannot be read as JSON: {error}") from error
    return parse_prompts(document, vocab_size=vocab_size, max_model_len=options.max_model_len)


if __name__ == "__main__":
    sys.exit(main())
