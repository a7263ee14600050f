"""Every bad request is refused with one sentence; nothing that a client sends is a 5xx."""

import base64
import contextlib
import json
import math
import random
import resource
import runpy
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_images import many_scans
from PIL import Image
from server_thread import Answer, Served, serving
from shard_maker import encode

from contrastive.model.lit import LitModel
from data import decode_apart
from data.errors import UsageError
from retrieval.search.searcher import Searcher
from retrieval.server import http_server
from retrieval.server.config import Limits, ServeConfig
from retrieval.server.loading import load_service

LAUNCH = Path(__file__).parents[1] / "launch"
LIMITS = Limits(
    max_body_mib=0.25, max_pixels=40_000, max_k=50, max_text=60, max_labels=5, max_candidates=20,
    timeout_s=15.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def searcher(emoji_index: Path, tiny_model: LitModel) -> Searcher:
    return Searcher.load(emoji_index, tiny_model, device="cpu")


@pytest.fixture(scope="module")
def served(searcher: Searcher) -> Iterator[Served]:
    with serving({"drawings": searcher}, limits=LIMITS) as one:
        yield one


def png(*size: int) -> bytes:
    return encode(Image.new("RGB", size, "red"), "PNG")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


SMALL = b64(png(30, 20))
DEEP = b'{"text": "a", "where": ' + b'{"not": ' * 5000 + b"{}" + b"}" * 5000 + b"}"
WIDE = {"any": [{"key": "x"}] * 70}
NAN = b'{"vector": [' + b",".join([b"NaN"] * 32) + b"]}"


def assert_refused(answer: Answer, status: int, *words: str) -> None:
    assert answer.status == status, answer.body
    assert list(answer.json) == ["error"]
    sentence = answer.json["error"]
    assert "\n" not in sentence
    assert len(sentence) < 500
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ["not JSON"]),
        (b"\xff\xfe{", ["not JSON"]),
        (b'{"text": "a"', ["not JSON"]),
        (b'{"text": "\\ud800"}', ["not JSON"]),
        (b"[1]", ["no JSON object"]),
        (DEEP, ["not JSON"]),
        (NAN, ["vector[0]", "finite"]),
        ({}, ["exactly one of", "text", "mix"]),
        ({"text": ""}, ["text", "at least 1"]),
        ({"text": 5}, ["text", "string"]),
        ({"text": "a", "id": 3}, ["exactly one of"]),
        ({"text": "a" * 61}, ["text", "at most 60"]),
        ({"text": "a", "number": 3}, ["number", "no such field", "offset"]),
        ({"text": "a", "k": 0}, ["k", "greater than or equal to 1"]),
        ({"text": "a", "k": 51}, ["k", "at most 50"]),
        ({"text": "a", "k": 10, "offset": 41}, ["k and offset", "50"]),
        ({"text": "a", "k": 10**30}, ["k"]),
        ({"text": "a", "k": 1.5}, ["k", "integer"]),
        ({"text": "a", "k": True}, ["k", "integer"]),
        ({"text": "a", "k": "3"}, ["k", "integer"]),
        ({"vector": ["1"] * 3}, ["vector[0]", "number"]),
        ({"text": "a", "offset": -1}, ["offset"]),
        ({"text": "a", "patch_size": 7}, ["patch_size: 7", "allowed: 48, 40"]),
        ({"text": "a", "index_patch_size": 8}, ["index_patch_size: 8", "allowed: 48, 40"]),
        ({"text": "a", "query_patch_size": 48}, ["query_patch_size", "images"]),
        ({"image": SMALL, "query_patch_size": 2}, ["query_patch_size: 2", "allowed: 48, 40, 30"]),
        ({"text": "a", "refine_patch_size": 1}, ["refine_patch_size: 1", "allowed: 48, 40, 30"]),
        ({"text": "a", "refine_patch_size": 8, "candidates": 21}, ["candidates", "at most 20"]),
        (
            {"text": "a", "refine_patch_size": 8, "candidates": 5, "k": 6},
            ["candidates", "at least k and offset together (6)"],
        ),
        ({"text": "a", "patch_size": 48, "max_ms": 3}, ["instead of a patch size"]),
        ({"text": "a", "max_ms": -1}, ["max_ms", "greater than 0"]),
        ({"text": "a", "max_gflops": 1e-9}, ["max_gflops", "too little"]),
        ({"text": "a", "where": {"colour": "red"}}, ["where", "colour", "allowed: id, key"]),
        ({"text": "a", "where": {"size": {"~": 3}}}, ["where", "no operator"]),
        ({"text": "a", "where": {"size": "red"}}, ["where", "size"]),
        ({"text": "a", "where": {"size": {"<": 10**40}}}, ["where", "size"]),
        ({"text": "a", "where": WIDE}, ["where", "64 comparisons"]),
        ({"text": "a", "where": [1]}, ["where"]),
        ({"text": "a", "nprobe": 0}, ["nprobe"]),
        ({"id": True}, ["id", "whole number"]),
        ({"id": 1.0}, ["id", "whole number"]),
        ({"text": "a", "deduplicate": "perhaps"}, ["deduplicate"]),
        ({"vector": [1.0, 2.0]}, ["vector", "2 numbers", "allowed: 32"]),
        ({"vector": [0.0] * 32}, ["vector", "zero"]),
        ({"vector": ["a"] * 32}, ["vector[0]"]),
        ({"image": "not base64!"}, ["image", "base64"]),
        ({"image": b64(b"no picture")}, ["image", "not an image", "JPEG"]),
        ({"image": b64(png(30, 20)[:60])}, ["image", "allowed"]),
        ({"image": b64(png(300, 300))}, ["image", "too large", "40,000 pixels"]),
        ({"image_url": "http://example.org/a.png"}, ["image_url", "fetches nothing"]),
        ({"mix": []}, ["mix"]),
        ({"mix": [{"weight": 1}]}, ["mix[0]", "exactly one of"]),
        ({"mix": [{"text": "a", "weight": 1e9}]}, ["mix[0].weight"]),
        ({"mix": [{"text": "a"}, {"text": "a", "weight": -1}]}, ["mix", "zero"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_search_is_refused_with_a_sentence(
    served: Served, body: Any, words: list[str]
) -> None:
    assert_refused(served.post("/v1/search", body), 400, *words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"labels": ["a"]}, ["exactly one of image, image_url and id"]),
        ({"image": SMALL}, ["exactly one of labels and class_set"]),
        ({"image": SMALL, "labels": ["a"] * 6}, ["labels", "at most 5"]),
        ({"image": SMALL, "labels": ["a", " "]}, ["labels", "empty"]),
        ({"image": SMALL, "labels": ["a" * 61]}, ["labels", "at most 60"]),
        ({"image": SMALL, "labels": ["a"], "templates": ["photo"]}, ["templates", "{c}"]),
        ({"image": SMALL, "labels": ["a"], "patch_size": 9}, ["patch_size: 9", "allowed: 48"]),
        ({"image": SMALL, "labels": "a"}, ["labels", "array"]),
        ({"image": SMALL, "labels": ["a"], "k": 1001}, ["k", "less than or equal to 1000"]),
    ],
)
def test_a_bad_classification_is_refused(served: Served, body: Any, words: list[str]) -> None:
    assert_refused(served.post("/v1/classify", body), 400, *words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"labels": ["a"]}, ["exactly one of image, image_url and id"]),
        ({"image": SMALL}, ["labels"]),
        ({"image": SMALL, "labels": []}, ["labels", "at least 1"]),
        ({"image": SMALL, "labels": ["a"] * 6}, ["labels", "at most 5"]),
        ({"image": SMALL, "labels": ["a"] * 10_000}, ["labels", "at most 254 items, not 10000"]),
        ({"image": SMALL, "labels": ["a"], "background": math.nan}, ["background", "finite"]),
        ({"image": SMALL, "labels": ["a", " "]}, ["labels", "empty"]),
        ({"image": SMALL, "labels": ["a"], "templates": ["photo"]}, ["templates", "{c}"]),
        ({"image": SMALL, "labels": ["a"], "patch_size": 9}, ["patch_size: 9", "allowed: 48"]),
        ({"image": SMALL, "labels": ["a"], "background": 2}, ["background", "less than"]),
        ({"image": "AAAA", "labels": ["a"]}, ["image", "allowed:"]),
        ({"image": SMALL, "labels": ["a"], "windows": [8]}, ["windows", "at most 50"]),
        ({"image": SMALL, "labels": ["a"], "windows": [0]}, ["windows", "1 or more"]),
        ({"image": SMALL, "labels": ["a"], "windows": []}, ["windows", "at least 1"]),
    ],
)
def test_a_bad_segmentation_is_refused(served: Served, body: Any, words: list[str]) -> None:
    assert_refused(served.post("/v1/segment", body), 400, *words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"labels": ["a"] * 10_000}, ["labels", "at most 254 items, not 10000"]),
        ({"labels": ["a"] * 6}, ["labels", "at most 5"]),
        ({"examples": []}, ["examples", "at least 1 item, not 0"]),
        ({"examples": [{"image": SMALL}] * 9}, ["examples", "at most 8"]),
        ({"examples": [{"image": SMALL, "box": [0, 0, math.inf, 1]}]}, ["examples[0]", "finite"]),
        ({"labels": ["a"], "background": math.nan}, ["background", "finite"]),
    ],
)
def test_a_bad_detection_is_refused(served: Served, body: Any, words: list[str]) -> None:
    body = {"image": SMALL, "background": 0, **body}
    assert_refused(served.post("/v1/detect", body), 400, *words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["one of text, image"]),
        ({"text": "a", "modality": "text"}, ["modality", "allowed: image"]),
        ({"embedding_input": [1.0]}, ["vector", "1 numbers"]),
        ({"image_url": "http://127.0.0.1/"}, ["image_url", "fetches nothing"]),
        ({"text": "a", "num_images": "3"}, ["num_images", "integer"]),
        ({"text": "a", "num_images": True}, ["num_images", "integer"]),
        ({"text": "a", "deduplicate": 1}, ["deduplicate", "boolean"]),
    ],
)
def test_a_bad_knn_request_is_refused(served: Served, body: Any, words: list[str]) -> None:
    assert_refused(served.post("/knn-service", body), 400, *words)


