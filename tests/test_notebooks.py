"""The notebooks run from top to bottom, on a tiny model, and show what they end their cells with."""

import ast
import json
import sys
import types
from pathlib import Path

import pytest
from cli_fakes import make_inputs

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TRAIN, STEER, FOLLOW = "1_train_and_look", "2_find_and_steer", "3_follow_a_concept"


def code_cells(name):
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"]), "parameters" in cell["metadata"].get("tags", [])


def shown(value):
    """What Jupyter would show of a value."""
    if hasattr(value, "to_plotly_json"):
        return value.to_json()
    return value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)


def execute(name, parameters, monkeypatch):
    """Runs the cells one after another, with these values for the parameters; returns what they show."""
    screen = []
    display = types.ModuleType("IPython.display")
    display.display = lambda value: screen.append(shown(value))
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    names = {"__name__": name}
    for source, is_parameters in code_cells(name):
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        if is_parameters:
            unknown = parameters.keys() - names.keys()
            assert not unknown, unknown
            names |= parameters
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
            screen.append(shown(value))
    return screen, names


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The first notebook's run, and what the notebook showed."""
    _, model, _, corpus = make_inputs(tmp_path_factory.mktemp("inputs"))
    out = tmp_path_factory.mktemp("run") / "run"
    parameters = {
        "MODEL": model, "CORPUS": corpus, "RUN": str(out), "LAYERS": "0-2",
        "WIDTH": 64, "L0": 6, "TOKENS": 600,
        "MORE": ["--passes=2", "--context=32", "--batch=64", "--dtype=float32"],
        "EVAL_TOKENS": 300, "INDEX_TOKENS": 1_000,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        return out, execute(TRAIN, parameters, patch)


def test_train_and_look(trained):
    out, (screen, names) = trained
    assert (out / "eval.json").is_file() and len(names["run"].sites) == 3
    assert names["feature"].firings >= 5
    assert "js-card" in screen[0] and "js-ex" in screen[3]


def test_find_and_steer(trained, monkeypatch):
    text, texts = "The capital of France is Paris", ["The capital of Italy", "It was the best of times"]
    parameters = {"RUN": str(trained[0]), "TEXT": text, "LAYER": 1, "NEW_TOKENS": 5, "TEXTS": texts}
    word = trained_word(trained, text)
    screen, names = execute(STEER, {**parameters, "WORD": word}, monkeypatch)
    assert sum("Without" in page and "steer" in page for page in screen) == len(names["STRENGTHS"])
    assert names["change"].frame["text"].nunique() == 2


def test_follow_a_concept(trained, monkeypatch):
    word = trained_word(trained, "The capital of France is")
    parameters = {"RUN": str(trained[0]), "TARGET": "e", "AGAINST": "s", "WORD": word, "VERIFIED": 6}
    screen, names = execute(FOLLOW, parameters, monkeypatch)
    assert "6 attributions against ablations" in screen[-2]
    assert len(names["path"]) > 1


def trained_word(trained, text):
    """A token on which something fires at every site: the tiny tokenizer has few words."""
    import viewer

    best = viewer.open(trained[0]).trace(text).top(1)
    sites = best.groupby("token")["layer"].nunique()
    return sites[sites == 3].index[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    assert {path.stem for path in NOTEBOOKS} == {TRAIN, STEER, FOLLOW}
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"][0].startswith("# ")
