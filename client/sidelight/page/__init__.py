"""`sidelight page`: a web page that explains pictures, served on this machine from the asyncio client.

`app` has the routes, `guard` rejects requests of other sites, `pictures` stores the pictures, `explanations` calls the
server, `controls` describes methods, and `serving` runs uvicorn. `static/` is the page itself. May import everything
below `_cli`; needs starlette and uvicorn from the extra `sidelight[page]`.
"""
