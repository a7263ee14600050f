"""The tree as a reader meets it: small folders, a name for each thing, packages that explain
themselves, and programs that answer before they load what is heavy."""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from forked import LIGHT, run
from launcher import ROOT

PACKAGES = ("data", "contrastive", "retrieval")
FOLDERS = sorted(
    {file.parent for top in (*PACKAGES, "launch") for file in (ROOT / top).rglob("*.py")}
)
MOST_MODULES = 18
REPEATED = {  # base names that may stand in several folders, as they mean the same in each
    "config",  # of a package
    "loop", "step",  # of each training
    "open_clip", "timm", "transformers",  # one per format
    "tower", "load",  # of images, of texts
    "manifest",  # of a feature cache, of embeddings, of an index
    "folder",  # of a run, of an index
    "build",  # of a tower, of an index, of the emoji shards
    "captions",  # of a sample, and the cache of them
}  # fmt: skip


def modules(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("__"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_can_be_taken_in_at_a_glance(folder: Path) -> None:
    assert len(modules(folder)) <= MOST_MODULES


def test_a_base_name_stands_for_one_thing() -> None:
    folders = defaultdict(list)
    for folder in FOLDERS:
        if folder.name != "launch":  # a program may be called like what it starts
            for name in modules(folder):
                folders[name].append(str(folder.relative_to(ROOT)))
    assert {name: where for name, where in folders.items() if len(where) > 1}.keys() <= REPEATED


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks/lib"])
def test_every_package_says_what_lives_there(package: str) -> None:
    for folder in {file.parent for file in (ROOT / package).rglob("*.py")}:
        file = folder / "__init__.py"
        assert file.is_file(), f"{folder} has no __init__.py, so no wheel would have it"
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"


def test_every_module_says_what_it_holds() -> None:
    for top in (*PACKAGES, "launch", "benchmarks", "tests"):
        for file in set((ROOT / top).rglob("*.py")) - set((ROOT / top).rglob("__main__.py")):
            assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_users_of_a_package_get_its_types(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_tests_do_not_import_benchmarks() -> None:
    programs = {file.stem for file in (ROOT / "benchmarks").glob("*.py")} | {"lib", "benchmarks"}
    for file in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not programs & {name.partition(".")[0] for name in names}, file


HEAVY = (
    "torch", "timm", "open_clip", "transformers", "deepspeed", "faiss", "pandas", "scipy",
    "sklearn", "pyarrow",
)  # fmt: skip
LOADED = """
import json, runpy, sys
program, *arguments = sys.argv[1:]
sys.argv = [program, *arguments]
try:
    runpy.run_path(program, run_name="__main__")
except SystemExit as stopped:
    print(json.dumps([stopped.code, sorted(sys.modules)]), file=sys.__stderr__)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--no-such-flag", "1"]], ids=["help", "typo"])
@pytest.mark.parametrize("program", modules(ROOT / "launch"))
def test_a_program_answers_before_it_loads_what_is_heavy(
    program: str, arguments: list[str]
) -> None:
    file = str(ROOT / "launch" / f"{program}.py")
    done = run("-c", LOADED, file, *arguments, imported=LIGHT)
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert code == (0 if arguments == ["--help"] else 2), done.stderr
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_loads_its_names_on_first_use(package: str) -> None:
    code = f"import json, sys, {package}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(json.loads(done.stdout))
