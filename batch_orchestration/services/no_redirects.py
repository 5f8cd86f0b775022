"""Asking one server and no other: what a redirect names gets neither a key nor an alert."""

import urllib.request
from typing import Any


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Has a redirect be an answer like any other.

    urllib would take `Authorization` along to whomever it names, and make a GET of a POST: the
    alert would be lost, and taken for sent.
    """

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none."""
