"""Attention of one new token over stored keys and values, with its norm, its maps and the residual, in one call.

y = x + Output(concat_h softmax(rotate(q_h) rotate(k_g)^T / sqrt(dim)) v_g)      q, k, v = QKV(norm(x))

over all stored positions or the last few; a sink per head may take part in the softmax, which gives nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from moestro.kernels.compiled.products import (
    MATRIX,
    NIBBLE_BLOCKS,
    ROUNDED,
    gather,
    round_row,
    share,
    spread,
    view,
)
from moestro.kernels.compiled.sources import compiled, sources
from moestro.kernels.compiled.vectors import (
    barrier,
    exponential,
    narrow,
    num_threads,
    thread_number,
    widen,
)

NO_SINK = -3e38  # a score whose share is zero
NORMS = ("none", "head", "full")
FIELDS = (
    *("x", "out", "cosine", "sine", "position"),  # set for every token
    *("width", "heads", "kv_heads", "dim", "positions", "window", "norm", "bfloat16"),
    *("qkv", "output", "qkv_bias", "output_bias", "norm_weight", "head_weight", "sinks", "keys", "values"),
    *("row", "rounded", "projected", "queries", "scores", "mixed", "sums"),
)
ATTENTION = np.dtype(
    [(name, np.int64) for name in FIELDS] + [(name, np.float64) for name in ("eps", "query_eps", "key_eps")]
)
"""A call; `window`: positions that are seen, the token's own included. Addresses, of float32 unless said otherwise:

