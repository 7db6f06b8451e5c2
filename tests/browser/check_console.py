"""Tests of the operator's console in a real browser; ``tox -e browser`` runs them.

The tests need Chromium with its driver (Debian's packages chromium and chromium-driver)
and axe (the npm package axe-core, in a folder that NODE_PATH names). They keep
screenshots beside this file, whose name keeps the file out of a plain run of pytest.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

import pybreaker
from pybreaker_extras import console

HERE = Path(__file__).resolve().parent
PATIENCE = 30.0  # seconds
LARGE, SMALL = (1440, 900), (390, 844)
# A window of 1280 pixels at a zoom of 400 %.
ZOOMED = (320, 256)
# Whether the browser would ask before it leaves the page.
ASKS = "return !dispatchEvent(new Event('beforeunload', {cancelable: true}))"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Site:
    """A console and its server, which a test can stop and start as one process."""

    def __init__(self):
        self.port = 0
        self.server = None

    def start(self, breakers):
        application = console.Console(breakers, service="shop")
        self.server = console.serve(application, port=self.port)
        self.port = self.server.server_port
        self.thread = threading.Thread(
            target=self.server.serve_forever, args=(0.01,), daemon=True
        )
        self.thread.start()
        return f"http://127.0.0.1:{self.port}/"

    def stop(self):
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.thread.join(PATIENCE)
            self.server = None


@pytest.fixture
def site():
    site = Site()
    yield site
    site.stop()


@pytest.fixture
def browse(tmp_path):
    """A function that starts Chromium: of a given size, with or without scripts, and
    with media features such as dark or forced colors."""
    driver = shutil.which("chromedriver")
    assert driver, "this needs Debian's packages chromium and chromium-driver"
    browsers = []

    def browse(size=LARGE, scripts=True, features=()):
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        profile = tmp_path / f"profile{len(browsers)}"
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        if not scripts:
            options.add_experimental_option(
                "prefs", {"profile.managed_default_content_settings.javascript": 2}
            )
        browser = webdriver.Chrome(options=options, service=Service(driver))
        browsers.append(browser)
        browser.set_script_timeout(4 * PATIENCE)  # axe looks at a page of 60 rows
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {
                "width": size[0],
                "height": size[1],
                "deviceScaleFactor": 1,
                "mobile": size == SMALL,
            },
        )
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": n, "value": v} for n, v in features]},
        )
        return browser

    yield browse
    for browser in browsers:
        browser.quit()


def make(number):
    """Make `number` breakers, of which the first ones are in all the states."""
    names = "payments", "weather <today>", "search/v2", "users-db", "mail", "geo", "tax"
    breakers = [
        pybreaker.CircuitBreaker(
            name=names[i % 7] + (f"-{i // 7}" if i >= 7 else ""), reset_timeout=3600
        )
        for i in range(number)
    ]
    fail = raiser(ConnectionRefusedError("<b>refused</b> by payments.example"))
    for breaker in breakers[:1] + breakers[3:4]:
        for _ in range(5):
            with pytest.raises(Exception):  # noqa: B017
                breaker.call(fail)
    for breaker in breakers[1:2]:
        breaker.half_open()
    for breaker in breakers[4:5]:
        breaker.open(seconds=1800, reason="new disks")
    for breaker in breakers[5:6]:
        breaker.fail_counter = 3
    return breakers


def raiser(exc):
    """A function that raises `exc`."""

    def function():
        raise exc

    return function


class Row:
    """What the page shows of one breaker."""

    def __init__(self, browser, name):
        self.browser = browser
        self.path = f"//details[summary/b[.='{name}']]"

    def find(self, path=""):
        return self.browser.find_element(By.XPATH, self.path + path)

    def unfold(self):
        if not self.find().get_attribute("open"):
            self.find("/summary").click()

    def press(self, label):
        # The new page may look like the old page, so wait until the old page is gone.
        self.unfold()
        old = self.browser.find_element(By.TAG_NAME, "html")
        self.find(f"//button[starts-with(.,'{label}')]").click()
        wait_for(
            self.browser,
            lambda: old != self.browser.find_element(By.TAG_NAME, "html"),
        )

    def field(self, name):
        return self.find(f"//input[substring-after(@name,'.')='{name}']")

    def type(self, name, text):
        self.unfold()
        self.field(name).clear()
        self.field(name).send_keys(text)


def wait_for(browser, condition, patience=PATIENCE):
    wait = WebDriverWait(browser, patience, 0.1, [WebDriverException])
    return wait.until(lambda _: condition())


def heading(browser):
    return browser.find_element(By.ID, "summary").text


def frame_text(browser):
    """The text of the inner frame of a page without scripts."""
    try:
        browser.switch_to.frame(browser.find_element(By.CSS_SELECTOR, "iframe.now"))
        browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
        return browser.find_element(By.TAG_NAME, "body").text
    finally:
        browser.switch_to.default_content()


scripts = pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "plain"])


@scripts
def test_evening_of_an_operator(site, browse, scripts):
    """An operator sees an outage, begins a maintenance window, types a wrong value,
    meets a colleague's change and a restart."""
    breakers = make(6)
    payments, weather = breakers[0], breakers[1]
    browser = browse(scripts=scripts)
    browser.get(site.start(breakers))
    assert heading(browser) == "3 open \xb7 1 half-open \xb7 2 closed"

    # The row tells the outage as one story.
    row = Row(browser, "payments")
    row.unfold()
    story = row.find("/div[@class='story']").text
    assert "OPEN: calls are refused; the next trial in " in story
    assert "<b>refused</b> by payments.example" in story

    # The maintenance window begins; the page keeps a setting that was typed.
    row.type("why", "it's new")
    row.type("minutes", "45")
    row.type("fail_max", "seven")
    row.press("Hold open:")
    assert payments.state.reason.startswith("5 failures")
    row.press("Yes, hold payments open")
    assert (
        "payments is held open for 45 min" in browser.find_element(By.ID, "news").text
    )
    assert payments.state.reason == "by hand, from 127.0.0.1: it's new"
    assert row.field("fail_max").get_attribute("value") == "seven"

    # The operator saves the wrong value; the error is tied to the field.
    row.press("Save the settings")
    error = row.find("//strong")
    assert error.text == "fail_max must be a whole number, not 'seven'"
    ids = row.field("fail_max").get_attribute("aria-describedby").split()
    assert error.get_attribute("id") in ids
    assert browser.switch_to.active_element == row.field("fail_max")
    row.type("fail_max", "7")
    row.press("Save the settings")
    assert payments.fail_max == 7

    # A colleague changes a setting that the operator is changing.
    other = Row(browser, "weather <today>")
    other.type("success_threshold", "3")
    weather.success_threshold = 4
    other.press("Save the settings")
    assert other.find("//em").text.startswith("meanwhile 4, set by the program.")
    assert weather.success_threshold == 4
    other.press("Save the settings")
    assert weather.success_threshold == 3

    # The program is restarted.
    other.type("fail_max", "30")
    site.stop()
    breakers = make(6)
    site.start(breakers[::-1])
    if scripts:  # the script notices the restart
        text = "made by another process"
        wait_for(browser, lambda: text in browser.find_element(By.ID, "news").text)
    else:
        other.press("Save the settings")
        assert "made by another process" in browser.find_element(By.ID, "news").text
    assert other.field("fail_max").get_attribute("value") == "30"
    assert breakers[1].fail_max == 5
    other.press("Save the settings")
    assert breakers[1].fail_max == 30


