"""`jumpscope --distributed` itself: where machines meet, and what it makes of signals and of lost ranks."""

import os
import re
import signal
import socket
import threading
import time

import psutil
import pytest
from cli_fakes import command, refused
from ranks_processes import verb_in_place
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from activations.ports import NOTHING, STORE, who_answers
from activations.ranks import RankLost, open_ranks

WORK = """
import os, sys, time
from activations.ranks import open_ranks

def run(words):
    with open_ranks() as ranks:
        for step in range(10**6):
            ranks.share(f"step {step}", step)
            if step == 3:
                # one write: it may not be cut in two by the other rank's
                os.write(1, f"<{ranks.rank} {os.getpid()}>".encode())
            time.sleep(0.01)
"""
MEET = ["--rdzv-backend", "c10d", "--rdzv-endpoint"]


@pytest.fixture
def server():
    """A program that takes connections, says what no store says, or nothing; its port is `port`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def greet(listening):
    """Answers as a program of another kind does."""

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()


@pytest.mark.parametrize("speaks", [True, False])
def test_a_port_in_use_is_one_line_and_no_hang(server, speaks):
    port = server.getsockname()[1]
    if speaks:
        greet(server)
    flags = ["--nproc-per-node", "2", *MEET, f"localhost:{port}"]
    # in a process of its own: the library's warnings do not pass through Python
    ended = command("--distributed", *flags, "train", "--model", "none")
    out, err = ended.communicate(timeout=100)
    assert (ended.returncode, out) == (2, "")
    assert err.startswith(f"jumpscope: the machines of a run must be able to meet at localhost:{port}. ")
    assert "Found: the port is in use: another program answers there. Choose a free port" in err
    assert err.count("\n") == 1


def test_the_store_of_another_run_is_a_port_in_use_on_one_machine(capfd):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert who_answers("127.0.0.1", store.port) == STORE
    at = f"127.0.0.1:{store.port}"
    for flags in ([*MEET, at], ["--master-addr", "127.0.0.1", "--master-port", store.port]):
        said = refused(capfd, "--distributed", "--nproc-per-node", "2", *flags, "train", "--model", "none")
        assert f"meet at {at}. Found: the port is in use: a store answers there" in said


@pytest.mark.parametrize(
    ("flag", "value"), [("rdzv-endpoint", "here:soon"), ("nnodes", "few"), ("nproc-per-node", "few")]
)
def test_flags_that_say_nothing_are_refused(capfd, flag, value):
    said = refused(capfd, "--distributed", "--rdzv-backend", "c10d", f"--{flag}={value}", "train")
    assert "--nnodes one or MIN:MAX" in said and value in said


def test_a_rank_does_not_wait_for_a_program_that_is_no_store(server, monkeypatch):
    monkeypatch.setattr("activations.ports._PATIENCE", 0.5)
    port = server.getsockname()[1]
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    for name, value in (*place.items(), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(RankLost, match=rf"reach .*:{port}\. Found: another program") as refusal:
        open_ranks().__enter__()
    assert refusal.value.code == 2
    server.close()
    assert who_answers("127.0.0.1", port) == NOTHING


def launch(folder, *flags, **options):
    """A launcher whose ranks go on until they are stopped, in a process group of its own."""
    path = verb_in_place(folder, WORK)
    environment = {**os.environ, "PYTHONPATH": path, "JUMPSCOPE_HANG_SECONDS": "10"}
    return command("--distributed", *flags, "train", env=environment, start_new_session=True, **options)


def at_work(launcher, count):
    """Waits until its ranks are at work; their process numbers, by rank."""
    text = b""
    while text.count(b">") < count:
        text += (byte := os.read(launcher.stdout.fileno(), 1))
        assert byte, (text, launcher.stderr.read())
    return {int(rank): int(pid) for rank, pid in re.findall(rb"<(\d+) (\d+)>", text)}


def test_a_rank_killed_on_one_machine_ends_the_launchers_of_both(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        at = f"localhost:{free.getsockname()[1]}"
    flags = ["--nnodes", "2", "--nproc-per-node", "1", *MEET, at, "--rdzv-id", "two"]
    launchers = [launch(tmp_path, *flags) for _ in range(2)]
    ranks = {rank: pid for launcher in launchers for rank, pid in at_work(launcher, 1).items()}
    since = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    ends = [launcher.communicate(timeout=100)[1] for launcher in launchers]
    assert time.monotonic() - since < 60
    assert [launcher.returncode for launcher in launchers] == [75, 75]
    assert re.fullmatch(r"jumpscope: .* rank 1 on \S+ ended without a word: killed, or .*\n", "".join(ends))


def test_a_launcher_that_is_gone_is_a_lost_machine(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--nnodes", "2", "--nproc-per-node", "1", *MEET, f"localhost:{port}", "--rdzv-id", "two"]
    # the first hosts the store where machines meet
    first = launch(tmp_path, *flags)
    while who_answers("127.0.0.1", port) != STORE:
        time.sleep(0.1)
    second = launch(tmp_path, *flags)
    for launcher in (first, second):
        at_work(launcher, 1)
    first.kill()
    _, err = second.communicate(timeout=100)
    assert second.returncode == 75
    # rank 0 may be the first's, and with it the store of the ranks
    said = r"rank \d on \S+ has lost its launcher|the store at \S+, the first machine, does not answer"
    assert re.fullmatch(f"(jumpscope: .* Found: ({said}).*\\n)?", err), err
    first.communicate(timeout=100)


@pytest.mark.parametrize("early", [True, False])
def test_ctrl_c_in_a_terminal_is_one_line(tmp_path, early):
    launcher = launch(tmp_path, "--nproc-per-node", "2")
    if early:
        # ranks that have only begun to start Python
        while not psutil.Process(launcher.pid).children():
            time.sleep(0.005)
    else:
        at_work(launcher, 2)
    os.killpg(launcher.pid, signal.SIGINT)
    _, err = launcher.communicate(timeout=100)
    assert launcher.returncode == 130
    if early:
        # ranks that were about to reach their launcher's store say that it is gone: each of the two, at most
        assert re.fullmatch(r"(jumpscope: .*\n){1,2}", err), err
    else:
        assert err == "jumpscope: stopped\n"


def test_a_second_signal_to_the_launcher_ends_as_the_first(tmp_path):
    launcher = launch(tmp_path, "--nproc-per-node", "2")
    at_work(launcher, 2)
    for _ in range(2):
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    _, err = launcher.communicate(timeout=100)
    assert (launcher.returncode, err) == (143, "jumpscope: stopped by SIGTERM\n")
