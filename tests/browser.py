"""A headless Chromium for the tests, through playwright and the browser that the system has."""

import contextlib
import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--allow-file-access-from-files"]


@contextlib.contextmanager
def chromium():
    """A browser without a network, or a skip that says why. LAB_CHROMIUM names another executable."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser tests")
    path = os.environ.get("LAB_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed: no browser tests")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def page(browser, url, *, width=1280, scheme="light"):
    """An open page. Afterwards it must have logged no error and asked for nothing but files."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab, wrong = context.new_page(), []
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(f"asks for {r.url}"))
    tab.goto(url, wait_until="load")
    yield tab
    context.close()
    assert not wrong, wrong


def overflow(tab):
    """By how many pixels the page is wider than the window."""
    return tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def operate(tab, player):
    """Use one player by the keyboard alone. Returns what is wrong with it."""
    title, wrong = player.get_attribute("aria-label"), []

    def text():
        return player.evaluate("f => [...f.querySelectorAll('.lab-text, output')].map(e => e.textContent).join('|')")

    def press(element, key):
        before = text()
        element.focus()
        tab.keyboard.press(key)
        if text() == before:
            wrong.append(f"{title}: {key} on {element.evaluate('e => e.outerHTML')[:90]} changes nothing")

    fields = player.query_selector_all("input[type=range], select")
    for field in fields:
        at_end = field.evaluate("f => f.selectedIndex === f.length - 1 || (f.max !== undefined && f.value === f.max)")
        press(field, "ArrowLeft" if at_end else "ArrowRight")
    for box in player.query_selector_all("input[type=checkbox]"):
        press(box, "Space")
    for button in player.query_selector_all("button[data-all]"):
        press(button, "Enter")
    if step := player.query_selector("button[data-go=next]"):
        fields[0].focus()
        tab.keyboard.press("Home")
        for key in ("Enter", "ArrowRight", "ArrowLeft", "End"):
            press(step if step.is_enabled() else fields[0], key)
    if number := player.query_selector("input[type=number]"):
        if number.is_enabled():
            number.focus()
            tab.keyboard.type("12.5")
            press(number, "Enter")
            if "12.5" not in text():
                wrong.append(f"{title}: the prediction is not shown")
    if not fields and not player.query_selector("input, .lab-yours"):
        wrong.append(f"{title}: nothing to operate")
    return wrong


def low_contrast(tab):
    """Visible text with less contrast than WCAG AA asks for: 4.5 : 1, large text 3 : 1. Not equations and drawings."""
    return tab.evaluate(
        """() => {
  const numbers = (c) => { const [r, g, b, a = 1] = c.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const linear = (x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const luminance = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * linear(c[i] / 255), 0);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      layers.push(numbers(getComputedStyle(e).backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; (text = walk.nextNode());) {
    const e = text.parentElement;
    if (!text.data.trim() || e.closest("mjx-container, svg, script, style, [disabled]")) continue;
    if (!e.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    const style = getComputedStyle(e), back = behind(e), front = over(numbers(style.color), back);
    const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b), size = parseFloat(style.fontSize);
    const enough = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < enough - 0.01) found.push(`${ratio.toFixed(2)} : 1, ${text.data.trim().slice(0, 60)}`);
  }
  return [...new Set(found)];
}"""
    )
