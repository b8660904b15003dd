"""Recipes: one file per paper, found by import."""

from moestro.methods.registry import Method, Option, all_methods, build, find_method, method

__all__ = ["Method", "Option", "all_methods", "build", "find_method", "method"]
