"""A SentencePiece-like tokenizer.json (byte-fallback BPE over whole texts) as the vocabulary of a GGUF file.

llama.cpp merges whatever two neighbours make a token, the one with the best score first; tokenizer.json lists which
pairs merge, in order. The two agree if every pair that makes a token is listed, and pairs that make the same token
lie next to each other, as they do in files that were converted from SentencePiece. Both are checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPACE = "\u2581"
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def is_sentencepiece(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    model = content.get("model", {})
    return model.get("type", "BPE") == "BPE" and bool(model.get("byte_fallback"))


def sentencepiece_settings(content: Mapping[str, Any], tokens: list[str], path: Path) -> dict[str, Any]:
    """The settings that tell llama.cpp how to cut text.

    Args:
        content: of tokenizer.json.
        tokens: of all ids.
        path: for messages.

    Raises:
        ValueError: a tokenizer that llama.cpp would not reproduce.
    """
    model = content["model"]
    missing = [token for token in (*BYTES, model.get("unk_token")) if token not in model["vocab"]]
    if missing:
        raise ValueError(f"{path} lacks the token {missing[0]} to fall back to; llama.cpp needs all 256")
    order = _merged_in_order(model, path)
    _check_pairs(model, path)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(order.get(token, 0)) for token in tokens],
        "tokenizer.ggml.add_space_prefix": _space_in_front(content, path),
        "tokenizer.ggml.add_bos_token": _begins_with(content, path),
        "tokenizer.ggml.unknown_token_id": int(model["vocab"][model["unk_token"]]),
    }


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    return [(merge[0], merge[1]) for merge in merges]


def _merged_in_order(model: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Rank of every token that a merge makes, from 1; a token's merges must follow each other."""
    order: dict[str, int] = {}
    last = None
    for left, right in _pairs(model):
        token = left + right
        if token != last and token in order:
            raise ValueError(f"{path} makes {token!r} at two ranks, which llama.cpp's scores cannot say")
        order.setdefault(token, len(order) + 1)
        last = token
    return order


def _check_pairs(model: Mapping[str, Any], path: Path) -> None:
    vocab, listed = model["vocab"], set(_pairs(model))
    special = {*BYTES, model.get("unk_token")}
    for token in vocab:
        if token in special:
            continue
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in vocab and pair[1] in vocab and pair not in listed:
                raise ValueError(
                    f"{path} does not merge {pair[0]!r} and {pair[1]!r}, which llama.cpp would; moestro writes "
                    "tokenizers that were converted from SentencePiece"
                )


def _space_in_front(content: Mapping[str, Any], path: Path) -> bool:
    """Whether a text gets a space in front; anything else that is done to it is refused."""
    pre, normalizer = content.get("pre_tokenizer") or {}, content.get("normalizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prepends = [step.get("prepend") for step in steps if step.get("type") == "Prepend"]
    replaces = [step for step in steps if step.get("type") == "Replace"]
    spaces = all(step["pattern"] == {"String": " "} and step["content"] == SPACE for step in replaces)
    known = len(prepends) + len(replaces) == len(steps) and spaces and prepends in ([], [SPACE])
    if not pre and replaces and known:
        return bool(prepends)
    metaspace = pre.get("type") == "Metaspace" and pre.get("replacement") == SPACE
    if metaspace and not steps and not pre.get("split", True):
        return bool(pre.get("prepend_scheme", "always") != "never")
    raise ValueError(f"{path} prepares text in a way that llama.cpp does not; moestro writes SentencePiece's own")


def _begins_with(content: Mapping[str, Any], path: Path) -> bool:
    """Whether a text gets a first token of its own."""
    post = content.get("post_processor")
    if post is None:
        return False
    if post.get("type") == "TemplateProcessing":
        return "SpecialToken" in post["single"][0]
    raise ValueError(f"{path} finishes texts by {post.get('type')}, which moestro cannot say in GGUF")