def test_what_is_not_there_is_404_and_says_what_is(served: Served) -> None:
    assert_refused(served.post("/v1/search", {"text": "a", "index": "x"}), 404, "allowed: drawings")
    assert_refused(served.post("/v1/search", {"id": 99}), 404, "id: 99")
    body = {"image": SMALL, "class_set": "x"}
    assert_refused(served.post("/v1/classify", body), 404, "class_set")
    body = {"text": "a", "indice_name": "x"}
    assert_refused(served.post("/knn-service", body), 404, "indice_name", "allowed: drawings")
    for path in ("/v1/images/drawings/99", "/v1/images/x/0", "/v1/indices/x/sample", "/v1", "/x"):
        assert_refused(served.get(path), 404)
    assert_refused(served.get("/v1/search"), 405, "POST")
    for path in ("drawings/0?size=4", "drawings/0?size=a", f"drawings/{10**30}", "drawings/-1"):
        assert_refused(served.get(f"/v1/images/{path}"), 400)
    for ids in ([-1], [True], ["x"], [2**63], 0):
        assert_refused(served.post("/metadata", {"ids": ids}), 400, "ids")
    assert_refused(served.post("/metadata", {"ids": list(range(51))}), 400, "ids: at most 50")


def test_bad_forms_are_refused(served: Served) -> None:
    assert_refused(served.form("/v1/search", image=b"x", k=3), 400, "image")
    assert_refused(served.form("/v1/search", picture=png(9, 9)), 400, "picture", "allowed: image")
    assert_refused(served.form("/v1/search", image=png(9, 9), where="{"), 400, "where", "JSON")
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (
        b"",
        b"--x",
        b"--x\r\n\r\n--x--",
        b"garbage",
        b"--x\r\nContent-Disposition: form-data",
    ):
        assert_refused(served.post("/v1/search", body, form), 400)
    assert_refused(served.post("/v1/search", b"", {"Content-Type": "multipart/form-data"}), 400)


