"""One clock for the messages that FLARE remembers, in place of a thread for each.

Who got a message acknowledges it again while its sender may still ask, and then forgets it. For that FLARE
2.9 starts a `threading.Timer`, a thread that sleeps for minutes: a server with three sites had two thousand
of them after six hundred short rounds, and a service manager allows some thousands. Here one thread forgets
all messages, each at the same moment as before.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from functools import cache
from threading import Thread
from typing import Any

from nvflare.fuel.f3.streaming.byte_receiver import RxTask


@cache
def share_clock() -> None:
    """Have FLARE's received streams of this process forgotten by one thread."""
    clock = asyncio.new_event_loop()
    Thread(target=clock.run_forever, name="polyrank-clock", daemon=True).start()

    def schedule_remove_task(task: Any, ttl: float | None = None) -> None:
        with task.stop_lock:
            if task.cleanup_timer is None:
                task.cleanup_timer = Future()  # something that can be cancelled; to forget twice does no harm
                wait_s = task.completed_task_ttl if ttl is None else ttl
                clock.call_soon_threadsafe(clock.call_later, wait_s, task._remove_task)

    RxTask._schedule_remove_task = schedule_remove_task
