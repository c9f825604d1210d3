"""Progress is a line now and then where there is no terminal, and nothing when quiet."""

import pytest

from remoe.lab import console
from remoe.lab.console import Reporter, duration


def test_progress_counts_bytes_of_earlier_runs_but_not_in_the_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Reporter(quiet=False).task("reading", total=80_000_000, done=20_000_000) as advance:
        now += 10
        advance(15_000_000)  # too soon for a line
        now += 10
        advance(5_000_000)
    assert capsys.readouterr().err == "reading: 40.0 of 80.0 MB, 1.0 MB/s\n"


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet=True)
    reporter.line("words")
    with reporter.task("reading") as advance:
        advance(10**12)
    assert capsys.readouterr() == ("", "")


def test_names_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter(quiet=False).line("a [bold] name of :smile: files")
    assert capsys.readouterr().err == "a [bold] name of :smile: files\n"


def test_durations_have_hours_only_where_needed() -> None:
    assert [duration(seconds) for seconds in (7, 754.4, 11109)] == ["0:07", "12:34", "3:05:09"]
