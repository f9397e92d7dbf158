"""The shared words of Baton, and all that a client needs. Imports no ray, vllm or torch."""

__version__ = "0.1.0"
"""The version of both wheels; the only place where it is written."""
