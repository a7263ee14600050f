"""The programs of this project under one name.

flexilit photos ~/Pictures
flexilit search --index album "a red bicycle"
"""

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def programs() -> dict[str, str]:
    """Each program's name and what it is for: its docstring's first line."""
    found = {}
    for file in sorted(FOLDER.glob("*.py")):
        if file != Path(__file__) and not file.name.startswith("__"):
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            found[file.stem] = text.partition("\n")[0]
    return found


def usage() -> str:
    lines = (f"  {name:<10}{what}" for name, what in programs().items())
    return "\n".join(["usage: flexilit PROGRAM ...", "", *lines, "", "flexilit PROGRAM --help"])


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    elif name in programs():
        file = str(FOLDER / f"{name}.py")
        sys.argv = [f"flexilit {name}", *sys.argv[2:]]
        runpy.run_path(file, run_name="__main__")
    else:
        allowed = ", ".join(programs())
        print(f"error: no program {name!r}; allowed: {allowed}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
