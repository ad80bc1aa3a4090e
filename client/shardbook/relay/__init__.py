"""A relay for one host: the calls of its ranks over one stream to the service. No torch; the command is in ``cli``.

``service`` answers ranks on a Unix socket, ``stream`` keeps the stream, ``upstream`` the connection and what is passed
on call by call, ``listening`` the socket. Where a server knows no relays everything is passed on call by call.
"""
