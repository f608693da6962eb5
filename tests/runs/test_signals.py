"""The first signal raises a flag, the second SIGINT interrupts, and handlers are put back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from fedmira.runs.signals import stop_on_signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_raises_the_flag(number: int) -> None:
    with stop_on_signals() as stop:
        assert not stop()
        assert (stop.signal_number, stop.signal_name) == (0, "a signal")
        send(number)
        assert stop()
        assert stop.signal_number == number
        assert stop.signal_name == signal.Signals(number).name


def test_a_second_sigint_interrupts_at_once() -> None:
    with stop_on_signals() as stop:
        send(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_after_another_signal_a_sigint_interrupts_and_the_same_again_does_not(number: int) -> None:
    with stop_on_signals() as stop:
        send(number)
        send(number)
        assert stop.signal_number == number
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.signal_number == number


def test_a_sighup_that_is_ignored_stays_so() -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            send(signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back_even_after_an_error() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(KeyError), stop_on_signals():
        {}[signal.getsignal(signal.SIGINT) not in before]
    assert [signal.getsignal(number) for number in numbers] == before


def test_another_thread_gets_a_flag_that_stays_down() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[bool] = []

    def work() -> None:
        with stop_on_signals() as stop:
            seen.extend([stop(), signal.getsignal(signal.SIGINT) is before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True]
