"""Two machines, which are two launchers here: what they train, stop and leave is what one rank does."""

import os
import signal
import socket
import time

import torch
from cli_fakes import SMALL, command, make_inputs
from ranks_processes import ROOT
from resume_fakes import weights

from train.cli.main import main
from train.run_folder import RunFolder


def test_two_machines_stop_at_a_signal_to_one_and_the_run_goes_on(tmp_path):
    flags = [*make_inputs(tmp_path), *SMALL, "--tokens", "12k", "--layers", "0-2", "--log-every", "5"]
    one, two = tmp_path / "one", tmp_path / "two"
    with socket.create_server(("127.0.0.1", 0)) as free:
        at = f"localhost:{free.getsockname()[1]}"
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", at]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ("--distributed", *meet, "--rdzv-id", "two", "train", *flags, "--out", two)
    launchers = [command(*words, env=environment) for _ in range(2)]
    log = two / "metrics.jsonl"
    while not (log.is_file() and log.stat().st_size > 2000):
        assert [launcher.poll() for launcher in launchers] == [None, None], launchers[0].communicate()
        time.sleep(0.05)
    launchers[1].send_signal(signal.SIGTERM)
    errors = "".join(launcher.communicate(timeout=100)[1] for launcher in launchers)
    assert [launcher.returncode for launcher in launchers] == [143, 143], errors
    assert [line for line in errors.splitlines() if line.startswith("jumpscope:")] == [
        "jumpscope: stopped by SIGTERM"
    ]
    assert "Traceback" not in errors
    assert RunFolder.open(two).state() == "stopped: SIGTERM"
    assert list(two.glob("checkpoints/step_*"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(["train", "--resume", str(two)]) == 0
        assert main(["train", *flags, "--out", str(one)]) == 0
    finally:
        torch.set_num_threads(before)
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    mine, theirs = weights(two), weights(one)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], x) for key, x in theirs.items())
