"""Which parameters of a network train, by patterns of their names."""

import re
from collections.abc import Sequence

from torch import nn

from data.errors import UsageError


def train_only(module: nn.Module, patterns: Sequence[str], flag: str) -> None:
    """Freeze parameters whose name contains no match of any pattern, and train the others.

    Names are those within the library's network. flag: what messages call the patterns. Raises
    `UsageError` for what is no regular expression, and for one that finds nothing.
    """
    names = {name.removeprefix("net."): p for name, p in module.named_parameters()}
    for pattern in patterns:
        try:
            found = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise UsageError(f"{flag} {pattern!r} is no pattern: {error}") from error
        if not found:
            raise UsageError(f"{flag} {pattern!r} finds no parameter; there are {', '.join(names)}")
    for name, parameter in names.items():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))
