"""Starts a test's ranks as torchrun would: processes with its environment, and its agent's store."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

ROOT = Path(__file__).resolve().parents[1]


def verb_in_place(folder: Path, code: str) -> str:
    """Puts `code`, which defines `run(words)`, in the place of `train` in ranks; the PYTHONPATH that does it.

    For launchers: their ranks run the real command line, and the verb is changed as Python starts.
    """
    (folder / "verb.py").write_text(code)
    (folder / "sitecustomize.py").write_text(
        "import os, sys, types\n"
        "def run(words):\n    import verb\n    return verb.run(words)\n"
        "if 'RANK' in os.environ:\n"
        "    sys.modules['train.cli.train'] = types.ModuleType('train.cli.train')\n"
        "    sys.modules['train.cli.train'].run = run\n"
    )
    return f"{ROOT}{os.pathsep}{folder}"


class Processes:
    """The ranks of one run of a piece of Python, on this machine."""

    def __init__(self, world: int, code: str, *words: str, hang: float = 45.0, **environment: str) -> None:
        self.store = TCPStore(
            "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30), wait_for_workers=False
        )
        shared = {
            **os.environ,
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "JUMPSCOPE_HANG_SECONDS": str(hang),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            **environment,
        }
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", code, *words],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]

    def finish(self, seconds: float = 120.0) -> list[tuple[int, str, str]]:
        """Waits for all: exit code, stdout and stderr, by rank. Kills them when time is up."""
        try:
            ends = [(rank.communicate(timeout=seconds), rank) for rank in self.ranks]
            return [(rank.returncode, out, err) for (out, err), rank in ends]
        finally:
            for rank in self.ranks:
                rank.kill()