def test_page_keeps_up_with_what_happens_and_leaves_alone_what_is_typed(site, browse):
    """The script updates the heading, the title and the rows, but no field of a row
    into which the operator has typed."""
    breakers = make(3)
    weather, search = breakers[1:]
    browser = browse()
    browser.get(site.start(breakers))
    row, other = Row(browser, "weather <today>"), Row(browser, "search/v2")
    row.type("fail_max", "8")
    other.unfold()
    field = row.field("fail_max")
    weather.close()
    weather.fail_counter = 4
    search.fail_max = 9
    wait_for(browser, lambda: heading(browser) == "1 open \xb7 2 closed")
    assert browser.title.startswith("1 open \xb7 2 closed \N{EM DASH} shop")
    wait_for(browser, lambda: "4 of 5 failures" in row.find("/div").text)
    wait_for(browser, lambda: other.field("fail_max").get_attribute("value") == "9")
    assert field == row.field("fail_max")  # the browser has not loaded the page again
    assert field.get_attribute("value") == "8"
    # The script does not load the page with a new breaker while a text is typed.
    more = pybreaker.CircuitBreaker(name="new")
    breakers.append(more)
    time.sleep(2 * console.REFRESH + 1)
    assert field.get_attribute("value") == "8"
    Row(browser, "weather <today>").press("Save the settings")
    assert weather.fail_max == 8
    assert Row(browser, "new").find()


