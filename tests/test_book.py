"""The built book: complete, self-contained, described, and alive in a real browser in both themes and on a phone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from browser import chromium, low_contrast, operate, overflow, page
from bs4 import BeautifulSoup

from labkit.notebooks import ROOT

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))


def documents(entry):
    """All documents of the table of contents, in reading order."""
    if isinstance(entry, list):
        return [name for part in entry for name in documents(part)]
    found = [entry[key] for key in ("root", "file") if key in entry]
    return found + [name for key in ("parts", "chapters", "sections") for name in documents(entry.get(key, []))]


DOCUMENTS = documents(TOC)
REPOSITORY = "https://github.com/some-one/a-lab"  # the book is tested as it is published, with its launch buttons


def build(source, target, repository=""):
    """The command of the Makefile, from the book's sources in a folder of their own."""
    command = [Path(sys.executable).with_name("jupyter-book"), "build", source, "--path-output", target]
    env = {**os.environ, "LAB_REPOSITORY": repository}
    return subprocess.run([*command, "-W", "-n", "--keep-going"], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    target = tmp_path_factory.mktemp("book")
    result = build(ROOT, target, REPOSITORY)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return target / "_build" / "html"


@pytest.fixture(scope="module")
def pages(book):
    """{document: parsed page}"""
    return {name: BeautifulSoup((book / f"{name}.html").read_text(encoding="utf-8"), "html.parser") for name in DOCUMENTS}


def test_pages_are_the_table_of_contents(book):
    built = {path.relative_to(book).with_suffix("").as_posix() for path in book.rglob("*.html") if "_static" not in path.parts}
    assert built - {"index", "genindex", "search"} == set(DOCUMENTS)
    sources = [path for path in (ROOT / "chapters").iterdir() if path.suffix in (".md", ".ipynb")]
    chapters = {path.relative_to(ROOT).with_suffix("").as_posix() for path in sources}
    assert chapters == set(DOCUMENTS), "a file under chapters/ that is not in _toc.yml, or the reverse"


def test_a_warning_stops_the_build(tmp_path):
    """-W does what it says: a link to nowhere, a missing citation."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(ROOT / "_config.yml", source)
    (source / "_toc.yml").write_text("format: jb-book\nroot: chapters/intro\n", encoding="utf-8")
    shutil.copytree(ROOT / "chapters" / "_static", source / "chapters" / "_static")
    shutil.copy(ROOT / "chapters" / "references.bib", source / "chapters")
    (source / "chapters" / "intro.md").write_text("# T\n\n{ref}`nowhere` {cite}`nobody2026`\n", encoding="utf-8")
    result = build(source, tmp_path)
    assert result.returncode != 0
    assert "nowhere" in result.stderr
    assert "nobody2026" in result.stderr


def loads(soup):
    """Everything that a page loads by itself. Links that a reader clicks are not among them."""
    found = [tag[name] for tag in soup.find_all(True) for name in ("src", "data", "poster") if tag.has_attr(name) and tag.name != "a"]
    found += [url.split()[0] for tag in soup.find_all(srcset=True) for url in tag["srcset"].split(",")]
    found += [tag["href"] for tag in soup.find_all("link") if tag.get("rel") not in (["canonical"], ["next"], ["prev"])]
    styles = [tag.get_text() for tag in soup.find_all("style")] + [tag["style"] for tag in soup.find_all(style=True)]
    found += [url for style in styles for url in css_urls(style)]
    # A script in the page that names a script, style or font elsewhere.
    inline = [tag.get_text() for tag in soup.find_all("script") if not tag.has_attr("src")]
    return found + [url for text in inline for url in re.findall(r"""https?://[^\s"'<>]+\.(?:m?js|css|woff2?)\b""", text)]


def css_urls(text):
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return [m[0] or m[1] for m in re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", text)]


def resolved(url, base, book):
    """The file that a page or style at `base` means by `url`; None for data: URLs. Fails when it is not in the book."""
    if url.startswith(("data:", "#", "about:")):
        return None
    parts = urlsplit(url)
    assert (parts.scheme, parts.netloc) == ("", ""), f"{base.relative_to(book)} loads {url}"
    path = (base.parent / unquote(parts.path)).resolve() if parts.path else base
    assert path.is_relative_to(book.resolve()), f"{base.relative_to(book)} loads {url}, outside of the book"
    assert path.exists(), f"{base.relative_to(book)} loads {url}, which is not there"
    return path


def test_nothing_comes_from_elsewhere(book, pages):
    styles = set()
    for path in book.rglob("*.html"):
        if "_static" in path.parts:
            continue
        soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        found = [resolved(url, path, book) for url in loads(soup)]
        assert any(found) or path.name == "index.html"
        styles |= {file for file in found if file and file.suffix == ".css"}
    assert any(path.name == "lab.css" for path in styles)
    while styles:  # styles load fonts, images and other styles
        path = styles.pop()
        found = [resolved(url, path, book) for url in css_urls(path.read_text(encoding="utf-8"))]
        styles |= {file for file in found if file and file.suffix == ".css" and file != path}


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<script src="//cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example/css">',
        '<link rel="preconnect" href="https://fonts.example">',
        '<img src="http://example/x.png" alt="">',
        '<img srcset="https://example/x.png 2x" alt="">',
        '<iframe src="https://example/"></iframe>',
        '<style>@import "https://example/x.css";</style>',
        '<p style="background: url(https://example/x.png)">',
        '<script>load("https://unpkg.example/x.js")</script>',
        '<img src="missing.png" alt="">',
    ],
)
def test_a_foreign_host_is_noticed(html, tmp_path):
    base = tmp_path / "page.html"
    urls = loads(BeautifulSoup(html, "html.parser"))
    with pytest.raises(AssertionError, match="loads"):
        [resolved(url, base, tmp_path) for url in urls]


