"""`jumpscope --distributed` itself: where its machines meet, and what it makes of signals and of lost ranks."""

import socket
import threading

import pytest
from cli_fakes import command, refused
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from activations.ports import NOTHING, STORE, who_answers
from activations.ranks import RankLost, open_ranks

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
    assert err.startswith(f"jumpscope: the machines of a run must be able to meet at localhost:{port}. Found: ")
    assert "the port is in use: another program answers there. Choose a free port" in err
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
    with pytest.raises(RankLost, match=rf"must be able to reach .*:{port}\. Found: another program") as refusal:
        open_ranks().__enter__()
    assert refusal.value.code == 2
    server.close()
    assert who_answers("127.0.0.1", port) == NOTHING
