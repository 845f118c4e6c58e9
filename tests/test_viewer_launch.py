"""The viewer's server: where it listens, who can reach it, what it says before it starts."""

import inspect
import re
import socket

import pytest
from viewer_fakes import SITES, fake_run

from sae import UserError
from train.cli.view import where
from viewer.app import launch, shell


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "mine").path


def test_a_port_that_is_taken_is_refused_and_a_free_one_named(folder):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}") as refused:
            launch.launch([folder], port=port, headless=True)
        named = int(re.search(r"--port (\d+)", str(refused.value))[1])
        with socket.socket() as other:
            other.bind(("127.0.0.1", named))
        assert named != port


@pytest.mark.parametrize(
    ("port", "address", "words"),
    [
        (0, "127.0.0.1", "65535"),
        (8765, "203.0.113.7", "--address"),
        (8765, "no such host.invalid", "--address"),
    ],
)
def test_a_place_to_listen_that_is_none_is_refused(folder, port, address, words):
    with pytest.raises(UserError, match=words):
        launch.launch([folder], port=port, headless=True, address=address)


def test_what_is_no_run_is_refused_before_the_server_starts(folder):
    with pytest.raises(UserError, match=r"run\.json"):
        launch.launch([folder, folder.parent], port=8765, headless=True)


def test_the_server_stays_on_this_machine_and_tells_nobody():
    options = launch.options(port=1, headless=True, address="127.0.0.1")
    assert options["server_address"] == "127.0.0.1" and options["browser_gatherUsageStats"] is False
    assert inspect.signature(launch.launch).parameters["address"].default == "127.0.0.1"


def test_every_option_is_one_that_streamlit_knows():
    from streamlit import config

    known = {name.replace(".", "_") for name in config.get_config_options()}
    assert set(launch.options(port=1, headless=True, address="::1")) <= known


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("127.0.0.1", "http://localhost:80 "),
        ("localhost", "http://localhost:80 "),
        ("::1", "http://[::1]:80 "),
    ],
)
def test_an_address_of_this_machine_alone_needs_no_warning(address, shown):
    said = where(address, 80, ["runs/a", "runs/b"])
    assert shown in said and "runs/a, runs/b" in said and "machine" not in said


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("0.0.0.0", f"http://{socket.gethostname()}:80 "),
        ("::", f"http://{socket.gethostname()}:80 "),
        ("192.0.2.7", "http://192.0.2.7:80 "),
        ("2001:db8::7", "http://[2001:db8::7]:80 "),
        ("example.org", "http://example.org:80 "),
    ],
)
def test_an_address_that_others_can_reach_says_so(address, shown):
    said = where(address, 80, ["runs/a"])
    assert shown in said and "no password" in said and "every machine" in said


def test_the_first_page_is_read_before_anyone_asks(folder, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(shell, "_RUNS", shell.Kept())
    monkeypatch.setattr(shell.runs.Run, "health", lambda run: opened.append(run) or run.index.site(SITES[0]))
    shell.warm([tmp_path / "gone", folder])
    assert [run.path for run in opened] == [folder]
    monkeypatch.setattr(shell.sys, "argv", ["main.py", str(folder)])
    assert shell.open_run("mine") is opened[0]


def test_more_runs_than_a_cache_would_hold_stay_open(tmp_path, monkeypatch):
    folders = [fake_run(tmp_path / f"run{n}", index=False).path for n in range(12)]
    monkeypatch.setattr(shell.sys, "argv", ["main.py", *map(str, folders)])
    first = [shell.open_run(folder.name) for folder in folders]
    assert all(shell.open_run(folder.name) is run for folder, run in zip(folders, first, strict=True))
