"""The layout holds: links, no shadowed packages, arrows one way, heavy imports only when needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stillroom

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pipeline", "kernels", "storage", "train")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "storage": {"storage"},
    "pipeline": {"pipeline", "kernels", "storage"},
    "train": {"train", "kernels", "storage"},
}


def _imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_kernels_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow another project's package"


@pytest.mark.parametrize("room", ROOMS)
def test_links_lead_to_the_root_folders(room: str) -> None:
    link = ROOT / "stillroom" / room
    assert link.is_symlink()
    assert link.resolve() == ROOT / room


def test_bare_kernels_is_not_ours() -> None:
    code = (
        "import importlib.util as u; s = u.find_spec('kernels'); "
        f"print(s is not None and s.origin is not None and s.origin.startswith({str(ROOT)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        for name in _imports(file):
            parts = name.split(".")
            assert parts[0] not in ROOMS, f"{file.name} imports the bare name {name}"
            if parts[0] == "stillroom" and len(parts) > 1:
                assert parts[1] in MAY_IMPORT[room], f"{file.relative_to(ROOT)} imports {name}"


def test_storage_imports_no_torch() -> None:
    for file in (ROOT / "storage").rglob("*.py"):
        assert not {name for name in _imports(file) if name.split(".")[0] in ("torch", "transformers")}, file.name


def test_triton_only_where_it_belongs() -> None:
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            if any(name.split(".")[0] == "triton" for name in _imports(file)):
                assert room == "kernels", file.name
                assert file.name != "reference.py", file.name


def test_public_names_exist_and_are_sorted() -> None:
    assert stillroom.__all__ == sorted(stillroom.__all__)
    for name in stillroom.__all__:
        assert getattr(stillroom, name) is not None


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["cache", "--help"], ["train", "--help"], ["compare", "--help"], ["ls"]]
)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; from stillroom.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_stay_small() -> None:
    for room in (*ROOMS, "stillroom", "benchmarks"):
        for file in (ROOT / room).glob("**/*.py"):
            assert file.read_text().count("\n") <= 500, f"{file.relative_to(ROOT)} holds more than one idea"


@pytest.mark.slow
def test_wheel_from_sdist_holds_every_module(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "pip"]
    subprocess.run([*run, "install", "-q", "build"], check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True
    )
    import zipfile

    held = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            assert f"stillroom/{file.relative_to(ROOT).as_posix()}" in held
    for recipe in (ROOT / "stillroom" / "recipes").glob("*.yaml"):
        assert f"stillroom/recipes/{recipe.name}" in held
