"""How models of transformers are laid out on disk, read safely and rewritten in another layout."""

from moestro.hf.layouts.bank import Bank, find_banks
from moestro.hf.layouts.folder import StockFolder, read_config
from moestro.hf.layouts.relayout import Relayout
from moestro.hf.layouts.table import FAMILIES, LAYOUTS, Family, find_family

__all__ = [
    "FAMILIES",
    "LAYOUTS",
    "Bank",
    "Family",
    "Relayout",
    "StockFolder",
    "find_banks",
    "find_family",
    "read_config",
]
