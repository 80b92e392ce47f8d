"""Which connections are closed because nothing moves on them, on real sockets."""

import asyncio
import json
import os
import socket

import pytest
import uvicorn
from uvicorn.server import ServerState

from pruneofa.serve.connections import MAX_HEAD, Connection, close_stalled

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
LATE = HEAD.replace(b"/", b"/late", 1)
LARGE = 1 << 25  # bytes, more than the system keeps for a client that does not read


async def app(scope, receive, send):
    if scope["path"] == "/never":
        await asyncio.sleep(60)
    if scope["path"] == "/early":
        await send({"type": "http.response.start", "status": 413, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"long", "more_body": True})
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.body"})
        return
    if scope["path"] == "/late":
        while (await receive()).get("more_body"):
            pass
        await asyncio.sleep(0.3)
    if scope["path"] == "/echo":
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})
        return
    size = LARGE if scope["path"] == "/large" else 2
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    await send({"type": "http.response.body", "body": b"a" * size})


def statuses(answers):
    """The status of each answer; the last one must say that the connection is closed."""
    *_, last = answers.split(b"HTTP/1.1 ")
    assert b"\r\nconnection: close\r\n" in last and answers.count(b"connection: close") == 1
    return [answer[:3] for answer in answers.split(b"HTTP/1.1 ")[1:]]


def served(test):
    """Run `test(connect, look)`: `connect(bytes)` opens a connection, `look()` closes what has not moved since."""

    async def run():
        state, loop = ServerState(), asyncio.get_running_loop()
        config = uvicorn.Config(app, lifespan="off", log_level="critical")
        server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
        opened, seen = [], {}

        async def connect(content):
            connection = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=1024)
            opened.append(connection[1])
            connection[1].write(content)
            await asyncio.sleep(0.1)
            return connection

        async def look():
            nonlocal seen
            seen = close_stalled(list(state.connections), seen)
            await asyncio.sleep(0.1)
            return len(state.connections)

        def shutdown():
            for connection in list(state.connections):
                connection.shutdown()

        look.shutdown = shutdown
        await asyncio.wait_for(test(connect, look), 20)
        for writer in opened:
            writer.transport.abort()
        server.close()

    asyncio.run(run())


@pytest.mark.parametrize("content", [b"", HEAD[:20], HEAD + HEAD[:20]])
def test_a_request_that_never_comes_whole(content):
    async def test(connect, look):
        reader, _ = await connect(content)
        assert await look() == 1
        assert await look() == 0
        answers = await asyncio.wait_for(reader.read(), 5)  # to the end: what was answered is not lost
        assert answers.count(b"HTTP/1.1 200") == content.count(HEAD)

    served(test)


def test_an_idle_connection_is_uvicorns_to_close():
    async def test(connect, look):
        await connect(HEAD)
        assert [await look() for _ in range(3)] == [1, 1, 1]

    served(test)


def test_an_answer_that_nobody_reads():
    async def test(connect, look):
        await connect(HEAD.replace(b"/", b"/large", 1))
        await asyncio.sleep(0.5)  # until the system takes no more
        assert [await look() for _ in range(3)] == [1, 1, 0]

    served(test)


def test_an_answer_that_is_read_slowly():
    async def test(connect, look):
        reader, writer = await connect(HEAD.replace(b"/", b"/large", 1))
        writer.transport.pause_reading()
        received = 0
        with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as slow:
            for _ in range(4):
                assert await look() == 1
                received += sum(len(slow.recv(1 << 16)) for _ in range(4))  # the server's own buffer stays as it is
        writer.transport.resume_reading()
        await asyncio.wait_for(reader.readexactly(LARGE - received), 20)

    served(test)


@pytest.mark.parametrize(
    "begun",
    [
        b"GET / HTTP/1.1\r\n",
        b"POST /late HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n",
    ],
    ids=["head", "trailers"],
)
def test_headers_without_end_are_refused(begun, monkeypatch):
    monkeypatch.setattr("pruneofa.serve.connections._LINGER", 0.5)

    async def test(connect, look):
        _, writer = await connect(begun)
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                writer.write(b"x: " + b"a" * MAX_HEAD + b"\r\n")
                await writer.drain()
        assert await look() == 0

    served(test)