def test_text_that_was_refused_outlives_renewal_and_restart(site, browse):
    """The refused text comes with the page, and the script treats the text as typed by
    the operator."""
    breakers = make(3)
    browser = browse()
    browser.get(site.start(breakers))
    row = Row(browser, "payments")
    row.type("fail_max", "seven")
    row.type("why", "night shift")
    row.press("Save the settings")
    breakers[0].fail_counter = 4
    breakers[0].close()
    wait_for(browser, lambda: "CLOSED" in row.find("/div").text)
    assert row.field("fail_max").get_attribute("value") == "seven"
    assert browser.execute_script(ASKS)
    site.stop()
    breakers = make(3)
    site.start(breakers)
    text = "made by another process"
    wait_for(browser, lambda: text in browser.find_element(By.ID, "news").text)
    assert row.field("fail_max").get_attribute("value") == "seven"
    assert row.field("why").get_attribute("value") == "night shift"


@pytest.mark.parametrize("size", [LARGE, SMALL], ids=["large", "small"])
def test_sixty_open_breakers_fit_on_two_screens(site, browse, size):
    """All breakers are open, as when the network is down."""
    breakers = make(60)
    for breaker in breakers:
        breaker.open(reason="no route to host, as the network is down")
    browser = browse(size)
    browser.get(site.start(breakers))
    browser.save_screenshot(str(HERE / f"{size[0]}_60_open.png"))
    height = browser.execute_script("return document.documentElement.scrollHeight")
    assert height <= 2 * size[1]


def test_page_that_nothing_was_typed_into_is_left_without_a_question(site, browse):
    """The browser does not ask either when the operator leaves a page whose form is
    sent."""
    browser = browse()
    browser.get(site.start(make(3)))
    row = Row(browser, "payments")
    row.unfold()
    browser.find_element(By.NAME, "q").send_keys("pay")
    assert not browser.execute_script(ASKS)
    row.type("fail_max", "7")
    assert browser.execute_script(ASKS)
    browser.execute_script("dispatchEvent(new Event('submit'))")
    assert not browser.execute_script(ASKS)


def test_nothing_moves_under_the_finger(site, browse):
    """While a row is unfolded the rows keep their order; afterwards the worst is
    first."""
    breakers = [pybreaker.CircuitBreaker(name=name) for name in "abc"]
    browser = browse()
    browser.get(site.start(breakers))
    names = "#rows .name"

    def order():
        found = browser.find_elements(By.CSS_SELECTOR, names)
        return "".join(each.text for each in found)

    Row(browser, "b").unfold()
    breakers[2].open()
    wait_for(browser, lambda: "1 open" in heading(browser))
    assert order() == "abc"
    Row(browser, "b").find("/summary").click()
    browser.find_element(By.NAME, "q").click()
    wait_for(browser, lambda: order() == "cab")


@scripts
def test_page_whose_process_has_stopped_says_so_and_comes_back(site, browse, scripts):
    """The page says so within five seconds, and recovers without the operator."""
    breakers = make(3)
    browser = browse(scripts=scripts)
    browser.get(site.start(breakers))
    if scripts:
        wait_for(browser, lambda: browser.find_element(By.ID, "as-of").text)
        site.stop()
        dead = browser.find_element(By.ID, "dead")
        wait_for(browser, lambda: "NO ANSWER" in dead.text, patience=5)
        assert "dead" in browser.find_element(By.TAG_NAME, "body").get_attribute(
            "class"
        )
        assert browser.title.startswith("NO ANSWER, was 1 open")
        browser.save_screenshot(str(HERE / "dead.png"))
        breakers[0].close()
        site.start(breakers)
        wait_for(browser, lambda: heading(browser) == "1 half-open \xb7 2 closed")
        assert not browser.find_element(By.ID, "dead").text
        assert browser.title.startswith("1 half-open")
    else:
        wait_for(browser, lambda: "1 open" in frame_text(browser))
        site.stop()
        wait_for(browser, lambda: not shows_console(browser), patience=5)
        # The list does not change after loading, and looks old after five seconds.
        badge = browser.find_element(By.CSS_SELECTOR, "details.open .badge")
        color = "rgba(87, 96, 106, 1)"
        wait_for(browser, lambda: badge.value_of_css_property("color") == color)
        browser.save_screenshot(str(HERE / "dead_plain.png"))
        breakers[0].close()
        site.start(breakers)
        wait_for(browser, lambda: "1 half-open \xb7 2 closed" in frame_text(browser))


