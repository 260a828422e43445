"""JSON <-> types, for server and client alike. Plain: no asyncio, no aiohttp, no jax."""
