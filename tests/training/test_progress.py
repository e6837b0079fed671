from __future__ import annotations

import pytest

from tevo.training import progress
from tevo.training.progress import Console, duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (190, "3 min 10 s"), (3599.6, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_are_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_without_a_terminal_there_is_a_line_every_ten_seconds_with_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    clock = iter(range(100, 100 + 3 * 40, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    watch = Console()
    watch.say("runs/x: [step] training")
    for step in range(1, 11):
        watch.advance(step, 40, {"loss": 1 / step})
    watch.close()
    assert capsys.readouterr().out.splitlines() == [
        "runs/x: [step] training",
        "step 1/40  loss 1",
        "step 5/40  loss 0.2  time left 1 min 45 s",
        "step 9/40  loss 0.1111  time left 1 min 33 s",
    ]


def test_on_a_terminal_there_is_a_bar_with_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    watch = Console()
    for step in range(1, 6):
        watch.advance(step, 5, {"loss": 1 / step, "valid accuracy": 0.5})
    watch.say("done")
    watch.close()
    out = capsys.readouterr().out
    for words in ("5/5", "loss 0.2  valid accuracy 0.5", "time left", "done"):
        assert words in out
