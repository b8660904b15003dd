"""The `moestro` command: one file per command, each calls one library function and prints."""

from moestro.cli.app import build_app, main

__all__ = ["build_app", "main"]
