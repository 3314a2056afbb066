"""Players: what Python draws and what the browser makes of it."""

import json
import re

import pytest
from browser import chromium, operate, overflow, page

from labkit import player


def stepper(**options):
    steps = [
        {
            "text": f"Key {i} is read.",
            "keys": [["blue" if j == i else ("muted", j) for j in range(4)], [None] * 4],
            "state": {"m": i / 3, "l": i},
        }
        for i in range(4)
    ]
    panels = {"state": player.Values(["m", "l"]), "keys": player.Grid(2, 4, row_labels=["a", "b"], name="keys")}
    return player.Stepper("Steps", panels, steps, legend={"blue": "now", "muted": "later"}, **options)


def timeline():
    """Bars that grow as time passes."""
    bars = [(0, 0, 3, "blue", "a"), (1, 0, 5, "orange", "b"), (0, 3, 4, "green", "c")]
    steps = []
    for t in (0, 3, 4, 5):
        seen = [(lane, start, min(end, t), color, label) for lane, start, end, color, label in bars if start < t]
        steps.append({"text": f"At {t} us.", "time": {"bars": seen, "cursor": t}})
    return player.Stepper("Two SMs", {"time": player.Bars(["SM 0", "SM 1"], unit="us")}, steps)


def explorer(frame=None, **options):
    def default(model, batch):
        size = {"MHA": 4.0, "GQA": 1.0}[model] * batch
        return {"text": f"{model}, batch {batch}: {size} GiB", "bars": [(0, 0, size, "blue", "")], "size": {"GiB": size}}

    controls = {"model": ["MHA", "GQA"], "batch": [1, 2, 4, 8]}
    panels = {"bars": player.Bars(["cache"], unit="GiB"), "size": player.Values(["GiB"])}
    return player.Explorer("Cache", controls, panels, frame or default, **options)


ALL = {
    "stepper": stepper,
    "timeline": timeline,
    "explorer": explorer,
    "predict": lambda: player.predict("speed-up", "How many times faster?", "x"),
    "reveal": lambda: player.reveal("speed-up", 8.3, "x", source="H200, 2026-01-01"),
    "nothing recorded": lambda: player.reveal("speed-up", None, "x", source="No measurement yet."),
    "published": lambda: player.reveal("speed-up", None, "x", source="No measurement yet.", until=("Published", 35.7, "One A100.")),
}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def data(html):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)[1])


@every
def test_same_call_same_bytes_and_self_contained(make):
    html = make()._repr_html_()
    assert html == make()._repr_html_()
    assert len(html.encode()) < 20_000
    assert not re.search(r"""\bid=|https?://|src=|@import|url\(""", html)
    assert html.count("<figure") == html.count("</figure>") == 1
    assert "aria-live" in html
    assert 'role="group"' in html


def test_a_number_stands_in_for_a_record_and_judges_nobody():
    assert repr(ALL["published"]()) == "Published: 35.7 x. One A100."
    assert data(ALL["published"]()._repr_html_())["answer"] is None
    kept = player.reveal("speed-up", 8.3, "x", source="H200", until=("Published", 35.7, "One A100."))
    assert repr(kept) == "Recorded: 8.3 x. H200"


@pytest.mark.parametrize("make", [stepper, timeline, explorer])
def test_drawing_is_its_key_frame(make):
    """What print and a browser without JavaScript show is a frame of the table, and each frame has a state an item."""
    html = make()._repr_html_()
    table = data(html)
    drawn = re.findall(r'<(?:td|div) class="x ([^"]*)"(?: style="([^"]*)")?>([^<]*)<', html)
    states = [tuple(table["states"][i]) for i in table["frames"][table["key"]]]
    assert [(look, label, style) for look, style, label in drawn] == states
    assert all(len(frame) == len(drawn) for frame in table["frames"])
    assert f'<p class="lab-text" aria-live="polite">{table["texts"][table["key"]]}</p>' in html


def test_frames_hold_the_callers_data():
    table = data(stepper()._repr_html_())
    first = [table["states"][i] for i in table["frames"][1]]
    assert [s[:2] for s in first] == [["muted", "0"], ["blue", ""], ["muted", "2"], ["muted", "3"], *[["", ""]] * 4,
                                      ["", "0.3333"], ["", "1"]]  # fmt: skip
    assert table["options"] == [["1 of 4", "2 of 4", "3 of 4", "4 of 4"]]


def test_bars_share_an_axis_and_a_cursor():
    table = data(timeline()._repr_html_())
    assert table["texts"] == ["At 0 us.", "At 3 us.", "At 4 us.", "At 5 us."]
    styles = [[table["states"][i][2] for i in frame] for frame in table["frames"]]
    assert styles[1] == ["left:0%;width:60%;top:0%", "left:0%;width:60%;top:50%", "display:none", "left:60%;top:0;height:100%"]
    assert styles[3][2] == "left:60%;width:20%;top:0%"


