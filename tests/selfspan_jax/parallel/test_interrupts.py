"""Signals: noted while a state is to be saved, raised elsewhere, and a second one ends the process."""

import os
import signal
import threading
import time

import pytest

from selfspan_jax.parallel import interrupts
from selfspan_jax.parallel.interrupts import Interrupts


@pytest.mark.parametrize(
    ("number", "error", "status"), [(signal.SIGTERM, SystemExit, 143), (signal.SIGINT, KeyboardInterrupt, None)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_is_raised_but_within_deferred_it_is_noted(number, error, status, capfd):
    before = signal.getsignal(number)
    with Interrupts() as open_interrupts:
        with open_interrupts.deferred():
            signal.raise_signal(number)
            assert open_interrupts.signal == number
            with pytest.raises(error) as raised, open_interrupts.deferred(False):
                signal.raise_signal(number)
        assert getattr(raised.value, "code", None) == status
        with pytest.raises(error):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_two_signals_at_once_are_one_wish_and_a_later_one_ends_the_process(monkeypatch, capfd):
    """`timeout` signals its child and the child's group. The later one is read by a thread: XLA may be compiling."""
    ended, statuses = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda status: (statuses.append(status), ended.set()))
    with Interrupts() as open_interrupts, open_interrupts.deferred():
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        said = ""
        while not said.endswith("\n"):  # `print` writes the end of a line by itself
            time.sleep(0.01)
            said += capfd.readouterr().err
        assert "saving a checkpoint" in said and said.count("\n") == 1 and not statuses
        monkeypatch.setattr(interrupts, "_SAME_SECONDS", 0.0)
        signal.raise_signal(signal.SIGINT)
        assert ended.wait(10) and set(statuses) <= {130, 143}
    assert open_interrupts.signal == signal.SIGTERM
