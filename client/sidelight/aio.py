"""The asyncio client: the same names, with `await` and `async for`.

async with sidelight.aio.connect("unix:/run/sidelight.sock") as client:
    answer = await client.attribute("cat.png")
    async for answer in client.stream(batches):
        ...
"""

from ._clients.aio import AsyncClient, connect

__all__ = ["AsyncClient", "connect"]