def test_explorer_asks_once_for_each_choice_in_order():
    asked = []

    def frame(model, batch):
        asked.append((model, batch))
        return {"text": f"{model} {batch}", "bars": [], "size": {"GiB": batch}}

    table = data(explorer(frame, start=("GQA", 4), key=("MHA", 2))._repr_html_())
    assert asked == [(m, b) for m in ("MHA", "GQA") for b in (1, 2, 4, 8)]
    assert table["texts"] == [f"{m} {b}" for m, b in asked]
    assert table["key"] == 1


def test_text_of_the_caller_is_escaped():
    steps = [{"text": f"</script><b>{i} & <i>", "g": [[("", "<u>")]]} for i in range(2)]
    html = player.Stepper('"<title>', {"g": player.Grid(1, 1)}, steps, caption="<hr>")._repr_html_()
    assert not re.search(r"<b>|<u>|<hr>|<title>", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))
    assert data(html)["texts"][1] == "</script><b>1 & <i>"


def test_plain_text_stands_for_it():
    assert repr(stepper()) == "Steps: 4 frames. Key 3 is read."
    assert repr(ALL["nothing recorded"]()) == "Not known yet. No measurement yet."


def test_bad_input():
    grid, good = {"g": player.Grid(1, 2)}, [{"text": "", "g": [[None, None]]}] * 2
    player.Stepper("t", grid, good)
    for steps, message in (
        (good[:1], "steps: got 1"),
        ([*good, {"text": "", "g": [[None]]}], r"rows of \[1\]"),
        ([*good, {"text": ""}], r"frame 2: got \['text'\]"),
        ([*good, {"text": "", "g": [["pink", None]]}], "colour: got 'pink'"),
        ([{"text": "x" * 60_000, "g": [[None, None]]}] * 2, "at most 100,000"),
    ):
        with pytest.raises(ValueError, match=message):
            player.Stepper("t", grid, steps)
    with pytest.raises(ValueError, match="row_labels: got 1"):
        player.Grid(2, 2, row_labels=["a"])
    with pytest.raises(ValueError, match="values 'v'"):
        player.Stepper("t", {"v": player.Values(["m"], name="v")}, [{"text": "", "v": {"l": 1}}] * 2)
    with pytest.raises(ValueError, match="lane 2"):
        player.Stepper("t", {"b": player.Bars(["a"])}, [{"text": "", "b": [(2, 0, 1, "blue", "")]}] * 2)
    with pytest.raises(ValueError, match="start: got"):
        explorer(start=("GQA", 3))
    with pytest.raises(ValueError, match="controls"):
        player.Explorer("t", {"a": []}, {}, lambda a: {})


def test_reveal_says_how_and_shows_code():
    counted = player.reveal("launches", 12, "launches", source="the graph", how="Counted")
    assert repr(counted) == "Counted: 12 launches. the graph"
    unknown = player.reveal("launches", None, source="No <GPU>: `make record`.")
    assert "<strong>Not known yet.</strong> No &lt;GPU&gt;: <code>make record</code>." in unknown._repr_html_()


def test_reveal_repeats_the_question_and_makes_the_record_small():
    player.predict("asked", "How <many>?")
    told = player.reveal("asked", 2, source="H200")._repr_html_()
    assert '<p class="lab-name">How &lt;many&gt;?</p><p><strong>Recorded: 2 .</strong> <small>H200</small></p>' in told
    assert "lab-name" not in re.sub("<style>.*?</style>", "", player.reveal("never asked", 2, source="s").html, flags=re.DOTALL)
    assert "<small>" not in player.reveal("asked", 2, source="the graph", how="Counted").html


def test_a_column_is_as_wide_as_its_longest_label():
    """Of all frames; prose may grow, for it begins at the left."""
    grid, values = player.Grid(1, 2, row_labels=["a"]), player.Values(["b"], ["n", "text"], prose=["text"])
    cells = [[[None, ("", "xyz")]], [[("", 10), "blue"]]]
    steps = [{"text": "", "g": g, "v": {"b": [123.25, "long" * n]}} for n, g in enumerate(cells)]
    html = player.Stepper("t", {"g": grid, "v": values}, steps).html
    groups = re.findall("<colgroup>(.*?)</colgroup>", html)
    assert groups == ['<col><col style="--n:2"><col style="--n:3">', '<col><col style="--n:5"><col>']


def test_prose_begins_at_the_left():
    values = player.Values(["a", "b"], ["n", "text"], prose=["text"])
    styles = [style for _, _, style in values.items({"a": [1, "x"], "b": [2, "y"]})]
    assert styles == ["", "text-align:left"] * 2
    with pytest.raises(ValueError, match=r"prose: got \['words'\]"):
        player.Values(["a"], ["n"], prose=["words"])


def test_live_calls_the_callback():
    calls = []
    player.live(lambda batch, name: calls.append((batch, name)), batch=[1, 2, 4], name="abc")
    assert calls == [(1, "abc")]