def test_a_pipelined_request_whose_head_comes_in_parts_behind_a_large_body():
    async def test(connect, look):
        reader, writer = await connect(
            HEAD.replace(b"/", b"/late", 1).replace(b": 0", b": 100000") + b"a" * 100_000 + HEAD[:12]
        )
        writer.write(HEAD[12:])
        answers = b""
        while answers.count(b"aa") < 2:
            part = await asyncio.wait_for(reader.read(1000), 5)
            assert part, answers
            answers += part
        assert answers.count(b"HTTP/1.1 200") == 2

    served(test)


def test_an_unanswered_request_is_not_answered_by_the_error_of_the_next():
    async def test(connect, look):
        reader, writer = await connect(LATE + HEAD[:-2])
        for _ in range(2):
            writer.write(b"x: " + b"a" * (MAX_HEAD // 2) + b"\r\n")
        assert statuses(await asyncio.wait_for(reader.read(), 5)) == [b"200"]

    served(test)


def test_a_request_that_the_server_does_not_read_yet_is_not_late():
    async def test(connect, look):
        request = HEAD.replace(b"/", b"/never", 1)
        await connect(request + request + HEAD[:20])  # reading pauses while a second request waits
        assert [await look() for _ in range(3)] == [1, 1, 1]

    served(test)


def test_an_offer_to_upgrade_is_declined_and_the_body_read():
    async def test(connect, look):
        offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
        request = b"POST /echo HTTP/1.1\r\n" + offer + b"content-length: 4\r\n\r\nbody"
        reader, writer = await connect(request + request + HEAD + request[:-2])
        writer.write(request[-2:] + b"GET / HTTP/1.1\r\n" + offer + b"\r\n")
        answers = b""
        while not answers.endswith(b"aa") or answers.count(b"\r\n\r\n") < 5:
            part = await asyncio.wait_for(reader.read(1000), 5)
            assert part, answers
            answers += part
        bodies = [answer.partition(b"\r\n\r\n")[2] for answer in answers.split(b"HTTP/1.1 ")[1:]]
        assert bodies == [b"body", b"body", b"aa", b"body", b"aa"]

    served(test)


async def answered_in_json(reader, message=""):
    head, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"content-type: application/json" in head
    assert set(json.loads(body)) == {"error", "error_type"} and message in json.loads(body)["error"]


@pytest.mark.parametrize(
    "content",
    [
        b"\0\1\2 nothing like HTTP\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /late HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nno length\r\n",
        b"\x16\x03\x01" + b"a" * 700_000,  # more than is read at once: it is not reset before the answer is read
        b"GET / HTTP/1.1\r\nx: " + b"a" * 700_000,
        b"GET / HTTP/1.1\r\nx: " + b"a" * 100_000 + b"\0\r\n\r\n",
    ],
    ids=["garbage", "address", "length", "chunk", "TLS", "head", "both"],
)
def test_what_is_no_http_is_answered_in_json(content):
    async def test(connect, look):
        reader, writer = await connect(content)
        await writer.drain()
        await answered_in_json(reader)
        writer.close()
        await asyncio.sleep(0.1)
        assert await look() == 0

    served(test)


def test_garbage_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr("pruneofa.serve.connections._LINGER", 0.5)

    async def test(connect, look):
        _, writer = await connect(b"\0")
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                writer.write(b"a" * 65536)
                await writer.drain()
        assert await look() == 0

    served(test)


def test_garbage_behind_an_unanswered_request_is_not_its_answer():
    async def test(connect, look):
        reader, _ = await connect(HEAD.replace(b"/", b"/never", 1) + b"\0\1\r\n\r\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(), 0.5)
        assert [await look() for _ in range(3)] == [1, 1, 1]

    served(test)


BROKEN = b"POST /late HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nno length\r\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LATE.replace(b": 0", b": 4") + b"body}", [b"200"]),
        (LATE.replace(b": 0", b": 5") + "caf\u00e9\u00e9".encode(), [b"200"]),
        (LATE + b"\0", [b"200"]),
        (LATE + HEAD + LATE + b"}" * 1000, [b"200"] * 3),
        (LATE + b"}" * 700_000, [b"200"]),  # more than is read at once: no reset before the answer is read
        (LATE + b"}" * 3_000_000, [b"200"]),
        (LATE + BROKEN, [b"200", b"400"]),
        (LATE + HEAD + BROKEN + HEAD, [b"200", b"200", b"400"]),
    ],
    ids=["byte", "characters", "garbage", "several", "much", "more", "body", "third body"],
)
def test_what_was_accepted_before_garbage_is_answered(content, expected, monkeypatch):
    monkeypatch.setattr("pruneofa.serve.connections._LINGER", 1)

    async def test(connect, look):
        reader, writer = await connect(content)
        answers = b""
        while part := await asyncio.wait_for(reader.read(1000), 5):
            answers += part
        assert statuses(answers) == expected
        writer.transport.abort()
        await asyncio.sleep(1.2 if len(content) > 2_000_000 else 0.1)
        assert await look() == 0

    served(test)


