"""What a person sees."""

import io

from rich.console import Console

from moestro.train import progress
from moestro.train.progress import LiveDisplay, Pace, PlainLines, default_progress

RECORD = {"loss": 2.5, "tokens_per_second": 12345.6}


def drive(shown):
    shown.say("device cpu [not markup]")
    shown.begin("moe", 0, 4, 2)
    for step in range(1, 5):
        shown.step({"step": step, **RECORD})
        shown.load({"layers.0.moe": [1, 1, 0, 2]})
    shown.evaluated({"step": 4, "validation_loss": 2.0, "bits_per_byte": 2.885})
    shown.end()


def test_plain_lines_are_one_per_interval():
    stream = io.StringIO()
    drive(PlainLines(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "device cpu [not markup]"
    assert [line.partition(" · ")[0] for line in lines[1:]] == ["moe step 2/4", "moe step 4/4", "moe step 4/4"]
    assert "loss 2.5000 · 12 346 tokens/s · 0:00 left" in lines[1]
    assert lines[-1].endswith("validation loss 2.0000 · 2.8850 bits per byte")
    assert "\x1b" not in stream.getvalue()


def test_the_live_display_shows_figures_and_the_load_of_every_layer():
    stream = io.StringIO()
    drive(LiveDisplay(Console(file=stream, force_terminal=True, width=100, color_system=None)))
    text = stream.getvalue()
    assert "4/4 · loss 2.5000 · 12 346 tokens/s" in text
    assert "layers.0.moe" in text
    assert "▄▄▁█" in text
    assert "device cpu [not markup]" in text


def test_no_terminal_or_no_color_means_plain_lines(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert isinstance(default_progress(), PlainLines)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert isinstance(default_progress(), LiveDisplay)
    monkeypatch.setenv("NO_COLOR", "1")
    assert isinstance(default_progress(), PlainLines)


def test_the_time_left_counts_only_steps_of_this_start(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert Pace("moe", 100, 5000).eta(105) == "2:43:10"  # 4895 steps of two seconds
