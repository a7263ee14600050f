"""Serve indexes over HTTP: a page, an API, and clip-retrieval's endpoints.

    python launch/serve.py --index index [--port 1234]          # then open http://127.0.0.1:1234
    python launch/serve.py --index photos emoji --host 0.0.0.0 --token-file token.txt

Changes to a served index folder are picked up. On SIGTERM or Ctrl-C the server finishes the
requests in flight, then exits.
"""

import os

import tyro

from data.errors import exit_on_usage_error
from retrieval.server.config import ServeConfig
from retrieval.server.startup import serve


def main() -> None:
    # NumPy multiplies small matrices here, for which a second thread costs milliseconds.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    cfg = tyro.cli(ServeConfig, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    with exit_on_usage_error(ServeConfig):
        serve(cfg)


if __name__ == "__main__":
    main()