def shows_console(browser):
    try:
        return "As of" in frame_text(browser)
    except WebDriverException:
        return False


def test_keyboard_alone_is_enough(site, browse):
    """The operator unfolds a row, types a reason, holds the circuit open and confirms
    the hold without a mouse."""
    breakers = [pybreaker.CircuitBreaker(name="only")]
    browser = browse()
    browser.get(site.start(breakers))

    def press(*keys):
        browser.switch_to.active_element.send_keys(*keys)

    def tab_to(name):
        reached = []
        for _ in range(40):
            focused = browser.switch_to.active_element
            reached.append(focused.accessible_name or focused.text)
            if name in reached[-1]:
                return
            press(Keys.TAB)
        raise AssertionError(f"the keyboard does not reach {name}, only {reached}")

    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    tab_to("closed only")
    press(Keys.ENTER)
    tab_to("Because of only")
    press("night shift")
    tab_to("Hold open until released")
    press(Keys.ENTER)
    wait_for(
        browser,
        lambda: browser.switch_to.active_element.text == "Yes, hold only open",
    )
    press(Keys.ENTER)
    wait_for(browser, lambda: breakers[0].current_state == "open")
    assert breakers[0].state.reason.endswith(": night shift")


LOOKS = {
    "large": (LARGE, ()),
    "small": (SMALL, ()),
    "zoomed": (ZOOMED, ()),
    "dark": (LARGE, [("prefers-color-scheme", "dark")]),
    "forced": (LARGE, [("forced-colors", "active")]),
}


@pytest.mark.parametrize("number", [1, 3, 60])
@pytest.mark.parametrize("look", LOOKS)
def test_page_is_accessible_in_every_state(site, browse, look, number):
    """Axe finds nothing wrong, nothing is wider than the screen, and every button and
    field names its breaker. Screenshots are kept for a person to judge."""
    size, features = LOOKS[look]
    breakers = make(number)
    browser = browse(size, features=features)
    browser.get(site.start(breakers))

    def check(state):
        browser.save_screenshot(str(HERE / f"{look}_{number}_{state}.png"))
        find_nothing_wrong(browser)
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert width <= size[0]

    if number == 60 and look in ("large", "small"):
        height = browser.execute_script("return document.documentElement.scrollHeight")
        assert height <= 2 * size[1]
    check("list")
    row = Row(browser, "payments")
    row.unfold()
    check("unfolded")
    for each in browser.find_elements(
        By.CSS_SELECTOR, "details[open] button, .few, .why"
    ):
        if each.is_displayed():
            assert "payments" in each.accessible_name
    row.press("Hold open until released")
    check("question")
    row.press("No, leave payments as it is")
    row.type("fail_max", "seven")
    Select(row.find("//select")).select_by_visible_text("on")
    row.press("Save the settings")
    check("error")
    with breakers[0]._lock:  # this thread holds the lock, not a thread of the console
        browser.get(f"http://127.0.0.1:{site.port}/")
        check("busy")
    site.stop()
    dead = browser.find_element(By.ID, "dead")
    wait_for(browser, lambda: dead.text)
    check("dead")


def find_nothing_wrong(browser):
    """Check that axe finds nothing wrong on the page."""
    places = [Path(each) for each in os.environ.get("NODE_PATH", "").split(":") if each]
    (source,) = (
        place / "axe-core" / "axe.min.js"
        for place in places
        if (place / "axe-core" / "axe.min.js").is_file()
    )
    browser.execute_script(source.read_text(encoding="utf-8"))
    found = browser.execute_async_script(
        "const done = arguments[0]; axe.run().then(r => done(r.violations))"
    )
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []


EVIL = """<!doctype html><title>Kittens</title>
<form method=post action="{url}"><input name=page value="x.y">
<button name=do value=yes.1.60>Win a prize</button></form>"""


def test_page_of_another_site_cannot_press_a_button(site, browse, tmp_path):
    """The page of another site cannot show the console in a frame, either."""
    breakers = make(3)
    url = site.start(breakers)
    browser = browse()
    page = tmp_path / "evil.html"
    page.write_text(EVIL.format(url=url) + f'<iframe src="{url}"></iframe>')
    browser.get(page.as_uri())
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    assert not browser.find_elements(By.TAG_NAME, "details")
    browser.switch_to.default_content()
    browser.find_element(By.TAG_NAME, "button").click()
    wait_for(
        browser,
        lambda: "another site" in browser.find_element(By.TAG_NAME, "body").text,
    )
    assert breakers[2].current_state == "closed"
