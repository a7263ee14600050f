"""The page's files, read once: no build step, and nothing from elsewhere at run time."""

import importlib.resources

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
PAGE_HEADERS = {
    # Captions are strangers' texts: what they might smuggle in loads nothing and runs nothing.
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
