"""Which connections are closed because nothing moves on them, on real sockets."""

import asyncio

import pytest
import uvicorn
from uvicorn.server import ServerState

from pruneofa.serve.connections import MAX_HEAD, Connection, close_stalled

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
LARGE = 1 << 25  # bytes, more than the system keeps for a client that does not read


async def app(scope, receive, send):
    size = LARGE if scope["path"] == "/large" else 2
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    await send({"type": "http.response.body", "body": b"a" * size})


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

        await test(connect, look)
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
        with pytest.raises(ConnectionResetError):
            while await reader.read(1000):
                pass
            raise ConnectionResetError  # or closed behind what was answered

    served(test)


def test_an_idle_connection_is_uvicorns_to_close():
    async def test(connect, look):
        await connect(HEAD)
        assert [await look() for _ in range(3)] == [1, 1, 1]

    served(test)


def test_an_answer_that_nobody_reads_and_one_that_is_read_slowly():
    async def test(connect, look):
        await connect(HEAD.replace(b"/", b"/large", 1))
        reader, _ = await connect(HEAD.replace(b"/", b"/large", 1))
        counts = []
        for _ in range(3):
            counts.append(await look())
            await reader.readexactly(LARGE // 8)
        assert counts == [2, 1, 1]

    served(test)


def test_a_head_without_end_is_refused():
    async def test(connect, look):
        _, writer = await connect(b"GET / HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                writer.write(b"x: " + b"a" * MAX_HEAD + b"\r\n")
                await writer.drain()
        assert await look() == 0

    served(test)


def test_a_large_body_is_no_head():
    async def test(connect, look):
        reader, _ = await connect(HEAD.replace(b": 0", b": 300000") + b"a" * 300_000)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")

    served(test)
