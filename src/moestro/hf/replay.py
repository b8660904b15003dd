"""Replaying recorded routing: the same experts again, with weights and gradients of the live router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.hf.families import FoundLayer, find_layers
from moestro.hf.outputs import Reading
from moestro.hf.tokens import CallReader, recomputing
from moestro.hf.traces import Fingerprint, LayerTrace, Trace, load_trace, side_of


@contextmanager
def replay(model: nn.Module, trace: Trace | str | Path) -> Iterator[None]:
    """Inside the block every router of the model chooses what the trace says.

        with moestro.replay(model, trace):
            loss = model(**batch).loss
            loss.backward()

    Combine weights are computed from this model's own logits at the recorded choices, so routers learn as they
    would without replay. Tokens are matched in order: sequences may come in other micro-batches, with other
    padding, in another dtype or back end, and with activation checkpointing, but in the order in which they were
    recorded; where token ids were recorded they are compared. Padding keeps the live choice. Sampling and
    capacities of the live router are overruled.

    Args:
        model: of the same family, layers and number of experts as the recorded one.
        trace: from `log.record()`, or the folder of one.

    Raises:
        ValueError: a trace of another model, a family whose weights we cannot recompute, other tokens, or more
            tokens than recorded (before anything runs), or fewer at the end of the block.
    """
    trace = trace if isinstance(trace, Trace) else load_trace(trace)
    player = _Player(model, trace)
    try:
        yield
        player.check_finished()
    finally:
        player.close()


class _Player:
    """Hooks that put recorded choices into every router's output."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._found = find_layers(model)
        trace.fingerprint.check(Fingerprint.of(model, self._found))
        if trace.folder is not None:
            raise ValueError(f"this trace was streamed; replay(model, {str(trace.folder)!r}) reads it back")
        self._trace = trace
        for layer in self._found.values():
            if layer.family.weigh is None:
                raise ValueError(f"moestro does not know how {layer.family.block} weighs its choices: no replay")
        self._lines = {name: _Line(layer, trace.layers[name]) for name, layer in self._found.items()}
        self._leaders = {side_of(name): name for name in reversed(self._found)}
        self._reader = CallReader(model)
        self._checker = model.register_forward_pre_hook(self._check_call)
        self._hooks = [
            layer.router.register_forward_hook(self._hook(name), prepend=True)
            for name, layer in self._found.items()
        ]

    def check_finished(self) -> None:
        """Raise ValueError if recorded tokens are left over."""
        for name, line in self._lines.items():
            if line.next != line.total:
                raise ValueError(
                    f"the trace holds {line.total} tokens of {name} but {line.next} were replayed; "
                    "run the same tokens as were recorded"
                )

    def close(self) -> None:
        for hook in (*self._hooks, self._checker):
            hook.remove()
        self._reader.close()

    def _check_call(self, model: nn.Module, args: Any) -> None:
        """Refuse other tokens before the model runs."""
        if recomputing():
            return
        for side, leader in self._leaders.items():
            tokens, line = self._reader.of_layer(leader), self._lines[leader]
            if tokens.sequence is None:
                continue
            valid = torch.ones_like(tokens.sequence, dtype=torch.bool) if tokens.valid is None else tokens.valid
            line.check_room(int(valid.sum()))
            recorded = self._trace.ids.get(side)
            if recorded is not None and tokens.ids is not None:
                now = tokens.ids[valid].cpu()
                then = recorded[line.next : line.next + len(now)]
                if not torch.equal(now.int(), then):
                    at = line.next + int((now.int() != then).int().argmax())
                    raise ValueError(
                        f"token {at} is not the one that was recorded; replay the same text in the same order"
                    )

    def _hook(self, name: str) -> Any:
        def put(router: nn.Module, arguments: Any, output: Any) -> Any:
            return self._lines[name].replayed(output, self._reader.of_layer(name).valid)

        return put


class _Line:
    """The recorded choices of one layer, read on as calls come."""

    def __init__(self, layer: FoundLayer, recorded: LayerTrace) -> None:
        self._layer, self._recorded = layer, recorded
        self.next, self.total = 0, len(recorded.index)
        self._past: list[tuple[int, Tensor | None, int, Tensor]] = []  # start, valid, tokens, mark

    def check_room(self, count: int) -> None:
        """Raise ValueError if fewer tokens are left than a call brings."""
        if self.next + count > self.total:
            raise ValueError(
                f"this call brings {count} tokens but the trace has {self.total - self.next} of {self.total} left "
                f"for {self._layer.name}; replay the tokens that were recorded"
            )

    def replayed(self, output: Any, valid: Tensor | None) -> Any:
        """The router's output with the recorded choices in it."""
        family = self._layer.family
        live = family.output.read(self._layer.router, output)
        start, valid = self._place(live, valid)
        index, keep = self._choices(live, start, valid)
        assert family.weigh is not None
        weight = family.weigh(self._layer.router, live.logits, index, keep).to(live.weight.dtype)
        return family.output.write(output, Reading(live.logits, weight, index, keep))

    def _place(self, live: Reading, valid: Tensor | None) -> tuple[int, Tensor | None]:
        """Where in the recording this call begins: the next tokens, or those of the call that is recomputed."""
        mark = live.logits.detach().double().square().sum()
        if recomputing():
            return self._place_again(len(live.logits), mark)
        count = len(live.logits) if valid is None else int(valid.sum())
        self.check_room(count)
        start, self.next = self.next, self.next + count
        self._past.append((start, valid, len(live.logits), mark))
        return start, valid

    def _place_again(self, num_tokens: int, mark: Tensor) -> tuple[int, Tensor | None]:
        """A recomputed call has the logits of the call that it repeats; backward need not go in order."""
        same = [past for past in self._past if past[2] == num_tokens]
        start, valid, _, _ = min(reversed(same), key=lambda past: float((past[3] - mark).abs()))
        return start, valid

    def _choices(self, live: Reading, start: int, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        recorded, device = self._recorded, live.index.device
        count = len(live.index) if valid is None else int(valid.sum())
        there = slice(start, start + count)
        index = recorded.index[there].to(device, torch.long)
        keep = live.keep if recorded.keep is None else recorded.keep[there].to(device)
        if valid is None:
            return index, keep
        whole = live.index.clone()
        whole[valid] = index
        if recorded.keep is not None and keep is not None and live.keep is not None:
            kept = live.keep.clone()
            kept[valid] = keep
            keep = kept
        return whole, keep
