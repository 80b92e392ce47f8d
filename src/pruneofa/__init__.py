"""Prune a pretrained encoder once on plain text, then fine-tune it sparse to every task."""

__version__ = "0.1.0"
