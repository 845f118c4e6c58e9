"""Many people look at several runs at once: each sees what their own address asks for."""

import random
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode, urlsplit

import pytest
from browser_fakes import served
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from viewer_fakes import D_SAE, SITES, fake_run
from websockets.sync.client import connect

import viewer

SESSIONS, VISITS, PATIENCE = 20, 3, 60.0


class Session:
    """A browser tab's conversation with the viewer, without the browser."""

    def __init__(self, address):
        host = urlsplit(address).netloc
        self._socket = connect(
            f"ws://{host}/_stcore/stream", origin=f"http://{host}", subprotocols=["streamlit"],
            max_size=None, open_timeout=PATIENCE,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    def show(self, page, **query):
        """Opens a page ("" is the overview); all that it is drawn with, as one text."""
        message = BackMsg()
        message.rerun_script.query_string = urlencode(query)
        message.rerun_script.page_name = page
        self._socket.send(message.SerializeToString())
        drawn = []
        while True:
            answer = ForwardMsg.FromString(self._socket.recv(PATIENCE))
            kind = answer.WhichOneof("type")
            if kind == "delta":
                drawn.append(str(answer.delta.new_element))
            elif kind == "script_finished":
                assert answer.script_finished == ForwardMsg.FINISHED_SUCCESSFULLY
                return "\n".join(drawn)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the same name, by the names that addresses give them; they differ in their thresholds."""
    folders = [tmp_path_factory.mktemp(name) / "same" for name in "ab"]
    for folder, threshold in zip(folders, (3.0, 4.5), strict=True):
        fake_run(folder, threshold=threshold)
    return {f"{folder.parent.name}/same": viewer.open(folder) for folder in folders}


@pytest.fixture(scope="module")
def address(runs, tmp_path_factory):
    with served([run.path for run in runs.values()], tmp_path_factory.mktemp("server")) as address:
        yield address


def test_twenty_sessions_at_once_each_see_their_own(runs, address):
    pages = {}
    for name, run in runs.items():
        for site in SITES:
            for latent in range(D_SAE):
                feature = run.site(site)[latent]
                # what this page says and no other does, all together
                pages[name, site, latent] = (
                    f"<h1>{feature.title()}</h1>",
                    f"<b>{feature.firings:,}</b><span>firings</span>",
                    f"<b>{feature.facts()[0][1]}</b>",
                )
    assert len(set(pages.values())) > 80, "pages must differ for this to tell"

    def visit(seed):
        wrong, draw = [], random.Random(seed)
        with Session(address) as session:
            for _ in range(VISITS):
                key = name, site, latent = draw.choice(list(pages))
                drawn = session.show("feature", run=name, site=site, latent=latent)
                wrong += [(key, text) for text in pages[key] if text not in drawn]
                drawn = session.show("", run=name)
                links = {other: f"features?{urlencode({'run': other})}&amp;site=" in drawn for other in runs}
                wrong += [(name, links)] if links != {other: other == name for other in runs} else []
        return wrong

    with ThreadPoolExecutor(SESSIONS) as pool:
        assert [wrong for wrong in pool.map(visit, range(SESSIONS)) if wrong] == []


def test_another_site_may_not_talk_to_the_viewer(address):
    host = urlsplit(address).netloc
    with pytest.raises(Exception, match="403"):
        connect(f"ws://{host}/_stcore/stream", origin="http://evil.example", subprotocols=["streamlit"])