def test_a_link_for_the_reader_is_not_a_load():
    soup = BeautifulSoup('<a href="https://arxiv.example/x.js">paper</a><link rel="next" href="x.html">', "html.parser")
    assert loads(soup) == []


def described(image):
    """Whether an image has words for those who cannot see it."""
    alt = image.get("alt", "").strip()
    file_name = re.search(r"\.(png|svg|jpe?g|gif|webp)$", alt, re.IGNORECASE) or re.fullmatch(r"[0-9a-f_./-]{16,}", alt)
    return len(alt.split()) >= 5 and not file_name


def test_every_image_is_described(pages):
    for name, soup in pages.items():
        content = [image for image in soup.select("main img") if not image.find_parent(class_="bd-header-article")]
        wrong = [str(image)[:200] for image in content if not described(image)]
        assert not wrong, f"{name}: {wrong}"
        bare = [str(image)[:200] for image in soup.select("article .cell_output img") if not image.find_parent("figure")]
        assert not bare, f"{name}: an image without a caption: {bare}"


@pytest.mark.parametrize(
    ("alt", "good"),
    [
        ("Line plot of time against length", True),
        ("", False),
        ("../_images/0f3a9be2c4d5e6f708192a3b.png", False),
        ("0f3a9be2c4d5e6f708192a3b4c5d6e7f", False),
        ("plot", False),
    ],
)
def test_what_counts_as_described(alt, good):
    assert described(BeautifulSoup(f'<img alt="{alt}">', "html.parser").img) == good


def test_pages_describe_themselves_to_a_search_engine(pages):
    """The first page and every one with a recap: in one sentence, and none like another."""
    described = {name: soup.select('meta[name="description"]') for name, soup in pages.items()}
    recapped = [name for name, soup in pages.items() if soup.select("aside.lab-recap")]
    sentences = [tag["content"] for name in ("chapters/intro", *recapped) for tag in described[name]]
    assert len(recapped) == len(set(sentences)) - 1 >= 13


def test_links_inside_the_book_lead_somewhere(book, pages):
    for name, soup in pages.items():
        base = book / f"{name}.html"
        for link in soup.select("article a[href]"):
            parts = urlsplit(link["href"])
            if parts.scheme or parts.netloc:
                continue
            path = (base.parent / unquote(parts.path)).resolve() if parts.path else base
            assert path.exists(), f"{name}: {link['href']}"
            if parts.fragment and path.suffix == ".html":
                assert f'id="{unquote(parts.fragment)}"' in path.read_text(encoding="utf-8"), f"{name}: {link['href']}"


CELLS_BEYOND = """[...document.querySelectorAll(".cell_output .text_html :is(td, th)")]
    .filter(cell => cell.clientWidth && cell.scrollWidth > cell.clientWidth + 1).map(cell => cell.textContent)"""


def test_every_page_in_a_browser(book, pages):
    """No console error, no request but for files, no sideways scrolling in both themes and on a phone, enough contrast,
    equations set, every player works by the keyboard."""
    with chromium() as browser:
        for name, soup in pages.items():
            with page(browser, (book / f"{name}.html").as_uri()) as tab:
                tab.wait_for_function("!window.MathJax || window.MathJax.startup?.promise")
                tab.evaluate("window.MathJax?.startup?.promise")
                equations = len(soup.select("article .math"))
                assert tab.locator("article mjx-container").count() >= equations, name
                assert tab.locator("article mjx-merror").count() == 0, name
                for scheme in ("light", "dark"):
                    tab.emulate_media(color_scheme=scheme)
                    tab.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'", timeout=5000)
                    pale = low_contrast(tab)
                    assert not pale, f"{name}: too little contrast, {scheme}: {pale[:5]}"
                    for width in (1280, 390):
                        tab.set_viewport_size({"width": width, "height": 900})
                        assert overflow(tab) <= 0, f"{name}: wider than the window, {scheme}, {width} px"
                        beyond = tab.evaluate(CELLS_BEYOND)
                        assert not beyond, f"{name}: text leaves its cell, {width} px: {beyond[:5]}"
                players = tab.query_selector_all(".lab-player")
                assert len(players) == len(soup.select(".lab-player"))
                assert len(tab.query_selector_all(".lab-player .lab-wide")) == len(soup.select(".lab-player .lab-wide"))
                wrong = [problem for player in players for problem in operate(tab, player)]
                assert not wrong, f"{name}: {wrong}"


