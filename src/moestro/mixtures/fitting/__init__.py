"""Fitting: how a mixture finds its parameters."""
