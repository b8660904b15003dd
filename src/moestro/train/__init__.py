"""The training loop and the recipes it reads."""