def test_contrast_is_noticed(tmp_path):
    path = tmp_path / "page.html"
    grey = '<p style="color: #888">pale</p><p style="color: #888; font-size: 30px">large</p>'
    boxed = '<div style="background: #123"><p style="color: #000">dark</p><p style="color: #fff">white</p></div>'
    path.write_text(f"<!doctype html><body>{grey}{boxed}<p hidden style='color: #fff'>nobody sees it</p>", encoding="utf-8")
    with chromium() as browser, page(browser, path.as_uri()) as tab:
        assert [text.split(", ")[1] for text in low_contrast(tab)] == ["pale", "dark"]


def test_every_figure_has_a_caption(pages):
    for name, soup in pages.items():
        bare = [str(f)[:120] for f in soup.select("article figure") if not f.figcaption and not f.select_one("input[type=number], .lab-yours")]
        assert not bare, f"{name}: {bare}"
        nameless = [str(svg)[:120] for svg in soup.select("article svg") if not svg.get("aria-label")]
        assert not nameless, f"{name}: {nameless}"


def test_the_map_works_by_the_keyboard(book, pages):
    with chromium() as browser, page(browser, (book / "chapters/one_step.html").as_uri()) as tab:
        link = tab.locator(".lab-map a[href]").first
        target = link.get_attribute("href")
        assert f"chapters/{target.removesuffix('.html')}" in DOCUMENTS
        link.focus()
        tab.keyboard.press("Enter")
        tab.wait_for_url(f"**/{target}")


def test_chapters_say_what_came_before_and_what_comes_next(pages):
    """The theme's links are joined by a sentence from _config.yml, on every chapter but where there is nothing."""
    chapters = [name for name in DOCUMENTS if re.search(r"/\d\d_", name)]
    for name in chapters:
        before, *_ = pages[name].select(".lab-recap")
        assert before.get_text().startswith("Before: "), name
        after = pages[name].select_one("aside.lab-recap").get_text()
        assert "In a sentence." in after
        assert ("Next: " in after) == (name != chapters[-1]), name


def test_every_notebook_can_be_launched(book, pages):
    """The button of a notebook's page names a file of the built book, on the branch that holds it."""
    for name, soup in pages.items():
        found = [a["href"] for a in soup.find_all("a", href=re.compile("^https://colab"))]
        is_notebook = (ROOT / f"{name}.ipynb").exists()
        file = f"launch/{name}.ipynb"
        assert found == [f"https://colab.research.google.com/github/some-one/a-lab/blob/gh-pages/{file}"] * is_notebook
        assert (book / file).exists() == is_notebook


def test_a_page_on_paper(book):
    """Title, text and the players' pictures; no menus, no controls. The question of a prediction can be read."""
    with chromium() as browser, page(browser, (book / "chapters/01_flash_decoding.html").as_uri()) as tab:
        tab.emulate_media(media="print")
        for selector in (".bd-sidebar-primary", ".bd-header-article", ".prev-next-footer", ".lab-player button", ".copybtn"):
            assert not any(e.is_visible() for e in tab.query_selector_all(selector)), selector
        assert any(e.is_visible() for e in tab.query_selector_all("h1"))
        assert tab.get_by_text("How many times faster is the split kernel").last.is_visible()
        assert all(e.is_visible() for e in tab.query_selector_all(".lab-stage"))
        assert tab.query_selector("details:not([open])"), "solutions stay folded"


def test_every_reference_can_be_found():
    text = (ROOT / "chapters" / "references.bib").read_text(encoding="utf-8")
    entries = re.split(r"^@", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 30
    for entry in entries:
        key = entry.split("{")[1].split(",")[0]
        assert re.search(r"\b(?:doi|eprint|url) = \{[^}]+\}", entry), f"{key}: no DOI, arXiv number or address"
        number = re.search(r"eprint = \{([^}]*)\}", entry)
        assert not number or re.fullmatch(r"\d{4}\.\d{4,5}", number[1]), f"{key}: {number[1]} is not an arXiv number"
        assert not number or f"arxiv.org/abs/{number[1]}" in entry or "arxiv.org" not in entry, f"{key}: two arXiv numbers"