def test_half_a_character_is_refused_wherever_it_stands(served: Served) -> None:
    half = r'["a\ud800"]'
    for fields in ({"labels": half}, {"labels": '["a"]', "templates": r'["{c} \udfff"]'}):
        answer = served.form("/v1/classify", image=png(9, 9), **fields)
        assert_refused(answer, 400, list(fields)[-1], "is not JSON")
    where = r'{"key": {"in": ["\ud800"]}}'
    assert_refused(served.form("/v1/search", text="a", where=where), 400, "where: is not JSON")
    mix = r'[{"text": "\ud83d"}]'
    assert_refused(served.form("/v1/search", mix=mix), 400, "mix: is not JSON")


def test_a_body_that_is_too_large_is_refused_however_it_comes(served: Served) -> None:
    large = json.dumps({"text": "a" * (1 << 20)}).encode()
    assert_refused(served.post("/v1/search", large), 413, "0.25 MiB")
    with socket.create_connection(("127.0.0.1", served.port)) as sock:  # chunked: no length
        sock.sendall(
            b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(10):
            sock.sendall(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
        sock.sendall(b"0\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413")


def test_a_sender_that_dawdles_is_told_so(searcher: Searcher) -> None:
    with (
        serving({"drawings": searcher}, limits=Limits(timeout_s=0.5)) as served,
        socket.create_connection(("127.0.0.1", served.port)) as sock,
    ):
        sock.sendall(b"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{")
        assert sock.recv(100).startswith(b"HTTP/1.1 408")


def test_a_request_that_takes_too_long_is_ended(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = searcher.model.encode_text
    held = threading.Event()

    def slow(texts: Any) -> Any:
        if "slow" in texts:
            held.wait(20)
        return encode(texts)

    monkeypatch.setattr(searcher.model, "encode_text", slow)
    with serving({"drawings": searcher}, limits=Limits(timeout_s=1.0)) as served:
        assert_refused(served.post("/v1/search", {"text": "slow"}), 408, "1 s")
        held.set()
        assert served.post("/v1/search", {"text": "quick"}).status == 200


def test_a_request_that_finds_the_gpu_full_is_told_so_and_the_next_is_answered(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = searcher.model.encode_text

    def full(texts: Any) -> Any:
        if "large" in texts:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return encode(texts)

    monkeypatch.setattr(searcher.model, "encode_text", full)
    with serving({"drawings": searcher}) as served:
        assert_refused(served.post("/v1/search", {"text": "large"}), 503, "out of memory")
        assert served.post("/v1/search", {"text": "small"}).status == 200


def test_above_the_queue_requests_are_told_to_come_back(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = searcher.model.encode_text
    go_on = threading.Event()

    def slow(texts: Any) -> Any:
        go_on.wait(20)
        return encode(texts)

    monkeypatch.setattr(searcher.model, "encode_text", slow)
    with serving({"drawings": searcher}, limits=Limits(max_queue=4)) as served:
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(served.post, "/v1/search", {"text": "a"}) for _ in range(12)]
            while sum(one.done() for one in asked) < 8:
                time.sleep(0.01)
            go_on.set()
            answers = [one.result() for one in asked]
        refused = [answer for answer in answers if answer.status != 200]
        assert len(refused) == 8
        for answer in refused:
            assert_refused(answer, 429, "try again")
            assert answer.headers["retry-after"] == "1"
        assert served.get("/healthz").status == 200


def test_pictures_that_would_take_minutes_hold_nobody(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_apart, "BASE_S", 0.1)
    bad = {"image": b64(many_scans(10_000, 200))}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(served.post, "/v1/search", bad) for _ in range(8)]
        assert served.post("/v1/search", {"text": "rain"}).status == 200
        for one in asked:
            assert_refused(one.result(), 400, "image: image too costly", "takes too long")
    assert served.post("/v1/search", {"image": SMALL}).status == 200


def ask_raw(port: int, sent: bytes) -> bytes:
    """The answer to bytes that may be refused before they are all sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent)
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def test_silent_connections_do_not_keep_others_out(searcher: Searcher) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # as a shell starts it
    try:
        with serving({"drawings": searcher}) as served, contextlib.ExitStack() as silent:
            address = ("127.0.0.1", served.port)
            for _ in range(1200):
                silent.enter_context(socket.create_connection(address, timeout=30))
            assert served.post("/v1/search", {"text": "rain"}).status == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_beyond_the_most_connections_the_one_that_waits_longest_is_closed(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 20)
    monkeypatch.setattr(http_server, "SPARE_FILES", 1)
    with serving({"drawings": searcher}) as served, contextlib.ExitStack() as opened:
        address = ("127.0.0.1", served.port)
        silent = [opened.enter_context(socket.create_connection(address)) for _ in range(30)]
        for _ in range(3):
            assert served.post("/v1/search", {"text": "rain"}).status == 200
        silent[0].settimeout(5)
        assert silent[0].recv(1) == b""
        silent[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert silent[-1].recv(100).startswith(b"HTTP/1.1 200")


def test_a_head_has_a_size_and_a_time(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_S", 0.4)
    start = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
    large = [
        start + b"X: " + b"y" * (200 << 20),
        start + b"".join(b"X%d: y\r\n" % number for number in range(500_000)),
        b"GET /" + b"a" * (64 << 20),
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving({"drawings": searcher}, limits=Limits(timeout_s=5.0)) as served:
        port = served.port
        good = start + b"Cookie: " + b"x" * 60_000 + b"\r\nConnection: close\r\n\r\n"
        assert ask_raw(port, good).startswith(b"HTTP/1.1 200")
        for sent in large:
            assert ask_raw(port, sent).startswith(b"HTTP/1.1 431")
        chunked = b"POST /v1/search HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        with contextlib.suppress(ConnectionError):  # cut off, being within a request
            ask_raw(port, chunked + large[0][len(start) :])
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 << 10  # KiB
        assert ask_raw(port, start).startswith(b"HTTP/1.1 408")
        assert ask_raw(port, b"") == b""
        assert served.post("/v1/search", {"text": "rain"}).status == 200


def test_slow_senders_take_no_places(searcher: Searcher) -> None:
    head = b"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{"
    with (
        serving({"drawings": searcher}, limits=Limits(max_queue=2)) as served,
        contextlib.ExitStack() as slow,
    ):
        for _ in range(5):
            sock = slow.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            sock.sendall(head)
        assert served.post("/v1/search", {"text": "rain"}).status == 200


def test_cut_connections_do_no_harm(served: Served) -> None:
    for sent in (
        b"",
        b"POST",
        b"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{",
    ):
        with socket.create_connection(("127.0.0.1", served.port)) as sock:
            sock.sendall(sent)
    body = json.dumps({"text": "rain"}).encode()
    head = f"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", served.port)) as sock:
            sock.sendall(head.encode() + body)
    assert served.post("/v1/search", {"text": "rain"}).status == 200
    for _ in range(200):
        if served.service.num_in_flight == 0:
            break
        time.sleep(0.01)
    assert served.service.num_in_flight == 0


def test_no_mangled_request_is_a_server_error(served: Served) -> None:
    draw = random.Random(0)
    good = json.dumps(
        {"mix": [{"text": "rain", "weight": 0.5}, {"image": SMALL}], "k": 3, "index": "drawings",
         "where": {"size": {">": 10}, "any": [{"key": {"in": ["a"]}}]}, "offset": 1}
    ).encode()  # fmt: skip
    odd = [None, True, -1, 1e308, 2**70, "", "\u0000", [], {}, [[]], {"a": {}}, "NaN"]
    fields = ["text", "image", "vector", "id", "k", "offset", "where", "index", "mix", "ef",
              "patch_size", "max_ms", "candidates", "labels", "templates", "image_url"]  # fmt: skip
    for turn in range(150):
        mangled = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            mangled[draw.randrange(len(mangled))] = draw.randrange(256)
        body = {draw.choice(fields): draw.choice(odd) for _ in range(3)} if turn % 2 else mangled
        data = bytes(body) if isinstance(body, bytearray) else json.dumps(body).encode()
        for path in ("/v1/search", "/v1/classify", "/knn-service", "/metadata"):
            answer = served.post(path, data)
            assert answer.status < 500, (path, data, answer.body)
            if answer.status >= 400:
                assert_refused(answer, answer.status)


# ---- who may ask ---------------------------------------------------------------------------


def test_a_name_of_another_site_that_points_here_is_refused(
    served: Served, searcher: Searcher
) -> None:
    """DNS rebinding: a browser sends the name that it looked up."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::1", "a b", ""):
        assert_refused(served.get("/v1/indices", {"Host": host}), 403, "host", "localhost")
    for host in ("localhost", f"localhost:{served.port}", "127.0.0.1", "[::1]:80", "192.168.0.7"):
        assert served.get("/v1/indices", {"Host": host}).status == 200
    assert served.get("/healthz", {"Host": "probe.example"}).status == 200
    with serving({"drawings": searcher}, cors=["https://friend.example"]) as one:
        assert one.get("/v1/indices", {"Host": "friend.example"}).status == 200
        assert_refused(one.get("/v1/indices", {"Host": "evil.example"}), 403, "host")
    with serving({"drawings": searcher}, token="x") as one:
        token = {"Authorization": "Bearer x", "Host": "photos.example"}
        assert one.get("/v1/indices", token).status == 200


def test_without_the_token_only_the_page_and_health_are_shown(searcher: Searcher) -> None:
    with serving({"drawings": searcher}, token="secret") as served:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Basic secret"},
            {"Authorization": "Bearer"},
        ):
            for path in ("/v1/indices", "/indices-list", "/metrics", "/openapi.json", "/x"):
                assert_refused(served.get(path, headers), 401, "token")
            answer = served.post("/v1/search", {"text": "rain"}, headers)
            assert_refused(answer, 401, "token")
            assert answer.headers["www-authenticate"] == "Bearer"
        for scheme in ("Bearer", "bearer"):  # any case, as RFC 9110 has it
            token = {"Authorization": f"{scheme} secret"}
            assert served.post("/v1/search", {"text": "rain"}, token).status == 200
        assert [served.get(path).status for path in ("/", "/app.js", "/healthz", "/readyz")] == [
            200
        ] * 4


def test_only_origins_of_the_list_may_read_answers(searcher: Searcher) -> None:
    with serving({"drawings": searcher}, cors=["http://friend.example"], token="x") as served:
        for origin, allowed in (("http://friend.example", True), ("http://other.example", False)):
            answer = served.get("/indices-list", {"Origin": origin, "Authorization": "Bearer x"})
            assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
    with serving({"drawings": searcher}) as served:
        answer = served.get("/indices-list", {"Origin": "http://friend.example"})
        assert "access-control-allow-origin" not in answer.headers


# ---- starting ------------------------------------------------------------------------------


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(LAUNCH / "serve.py"), run_name="__main__")
    return int(stop.value.code or 0)