def test_garbage_in_a_body_that_is_refused_already():
    async def test(connect, look):
        chunked = b"transfer-encoding: chunked"
        reader, writer = await connect(HEAD.replace(b"/", b"/early", 1).replace(b"content-length: 0", chunked))
        writer.write(b"no length\r\n")
        assert statuses(await asyncio.wait_for(reader.read(), 5)) == [b"413"]

    served(test)


def test_garbage_that_follows_an_answer_later():
    async def test(connect, look):
        reader, writer = await connect(HEAD)
        writer.write(b"}")
        assert statuses(await asyncio.wait_for(reader.read(), 5)) == [b"200", b"400"]

    served(test)


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"", b"\r\n\r\n" + HEAD])
def test_a_long_head_that_is_read_at_once(end):
    async def test(connect, look):
        reader, _ = await connect(b"GET / HTTP/1.1\r\nx: " + b"a" * (MAX_HEAD + 5000) + end)
        await answered_in_json(reader, "has more than 65536 bytes")

    served(test)


def test_a_head_that_is_just_short_enough():
    async def test(connect, look):
        request = HEAD[:-2] + b"x: " + b"a" * (MAX_HEAD - 100) + b"\r\n\r\n"
        reader, writer = await connect(request)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.write((request * 3).replace(b": 0", b": 9", 1).replace(b"\r\n\r\n", b"\r\n\r\nsome body", 1))
        answers = b""
        while answers.count(b"aa") < 4:
            part = await asyncio.wait_for(reader.read(1000), 5)
            assert part, answers
            answers += part

    served(test)


@pytest.mark.parametrize("expecting", [b"", b"expect: 100-continue\r\n"])
def test_a_server_that_ends_waits_for_no_body_that_is_refused(expecting):
    async def test(connect, look):
        length = expecting + b"content-length: 9"
        reader, _ = await connect(HEAD.replace(b"/", b"/early", 1).replace(b"content-length: 0", length))
        look.shutdown()
        assert statuses(await asyncio.wait_for(reader.read(), 5)) == [b"413"]

    served(test)


def test_thousands_of_offers_to_upgrade_at_once():
    async def test(connect, look):
        reader, _ = await connect(b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: a\r\n\r\n" * 3000)
        answers = b""
        while answers.count(b"aa") < 3000:
            part = await asyncio.wait_for(reader.read(1 << 16), 5)
            assert part
            answers += part

    served(test)


def test_a_large_body_is_no_head():
    async def test(connect, look):
        reader, _ = await connect(HEAD.replace(b": 0", b": 300000") + b"a" * 300_000)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")

    served(test)
