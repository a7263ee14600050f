"""The files of the page, read once. They need no build step and load nothing from other sites."""

import importlib.resources

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
PAGE_HEADERS = {
    # Captions come from strangers: markup in them can neither load nor run anything.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _read_page() -> dict[str, tuple[str, bytes]]:
    files = (importlib.resources.files("retrieval.server") / "web").iterdir()
    return {
        "/" if file.name == "index.html" else f"/{file.name}": (
            MEDIA_TYPES[file.name.rpartition(".")[2]],
            file.read_bytes(),
        )
        for file in files
    }


PAGE = _read_page()
"""Path -> (media type, content)."""