x, out and norm_weight `[width]`, cosine and sine `[dim / 2]`; qkv and output: MATRIX records; their biases
`[(heads + 2 kv_heads) dim]` and `[width]`, 0 = none; head_weight
`[heads + kv_heads, dim]`: weights of the norms of queries and keys, those of queries times the scale of the scores;
sinks `[heads]`, 0 = none;
keys and values `[kv_heads, positions, dim]` float32 or bfloat16; row `[parts, in of qkv]`, rounded: a ROUNDED
record per part, projected `[parts or 1, out of qkv]`, queries `[heads, dim]`, scores `[parts, positions]`, mixed
`[in of output]`, sums `[parts or 1, out of output]`."""


@numba.njit(fastmath=True)
def _normalise(x: Any, weight: Any, eps: float, out: Any) -> None:
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    scale = np.float32(1 / np.sqrt(total / np.float32(len(x)) + eps))
    for i in range(len(x)):
        out[i] = x[i] * scale * weight[i]


@numba.njit(fastmath=True)
def _scale_of(heads: Any, eps: float) -> Any:
    """One over the root mean square of all numbers of some heads."""
    total = np.float32(0)
    for head in range(len(heads)):
        for d in range(heads.shape[1]):
            total += heads[head, d] * heads[head, d]
    return np.float32(1 / np.sqrt(total / np.float32(heads.size) + eps))


@numba.njit(fastmath=True)
def _rotate(head: Any, scale: Any, weight: Any, cosine: Any, sine: Any, out: Any) -> None:
    half = len(cosine)
    for d in range(half):
        first, second = head[d] * scale * weight[d], head[half + d] * scale * weight[half + d]
        out[d] = narrow(first * cosine[d] - second * sine[d], out)
        out[half + d] = narrow(second * cosine[d] + first * sine[d], out)


@numba.njit
def _place(call: Any, keys: Any, values: Any, part: int, parts: int) -> None:
    """Queries, normalised and rotated, into their table; keys likewise and values into the cache."""
    heads, kv_heads, dim = call.heads, call.kv_heads, call.dim
    projected = view(call.projected, (heads + 2 * kv_heads, dim), np.float32)
    queries = view(call.queries, (heads, dim), np.float32)
    weight = view(call.head_weight, (heads + kv_heads, dim), np.float32)
    cosine, sine = view(call.cosine, dim // 2, np.float32), view(call.sine, dim // 2, np.float32)
    query_scale, key_scale = np.float32(1), np.float32(1)
    if call.norm == 2:
        query_scale = _scale_of(projected[:heads], call.query_eps)
        key_scale = _scale_of(projected[heads : heads + kv_heads], call.key_eps)
    first, last = share(heads + 2 * kv_heads, part, parts)
    for head in range(first, last):
        kv_head = (head - heads) % kv_heads
        scale, eps = (query_scale, call.query_eps) if head < heads else (key_scale, call.key_eps)
        if call.norm == 1:
            scale = _scale_of(projected[head : head + 1], eps)
        if head < heads:
            _rotate(projected[head], scale, weight[head], cosine, sine, queries[head])
        elif head < heads + kv_heads:
            _rotate(projected[head], scale, weight[head], cosine, sine, keys[kv_head, call.position])
        else:
            value = values[kv_head, call.position]
            for d in range(dim):
                value[d] = narrow(projected[head, d], values)


@numba.njit(fastmath=True)
def _attend(query: Any, keys: Any, values: Any, sink: Any, scores: Any, out: Any) -> None:
    """One head. Shapes: query and out `[dim]`, keys and values `[stored, dim]`, scores `[stored or more]`."""
    stored, most = len(keys), sink
    for position in range(stored):
        key, score = keys[position], np.float32(0)
        for d in range(len(query)):
            score += query[d] * widen(key[d])
        scores[position] = score
        most = max(most, score)
    total = exponential(sink - most)
    for position in range(stored):
        scores[position] = exponential(scores[position] - most)
        total += scores[position]
    out[:] = np.float32(0)
    for position in range(stored):
        value, share_of_it = values[position], scores[position] / total
        for d in range(len(out)):
            out[d] += share_of_it * widen(value[d])


@numba.njit
def _attend_heads(call: Any, keys: Any, values: Any, part: int, parts: int) -> None:
    queries = view(call.queries, (call.heads, call.dim), np.float32)
    scores = view(call.scores, (parts, call.positions), np.float32)[part]
    mixed = view(call.mixed, (call.heads, call.dim), np.float32)
    first, last = share(call.heads, part, parts)
    stop = call.position + 1
    start = max(0, stop - call.window)
    for head in range(first, last):
        kv_head, sink = head // (call.heads // call.kv_heads), np.float32(NO_SINK)
        if call.sinks != 0:
            sink = view(call.sinks, call.heads, np.float32)[head]
        _attend(queries[head], keys[kv_head, start:stop], values[kv_head, start:stop], sink, scores, mixed[head])


@numba.njit
def _over_cache(call: Any, keys: Any, values: Any, part: int, parts: int) -> None:
    _place(call, keys, values, part, parts)
    barrier()
    _attend_heads(call, keys, values, part, parts)


@numba.njit(fastmath=True)
def _add_bias(bias: int, first: int, last: int, sums: int) -> None:
    """Add to some outputs of a map, by address; a bias of 0 is none."""
    if bias != 0 and first < last:
        numbers = view(bias + 4 * first, last - first, np.float32)
        out = view(sums + 4 * first, last - first, np.float32)
        for o in range(len(out)):
            out[o] += numbers[o]


@cache
def attention_step() -> Any:
    """The compiled step: what every thread does with an ATTENTION."""
    code = sources()

    def attention_step(address: Any) -> None:
        code  # noqa: B018  (enclosed, so that numba compares it)
        call = numba.carray(address, 1, ATTENTION)[0]
        part, parts = thread_number(), num_threads()
        rounded = view(call.rounded, parts, ROUNDED)[part]
        qkv, output = view(call.qkv, 1, MATRIX)[0], view(call.output, 1, MATRIX)[0]
        x, out = view(call.x, call.width, np.float32), view(call.out, call.width, np.float32)
        row = view(call.row, (parts, qkv.inputs), np.float32)[part]
        _normalise(x, view(call.norm_weight, call.width, np.float32), call.eps, row)
        if qkv.kind == NIBBLE_BLOCKS:
            round_row(row, qkv.group, 0, qkv.inputs // qkv.group, rounded)
        first, last = spread(qkv, 0, row, rounded, call.projected, part, parts)
        gather(qkv, call.projected, first, last, parts)
        _add_bias(call.qkv_bias, first, min(last, (call.heads + 2 * call.kv_heads) * call.dim), call.projected)
        barrier()
        shape = (call.kv_heads, call.positions, call.dim)
        if call.bfloat16:
            keys, values = view(call.keys, shape, np.uint16), view(call.values, shape, np.uint16)
            _over_cache(call, keys, values, part, parts)
        else:
            full_keys, full_values = view(call.keys, shape, np.float32), view(call.values, shape, np.float32)
            _over_cache(call, full_keys, full_values, part, parts)
        barrier()
        mixed = view(call.mixed, output.inputs, np.float32)
        if output.kind == NIBBLE_BLOCKS:
            round_row(mixed, output.group, 0, output.inputs // output.group, rounded)
        first, last = spread(output, 0, mixed, rounded, call.sums, part, parts)
        gather(output, call.sums, first, last, parts)
        _add_bias(call.output_bias, first, min(last, call.width), call.sums)
        sums = view(call.sums, output.outputs, np.float32)
        for o in range(first, min(last, call.width)):
            out[o] = x[o] + sums[o]

    return compiled(attention_step)