def _luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] if len(color) == 7 else [int(c, 16) / 15 for c in color[1:]]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _contrast(a, b):
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_both_themes():
    """Text on every fill at least 4.5 : 1 (WCAG AA), every outline on the background at least 2.6 : 1, besides its own pattern."""
    css = (player._HERE / "player.css").read_text(encoding="utf-8")
    for block in re.findall(r"\{([^{}]*--ink: [^{}]*)\}", css):
        colors = dict(re.findall(r"--([\w-]+): (#\w+)", block))
        assert len(colors) == 17
        for name in player.COLORS[:6]:
            assert _contrast(colors["ink"], colors[name]) >= 4.5, name
            assert _contrast(colors[f"{name}-line"], colors["back"]) >= 2.6, name
        assert _contrast(colors["soft"], colors["back"]) >= 4.5
        assert _contrast(colors["ink"], colors["key"]) >= 4.5


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A bare page with every kind of player; the stepper twice, for nothing may clash."""
    path = tmp_path_factory.mktemp("player") / "index.html"
    players = "".join(make()._repr_html_() for make in [stepper, *ALL.values()])
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>t</title>'
    path.write_text(f"{head}<body>{players}", encoding="utf-8")
    return path.as_uri()


def test_in_a_browser(sample):
    with chromium() as browser:
        with page(browser, sample, width=390) as tab:
            assert overflow(tab) <= 0
            assert tab.locator(".lab-player").count() == tab.locator(".lab-player[data-ready]").count() == 1 + len(ALL)
            wrong = [problem for p in tab.query_selector_all(".lab-player") for problem in operate(tab, p)]
            assert not wrong, wrong
            assert "1.5 times too high" in tab.locator(".lab-yours").first.text_content()
            first = tab.locator(".lab-player").first
            first.locator("input").focus()
            tab.keyboard.press("Home")
            assert first.locator(".blue").count() == 1 + 1  # the cell being read, and the legend
            assert first.locator("td").nth(0).get_attribute("class") == "x blue"
            assert first.locator("td").nth(3).text_content() == "3"  # empty in the frame that Python drew
            tab.keyboard.press("ArrowRight")
            assert first.locator("output").text_content() == "2 of 4"
            tab.keyboard.press("Home")
            assert first.locator("[role=img]").get_attribute("aria-label") == "Key 0 is read."
            tab.emulate_media(media="print")
            tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
            assert first.locator("td").nth(3).get_attribute("class") == "x blue"
            assert not first.locator(".lab-controls").is_visible()


@pytest.mark.parametrize(
    ("yours", "answer", "verdict"),
    [
        ("12", "8.0", "That is 1.5 times too high."),
        ("2", "8.0", "That is 4.0 times too low."),
        ("8.1", "8.0", "Within 5 %."),
        ("1600", "8.0", "That is 200 times too high."),
        ("-0.5", "0.12", "That is 0.62 too low."),
        ("0", "0.12", "That is 0.12 too low."),
        ("3", "0", "That is 3 too high."),
        ("3", "null", "Nobody has measured that yet."),
    ],
)
def test_verdict_on_a_prediction(yours, answer, verdict, tmp_path):
    path = tmp_path / "index.html"
    asked = player.predict("k", "How many?")._repr_html_()
    told = player.reveal("k", json.loads(answer), source="s")._repr_html_()
    path.write_text(f'<!doctype html><meta charset="utf-8"><body>{asked}{told}', encoding="utf-8")
    with chromium() as browser, page(browser, path.as_uri()) as tab:
        tab.locator("input").fill(yours)
        tab.locator("button").click()
        assert tab.locator(".lab-yours").text_content().strip().endswith(verdict)


def test_a_link_leads_to_the_question(tmp_path):
    """From the answer of the same key, and only while nobody has answered; without a question there is no link."""
    path = tmp_path / "index.html"
    asked = [player.predict(key, "How many?")._repr_html_() for key in ("a", "b")]
    told = [player.reveal(key, 2, source="s")._repr_html_() for key in ("b", "c")]
    path.write_text(f'<!doctype html><meta charset="utf-8"><body>{"".join(asked + told)}', encoding="utf-8")
    with chromium() as browser, page(browser, path.as_uri()) as tab:
        assert tab.locator(".lab-yours").all_text_contents() == ["You have not committed to a number yet."] * 2
        assert tab.locator(".lab-yours a").count() == 1
        tab.locator(".lab-yours a").focus()
        tab.keyboard.press("Enter")
        tab.keyboard.type("3")
        tab.keyboard.press("Enter")
        assert tab.locator(".lab-text").nth(1).text_content().startswith("Noted: 3")
        assert tab.locator(".lab-yours a").count() == 0


def test_without_javascript(sample):
    with chromium() as browser:
        context = browser.new_context(java_script_enabled=False)
        tab = context.new_page()
        tab.goto(sample)
        first = tab.locator(".lab-player").first
        assert not first.locator(".lab-controls").is_visible()
        assert first.locator("td").nth(3).get_attribute("class") == "x blue"
        assert "Without JavaScript" in first.inner_text()
        context.close()
