"""Static pages: what the index says, safe, linked among themselves, there as a whole or not at all."""

import base64
import hashlib
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from browser_fakes import NEEDS_BROWSER, chromium, tried, watched
from viewer_fakes import D_SAE, SITES, fake_run

import viewer
from sae import UserError
from train.cli.main import main
from viewer import static
from viewer.static import feature_page, write_pages

TAGS = set(
    "html head meta title style script body nav main h1 h2 p small b i div span a ol li details figure "
    "figcaption summary footer table thead tbody tr th td button label input output".split()
)


class Reader(HTMLParser):
    """Tags, attributes, links and the text of scripts of a page, as a browser would take them apart."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.links, self.scripts, self.policy = set(), set(), [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.add(tag)
        self.attributes |= set(values)
        if tag == "script":
            self.scripts.append("")
        if "href" in values:
            self.links.append(values["href"])
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = fake_run(tmp_path_factory.mktemp("runs") / "<b>mine")
    opened = viewer.open(folder.path)
    feature = opened.layer(0)[int(opened.layer(0).live()[0])]
    feature.label, feature.notes = (
        "<img src=x onerror=alert(1)>\ud800",
        "</title><script>window.pwned=1</script>",
    )
    return opened


def check_page(path):
    """Only our tags, no handlers, one script at most and that by its hash; returns the links."""
    text = path.read_bytes().decode("utf-8")
    page = Reader(text)
    assert page.tags <= TAGS
    assert not [name for name in page.attributes if name.startswith("on") or name in ("src", "srcdoc")]
    assert "default-src 'none'" in page.policy and "unsafe-eval" not in page.policy
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts]
    assert len(hashes) <= 1 and all(f"script-src 'sha256-{h}'" in page.policy for h in hashes)
    assert "'unsafe-inline'" not in page.policy.split("script-src")[1].split(";")[0]
    for link in page.links:
        parts = urlsplit(link)
        assert not parts.scheme and not parts.netloc and not link.startswith("/")
        assert (path.parent / unquote(parts.path)).is_file(), link
    return page.links


def test_a_page_alone_says_what_the_api_says(run):
    site = run.layer(0)
    for latent in (int(site.live()[0]), 2):
        feature = site[latent]
        text = feature_page(feature)
        page = Reader(text)
        assert page.links == page.scripts == [] and page.tags <= TAGS
        assert all(value in text for _, value in feature.facts())
        assert text.count("js-ex") >= len(feature.examples())
    assert "never fires" in text
    shown = feature_page(site[int(site.live()[0])])
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown and "window.pwned=1&lt;/script&gt;" in shown


def test_a_run_becomes_a_folder_of_linked_pages(run, tmp_path, capsys):
    out = tmp_path / "pages"
    assert main(["export", str(run.path), "--to", "html", "--out", str(out)]) == 0
    assert f"{2 * D_SAE} pages" in capsys.readouterr().out
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    names = ["index.html", *(f"{latent}.html" for latent in range(D_SAE))]
    assert files == sorted(["index.html", *(f"{site}/{name}" for site in SITES for name in names)])
    links = {str(path.relative_to(out)): check_page(path) for path in out.rglob("*.html")}
    assert [unquote(link) for link in links["index.html"]] == [f"{site}/index.html" for site in SITES]
    assert set(links[f"{SITES[0]}/index.html"]) == {"../index.html", *names[1:]}
    around = links[f"{SITES[0]}/5.html"]
    assert {"index.html", "4.html", "6.html"} <= set(around)
    # a neighbour in the next layer
    assert any(link.startswith(f"../{SITES[1]}/") for link in around)
    assert "5.html" not in links[f"{SITES[0]}/0.html"][:2] and out.stat().st_mode & 0o777 == 0o755


def test_some_latents_of_a_site(run, tmp_path):
    for number, source in enumerate((run.path / "sites" / SITES[1], run.path / "index" / SITES[1])):
        out = tmp_path / str(number)
        assert (
            main(["export", str(source), "--to", "html", "--latents", "1, 5,7-9,7", "--out", str(out)]) == 0
        )
        assert sorted(path.name for path in out.iterdir()) == sorted(
            ["index.html", *(f"{n}.html" for n in (1, 5, 7, 8, 9))]
        )
        for path in out.iterdir():
            # links to what was left out would lead nowhere
            check_page(path)


@pytest.mark.parametrize("latents", ["", "x", "5-2", "-1", "24", "0-99999999", "1;2", "³"])
def test_latents_that_cannot_be_read_or_are_not_there_leave_nothing(run, tmp_path, latents, capsys):
    out = tmp_path / "pages"
    words = ["export", str(run.path), "--to", "html", "--out", str(out), f"--latents={latents or ','}"]
    assert main(words) == 2 and "latents" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_export_that_fails(run, tmp_path, monkeypatch):
    def torn(feature, **rest):
        raise UserError("the index must be whole", "a torn one", "build it again")

    monkeypatch.setattr(static, "feature_page", torn)
    with pytest.raises(UserError, match="torn"):
        write_pages(run, tmp_path / "pages", sites=run.indexed)
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_left_alone_and_an_empty_one_taken(run, tmp_path):
    out = tmp_path / "pages"
    out.mkdir()
    seen = []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    assert write_pages(run, out, sites=SITES[:1], latents=[3, 4], alone=True, progress=report) == 2
    assert seen == [(1, 2), (2, 2)] and (out / "4.html").is_file()
    with pytest.raises(UserError, match="new or an empty folder"):
        write_pages(run, out, sites=SITES)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="new or an empty folder"):
        write_pages(run, file, sites=SITES)
    assert file.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["file", "pages"]


def test_what_has_no_index_says_what_to_do(tmp_path, capsys):
    bare = fake_run(tmp_path / "bare", index=False).path
    for source in (bare, bare / "sites" / SITES[0]):
        assert main(["export", str(source), "--to", "html", "--out", str(tmp_path / "x")]) == 2
        assert f"jumpscope index {bare}" in capsys.readouterr().err
    words = ["export", str(bare), "--to", "saelens", "--latents", "1", "--out", str(tmp_path / "x")]
    assert main(words) == 2 and "--to html" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@NEEDS_BROWSER
def test_pages_open_from_the_disk_sort_filter_and_lead_on(run, tmp_path):
    out = tmp_path / "pages"
    write_pages(run, out, sites=SITES)
    latents, first = run.layer(0).latents(), int(run.layer(0).live()[0])
    with chromium() as browser, watched(browser, "file://") as tab:

        def shows(latents):
            def step():
                assert [int(text) for text in tab.locator("tbody a").all_inner_texts()] == latents

            tried(step)

        tab.goto((out / "index.html").as_uri())
        tab.get_by_role("link", name="0 resid_post").click()
        shows(list(range(D_SAE)))
        tab.get_by_role("button", name="density").press("Enter")
        falling = latents.sort_values("density", ascending=False, kind="stable")["latent"].tolist()
        shows(falling)
        assert tab.locator("th[aria-sort=descending]").inner_text().startswith("density")
        tab.get_by_role("button", name="density").click()
        shows(latents.sort_values("density", kind="stable")["latent"].tolist())
        tab.get_by_label("Filter").fill("<IMG onerror")
        shows([first])
        assert "1 of 1" in tab.locator("output").inner_text()
        tab.locator("tbody a").click()
        # each loaded before the next key: its script listens for it
        tab.wait_for_url(f"**/{first}.html")
        tab.keyboard.press("ArrowRight")
        tab.wait_for_url(f"**/{first + 1}.html")
        tab.keyboard.press("ArrowLeft")
        tab.wait_for_url(f"**/{first}.html")
        for latent in range(D_SAE):
            tab.goto((out / SITES[0] / f"{latent}.html").as_uri())
            assert tab.evaluate("window.pwned") is None and tab.locator("img").count() == 0
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        # the table is found again as it was left
        tab.goto((out / SITES[0] / "index.html").as_uri() + "#by=3&falling=1&q=live")
        shows([n for n in falling if latents["state"][n] == "live"])
