"""A process that is killed while it writes."""

import multiprocessing
import signal
import time
from collections.abc import Callable
from typing import Any


def kill_while(action: Callable[[], Any], seconds: float) -> None:
    """Fork, do it again and again there, and kill that process after so many seconds."""

    def forever(started: Any) -> None:
        started.set()
        while True:
            action()

    processes = multiprocessing.get_context("fork")
    started = processes.Event()
    child = processes.Process(target=forever, args=(started,))
    child.start()
    assert started.wait(timeout=60)
    time.sleep(seconds)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