def test_what_cannot_be_served_stops_the_start_with_one_sentence(
    emoji_index: Path, tiny_model: LitModel, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = LitModel.from_pretrained(emoji_index / "model")
    other.feature_mean += 1
    other.save_pretrained(tmp_path / "other-model")
    for name in ("damaged", "missing"):
        shutil.copytree(emoji_index, tmp_path / name)
        file = tmp_path / name / "patch_40" / "image.index"
        file.unlink()
        if name != "missing":
            file.write_bytes(b"nothing")
    (tmp_path / "empty").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        good = ["--port", "0", "--index", str(emoji_index)]
        for arguments, words in (
            (["--index", str(tmp_path)], "holds no index"),
            (["--index", str(tmp_path / "damaged")], "damaged"),
            (["--index", str(tmp_path / "missing")], "missing"),
            ([*good, "--model", str(tmp_path / "other-model")], "another image tower"),
            ([*good, str(emoji_index)], "two folders of one name"),
            ([*good, "--token-file", str(tmp_path / "empty")], "one word of ASCII"),
            ([*good, "--classes", str(tmp_path / "empty")], "is empty"),
            (["--index", str(emoji_index), "--port", port], f"port {port}"),
            (["--index", str(emoji_index), "--port", "70000"], "0 to 65535"),
        ):
            monkeypatch.setenv("FLEXILIT_CACHE", str(tmp_path))
            assert start(monkeypatch, *arguments) == 2
            error = capsys.readouterr().err.strip()
            assert error.startswith("error: "), error
            assert words in error
            assert "\n" not in error


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match=r"limits\.max_k 5000: at most 2048"):
        Limits(max_k=5000)
    with pytest.raises(UsageError, match=r"limits\.timeout_s 0: must be above 0"):
        Limits(timeout_s=0.0)


def test_indexes_of_one_model_share_it(emoji_index: Path, tmp_path: Path) -> None:
    shutil.copytree(emoji_index, tmp_path / "copy")
    classes = tmp_path / "kinds.txt"
    classes.write_text("a cat\na dog\n")
    config = ServeConfig((str(emoji_index), str(tmp_path / "copy")), classes=(str(classes),))
    service = load_service(config)
    one, other = (index.searcher for index in service.indexes.values())
    assert one.model is other.model
    assert list(service.indexes) == ["drawings", "copy"]
    assert service.class_sets["kinds"].class_names == ["a cat", "a dog"]
    np.testing.assert_array_equal(one.snapshot.ids(), other.snapshot.ids())
    service.close()
