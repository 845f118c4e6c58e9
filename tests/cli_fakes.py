"""What the command line's tests share: a tiny model and corpus on disk, and ways to run a command line."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import plain_model, tiny_tokenizer

from train.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--width 64 --l0 4 --tokens 600 --passes 2 --batch 64 --context 16 --model-batch 4 --device cpu".split()
)
WORDS = "the capital of France is Paris and it was the best of times a dictionary per layer".split()


def make_inputs(folder):
    """Writes the tiny model and a small corpus; returns the flags that name them."""
    plain_model("gemma3").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    texts = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(12)) for i in range(200)]
    lines = (json.dumps({"text": f"{text} {i}."}) + "\n" for i, text in enumerate(texts))
    (folder / "text.jsonl").write_text("".join(lines))
    return ["--model", str(folder / "model"), "--corpus", str(folder / "text.jsonl")]


def refused(capfd, *words):
    """Runs a command line that must fail as users' mistakes do; returns its one line."""
    capfd.readouterr()
    code = main([str(word) for word in words])
    err = capfd.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("jumpscope:")]
    assert len(lines) == 1, err
    assert "jumpscope: this is a bug" not in err
    return lines[0]


def command(*words, **options):
    """A command line in a process of its own."""
    code = "import sys; from train.cli.main import main; sys.exit(main())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], **pipes | options)
