"""Errors that the user can fix: one sentence, no traceback."""

import dataclasses
import errno
import os
import re
import signal
import sys
import time
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """A value that cannot work. The message is one sentence: the value, and what is allowed.

    It names parameters as Python spells them, `data.num_workers -1: at least 0`; programs turn
    them into flags (`exit_on_usage_error`).
    """


class DataError(RuntimeError):
    """Data that cannot be used, where the user asked not to skip it. One sentence."""


class Stopped(KeyboardInterrupt):
    """A signal ended a run, which is saved. One sentence."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


# A disk that is full, read-only or failing, and what may not be written.
_REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
}  # fmt: skip


def refusal_of_disk(error: BaseException) -> str | None:
    """One sentence where an error says that a disk did not take what was written, else None.

    Libraries raise errors of their own, with the number of the system's error in the text; numpy
    counts the bytes that were written.
    """
    number = getattr(error, "errno", None)
    if number is None:
        found = re.search(r"\b(?:errno|os error) (\d+)", str(error), re.IGNORECASE)
        if found:
            number = int(found[1])
        elif re.search(r"\d+ requested and \d+ written", str(error)):
            number = errno.ENOSPC
    if number not in _REFUSALS:
        return None
    file = getattr(error, "filename2", None) or getattr(error, "filename", None)
    what = f"{os.fspath(file)!r}" if isinstance(file, str | os.PathLike) else "a file"
    return (
        f"{what} cannot be written or read ({os.strerror(number)}); what is complete stays, so "
        "mend that and start again"
    )


def is_gpu_full(error: BaseException) -> bool:
    """Whether torch says that a GPU has no memory left, or CUDA, NCCL or cuBLAS through it."""
    said = str(error)
    full = "STATUS_ALLOC_FAILED" in said or ("out of memory" in said and "cuda" in said.lower())
    return full and isinstance(error, RuntimeError)


def refusal_of_gpu(error: BaseException) -> str | None:
    """One sentence where an error says that a GPU's memory is full, else None."""
    if not is_gpu_full(error):
        return None
    asked = re.search(r"Tried to allocate [\d.]+ \w+", str(error))
    return (
        f"the GPU is out of memory ({asked[0] if asked else 'no more was given'}); smaller "
        "batches take less, and so does a GPU that no other program uses; what is complete stays"
    )


def refusal_of_loaders(error: BaseException) -> str | None:
    """One sentence where an error of torch says that a loader process has ended, else None."""
    ended = r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed by signal)"
    if not isinstance(error, RuntimeError) or not re.search(ended, str(error)):
        return None
    return (
        "a loader process has ended, as where a container has little shared memory (/dev/shm; "
        "docker run --shm-size 16g gives it more) or the machine no memory; a smaller num_workers "
        "takes less, 0 none; what is complete stays"
    )


def sentence_of(error: BaseException) -> str | None:
    """What a user can do about an error, in one sentence; None for a defect of ours."""
    if isinstance(error, UsageError | DataError):
        return str(error)
    return refusal_of_disk(error) or refusal_of_gpu(error) or refusal_of_loaders(error)


def short_list(values: Iterable[object], most: int = 3) -> str:
    """The first few of many, and how many there are more."""
    shown = list(values)
    more = len(shown) - most
    return ", ".join(map(str, shown[:most])) + (f" and {more:,} more" if more > 0 else "")


def check_utf8(*names: str) -> None:
    """Raises `UsageError` for an argument or a file's name that is not UTF-8: it can be written
    neither into metadata nor into JSON, and is no text."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{name!r} is not UTF-8; write it, or call the file, otherwise"
            ) from None


@contextmanager
def exit_on_usage_error(*flags: type | str) -> Iterator[None]:
    """Turn a `UsageError`, a `DataError`, a disk's refusal or a full GPU into one line on stderr
    and exit status 2, and Ctrl-C into one line and status 130.

    flags: the dataclasses that the program's flags fill (nested ones are found), and names of
    flags besides. These names become flags in the message: `data.num_workers -1` is printed
    `--data.num-workers -1`.
    A name of several words or with a dot is found anywhere; one that is also an English word
    (`steps`, `out`) where it opens the message or is written `steps=100`, printed `--steps 100`.

    Of several ranks the first speaks. Another waits, and speaks only if the launcher has not
    ended it meanwhile, as it does within a second when rank 0 met the same error.
    """
    try:
        check_utf8(*sys.argv[1:])
        yield
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            message = with_flags(str(stop) or "interrupted", _names(flags))
            print(message, file=sys.stderr, flush=True)
        sys.exit(128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT))
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(4)
        where = "" if rank == "0" else f" (rank {rank})"
        message = with_flags(sentence, _names(flags))
        print(f"error{where}: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def _names(flags: Iterable[type | str]) -> list[str]:
    return [name for flag in flags for name in parameters(flag)]


def parameters(config: type | str, prefix: str = "") -> list[str]:
    """The names of a dataclass's fields, those of nested dataclasses after a dot; or the name."""
    if isinstance(config, str):
        return [config]
    names = []
    hints = typing.get_type_hints(config)
    for f in dataclasses.fields(config):
        name, hint = prefix + f.name, hints[f.name]
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        names += parameters(hint, name + ".") if nested else [name]
    return names


def with_flags(message: str, names: list[str]) -> str:
    """The message with these parameters spelled as flags."""
    for name in sorted(names, key=len, reverse=True):  # data.features before features
        flag = "--" + name.replace("_", "-")
        word = re.escape(name)
        message = re.sub(rf"(?<![\w./-]){word}=(?=\S)", f"{flag} ", message)
        anywhere = "." in name or "_" in name
        before = r"(?<![\w./-])" if anywhere else r"\A"
        message = re.sub(rf"{before}{word}(?![\w/=-]|\.\w)", flag, message)
    return message
