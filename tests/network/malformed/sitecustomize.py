"""Python imports this when it starts, where it is found: it spoils what the process of one site answers.

The site trains honestly; what then leaves it is, round by round, what `WAYS` says.
"""

import sys
import time

WAYS = ("honest", "empty", "garbage", "large", "dict", "raises", "drips", "old", "twice", "honest")


def spoil() -> None:
    from nvflare.fuel.f3.cellnet.defs import CellChannel
    from nvflare.fuel.f3.stream_cell import StreamCell
    from nvflare.fuel.f3.streaming.byte_streamer import TxTask

    from polyrank.site import Site
    from polyrank.wire import decode_task

    train, send, send_chunk = Site.answer, StreamCell.send_blob, TxTask.send_pending_buffer
    way, answers = "honest", [b""]

    def answer(site: Site, request: bytes) -> object:
        nonlocal way
        reply = train(site, request)
        answers.append(reply)
        way = WAYS[decode_task(request).round]
        if way == "raises":
            raise OSError(28, "No space left on device", "/secret/place")
        spoilt = {
            "empty": b"",
            "garbage": b"garbage" * 100,
            "large": reply + bytes(10 * len(reply)),
            "dict": {"payload": reply},
            "drips": reply + bytes(100_000),
            "old": answers[-2],
        }
        return spoilt.get(way, reply)

    def send_chunk_slowly(task: TxTask, final: bool = False) -> object:
        """A hundred pieces, one a second: something always comes."""
        if way == "drips" and task.stream.get_size() > 100_000:
            time.sleep(1)
        return send_chunk(task, final)

    def send_twice(cell: StreamCell, channel: str, *rest: object, **more: object) -> object:
        if way == "twice" and channel == CellChannel.RETURN_ONLY:
            send(cell, channel, *rest, **more)
        return send(cell, channel, *rest, **more)

    Site.answer, StreamCell.send_blob, TxTask.send_pending_buffer = answer, send_twice, send_chunk_slowly


if "nvflare.private.fed.app.client.worker_process" in sys.orig_argv:
    spoil()
