"""Dictionaries by id, from a local server with the hub's HTTP interface: listing, cache, refusals."""

import hashlib
import http.server
import json
import threading
import time
import urllib.parse
from pathlib import Path

import dialect_makers as make
import huggingface_hub
import pytest
import torch
from cli_fakes import refused

import sae
from sae import dialects
from sae.dialects.hub import list_folders
from sae.errors import UserError
from train.cli.main import main

COMMIT = "a" * 40
FIRST, SECOND, TRAINED = "google/gemma-scope-2b-pt-res", "google/gemma-scope-2-270m-pt", "someone/saes"


class Hub(http.server.ThreadingHTTPServer):
    """Serves folders ORG/REPO as the hub serves repositories; counts what was asked."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.root, self.asked, self.extra, self.gated = root, [], [], ""


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
        self.server.asked.append((self.command, path))
        api, resolve = path.startswith("api/models/"), "/resolve/" in path
        repo = path.removeprefix("api/models/").split("/tree/")[0] if api else path.split("/resolve/")[0]
        if not (self.server.root / repo).is_dir():
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo == self.server.gated:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if api:
            names = [
                str(p.relative_to(self.server.root / repo)) for p in (self.server.root / repo).rglob("*.*")
            ]
            rows = [{"type": "file", "path": n, "size": 1, "oid": "0"} for n in names + self.server.extra]
            return self.answer(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})
        file = self.server.root / repo / path.split("/resolve/")[1].partition("/")[2]
        if not resolve or not file.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        tag = hashlib.sha1(data).hexdigest()
        return self.answer(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format, *values) -> None: ...


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for layer, width, l0 in ((0, "16k", 105), (20, "16k", 38), (20, "16k", 71), (20, "65k", 114)):
        make.gemma_scope(root / FIRST / f"layer_{layer}/width_{width}/average_l0_{l0}")
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "width": 20, "l0": 20}
    config |= {"hf_hook_point_in": "model.layers.9.output", "affine_connection": False, "type": "sae"}
    for l0 in ("small", "big"):
        make.gemma_scope_2(root / SECOND / f"resid_post_all/layer_9_width_16k_l0_{l0}", False, config)
    # published without its config
    make.gemma_scope_2(root / SECOND / "transcoder_all/layer_9_width_16k_l0_small_affine", True)
    make.saelens(root / TRAINED / "blocks.3.hook_resid_post")
    make.sparsify(root / TRAINED / "layers.5")
    make.dictionary_learning(root / TRAINED / "runs/trainer_0", "BatchTopKSAE")
    (root / "someone/nothing").mkdir()
    (root / "someone/nothing/README.md").write_text("nothing")
    return root


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    server = Hub(repositories)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    constants = huggingface_hub.constants
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("text", "dialect", "site", "l0"),
    [
        (f"{FIRST}/layer_20/width_16k/average_l0_71", "gemma-scope", "blocks.20.hook_resid_post", 71.0),
        (f"{FIRST}/layer_20/width_16k/canonical", "gemma-scope", "blocks.20.hook_resid_post", 71.0),
        (
            "gemma-scope-2b-pt-res-canonical:layer_0/width_16k/canonical",
            "gemma-scope",
            "blocks.0.hook_resid_post",
            105.0,
        ),
        (
            f"{SECOND}/resid_post_all/layer_9_width_16k_l0_small",
            "gemma-scope-2",
            "blocks.9.hook_resid_post",
            20.0,
        ),
        (
            "gemma-scope-2-270m-pt-res-all:layer_9_width_16k_l0_big",
            "gemma-scope-2",
            "blocks.9.hook_resid_post",
            20.0,
        ),
        (
            f"{SECOND}/transcoder_all/layer_9_width_16k_l0_small_affine",
            "gemma-scope-2",
            "blocks.9.mlp.hook_in",
            None,
        ),
        (f"{TRAINED}/blocks.3.hook_resid_post", "saelens", "blocks.3.hook_resid_post", None),
        (f"{TRAINED}/layers.5", "sparsify", "blocks.5.hook_resid_post", None),
        (f"{TRAINED}/runs/trainer_0", "dictionary-learning", "blocks.5.hook_mlp_out", None),
    ],
)
def test_by_id(hub, text, dialect, site, l0):
    parts = dialects.read(text)
    assert (parts.dialect, parts.cfg["site_in"], parts.cfg["l0_target"]) == (dialect, site, l0)
    assert torch.equal(parts.tensors["W_dec"], make.plain()["W_dec"])
    if dialect == "sparsify":
        assert parts.cfg["model"] == "EleutherAI/pythia-160m"
    # the weights of one dictionary, and nothing of its neighbours
    got = [path for command, path in hub.asked if command == "GET" and "/resolve/" in path]
    weights = [path for path in got if not path.endswith(".json")]
    assert len(weights) == 1 and "sparsity" not in weights[0]


def test_the_cache_serves_without_a_network(hub, monkeypatch):
    text = f"{FIRST}/layer_20/width_16k/average_l0_71"
    first = dialects.read(text)
    asked = len(hub.asked)
    assert dialects.read(text).source == first.source == text
    assert not [path for command, path in hub.asked[asked:] if command == "GET" and "/resolve/" in path]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    # the hub's own client asks again and again, and sleeps for a minute in between
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    again = dialects.read(text)
    assert again.cfg == first.cfg
    with pytest.raises(UserError, match=r"no dictionary 'layer_20/width_65k/average_l0_114'"):
        dialects.read(f"{FIRST}/layer_20/width_65k/average_l0_114")
    with pytest.raises(UserError, match="no answer from the hub"):
        dialects.read(f"{SECOND}/resid_post_all/layer_9_width_16k_l0_small")


@pytest.mark.parametrize(
    "text",
    [
        f"{FIRST}/layer_20/width_16k/average_l0_71",
        f"https://huggingface.co/{FIRST}/tree/main/layer_20/width_16k/average_l0_71",
        f"{SECOND}/resid_post_all/layer_9_width_16k_l0_small",
        "gemma-scope-2b-pt-res-canonical:layer_20/width_16k/canonical",
    ],
)
def test_as_people_write_them(hub, monkeypatch, tmp_path, capfd, text):
    assert main(["info", text]) == 0
    assert "site in" in capfd.readouterr().out
    assert main(["import", text, "--out", str(tmp_path / "one")]) == 0
    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["import", text, "--out", str(tmp_path / "two")]) == 0
    assert len(hub.asked) == asked
    one, two = (sae.load(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_close_but_wrong(hub):
    with pytest.raises(UserError, match=r"mean layer_20/width_16k/average_l0_71"):
        dialects.read(f"{FIRST}/layer_20/width_16k/average_l0_70")
    with pytest.raises(UserError, match=r"mean google/gemma-scope-2b-pt-res\?"):
        dialects.read("google/gemma-scope-2b-pt-ress/layer_20/width_16k/average_l0_71")
    with pytest.raises(UserError, match="no weights among its 1 files"):
        list_folders("someone/nothing")
    hub.gated = FIRST
    with pytest.raises(UserError, match="behind a licence"):
        dialects.read(f"{FIRST}/layer_20/width_16k/average_l0_71")


@pytest.mark.parametrize("name", ["../../stolen/params.npz", "/etc/params.npz", "a\\..\\params.npz"])
def test_names_that_lead_out_are_refused(hub, name):
    hub.extra = [name]
    with pytest.raises(UserError, match="names must stay inside"):
        dialects.read(f"{FIRST}/layer_20/width_16k/average_l0_71")


def test_a_torn_download_is_refused(hub, repositories):
    path = repositories / FIRST / "layer_0/width_16k/average_l0_105/params.npz"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-400])
        with pytest.raises(UserError, match=r"params\.npz must be a whole file"):
            dialects.read(f"{FIRST}/layer_0/width_16k/average_l0_105")
    finally:
        path.write_bytes(whole)


def test_the_verbs(hub, tmp_path, capfd):
    assert main(["info", FIRST]) == 0
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert (
        ["layer", "16k", "65k"] in rows and ["0", "105", "-"] in rows and ["20", "38,", "71", "114"] in rows
    )
    assert main(["info", SECOND]) == 0
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["resid_post_all", "9", "small,", "big"] in rows
    assert main(["info", TRAINED]) == 0
    assert f"{TRAINED}/runs/trainer_0" in capfd.readouterr().out
    assert main(["info", "gemma-scope-2b-pt-res:layer_20/width_16k/average_l0_71"]) == 0
    assert "blocks.20.hook_resid_post" in capfd.readouterr().out
    words = [f"{FIRST}/layer_20/width_16k/canonical", "--out", str(tmp_path / "ours")]
    assert main(["import", *words]) == 0
    assert sae.load(tmp_path / "ours").cfg.model == "google/gemma-2-2b"
    assert "Did you mean" in refused(
        capfd, "import", f"{FIRST}/layer_20/width_16k/average_l0_70", "--out", "x"
    )
