"""The operator's console in a real browser; ``tox -e browser`` runs it.

It needs Chromium with its driver (Debian's packages chromium and chromium-driver),
and keeps a screenshot beside this file. Its name keeps it out of a plain run.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import ops_console
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import pybreaker

HERE = Path(__file__).resolve().parent
PATIENCE = 30.0  # seconds
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
    "--window-size=1100,1000",
]


@pytest.fixture
def breakers():
    """One that has been through something, and two that stand beside it."""
    weather = pybreaker.CircuitBreaker(name="weather <today>", reset_timeout=3600)
    payments = pybreaker.CircuitBreaker(name="payments", reset_timeout=30)
    search = pybreaker.CircuitBreaker(name="search/v2", success_threshold=3)
    return weather, payments, search


@pytest.fixture
def url(breakers):
    server = ops_console.serve(ops_console.Console(breakers), port=0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join(PATIENCE)


@pytest.fixture
def browser(tmp_path):
    """Chromium, in which pages may run no JavaScript."""
    driver = shutil.which("chromedriver")
    assert driver, "this needs Debian's packages chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.add_experimental_option(
        "prefs", {"profile.managed_default_content_settings.javascript": 2}
    )
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


class Card:
    """What the page shows of one breaker."""

    def __init__(self, browser, name):
        self.browser = browser
        self.path = f"//section[h2[.='{name}']]"

    def find(self, path):
        return self.browser.find_element(By.XPATH, self.path + path)

    def press(self, label):
        # The answer may look like the page that was there: wait for that to go.
        old = self.browser.find_element(By.TAG_NAME, "html")
        self.find(f"//button[.='{label}']").click()
        self.wait_for(lambda: old != self.browser.find_element(By.TAG_NAME, "html"))

    def field(self, setting):
        return self.find(f"//input[@name='{setting}']")

    def live(self):
        """The text of the frame, which may be about to be loaded anew."""
        self.browser.switch_to.frame(self.find("//iframe"))
        try:
            return self.browser.find_element(By.TAG_NAME, "body").text
        finally:
            self.browser.switch_to.default_content()

    def wait_for(self, condition):
        wait = WebDriverWait(
            self.browser,
            PATIENCE,
            0.1,
            [webdriver.remote.errorhandler.WebDriverException],
        )
        return wait.until(lambda _: condition())


def test_operator_opens_a_circuit_and_is_told_of_a_mistake(browser, breakers, url):
    """Without JavaScript, and what is typed outlives the page's own refresh."""
    weather, payments, search = breakers
    fail = ConnectionRefusedError("<b>refused</b> by payments.example")
    for _ in range(5):
        with pytest.raises((ConnectionRefusedError, pybreaker.CircuitBreakerError)):
            payments.call(raiser(fail))
    search.half_open()
    browser.get(url)
    card = Card(browser, "weather <today>")
    card.wait_for(lambda: "CLOSED" in card.live())

    card.press("Open")
    assert weather.current_state == "open"
    card.wait_for(lambda: "OPEN" in card.live())
    assert "by hand, from 127.0.0.1" in card.live()
    assert "in 3600 s" in card.live() or "in 3599 s" in card.live()

    # What is typed stays while the frame is loaded again and again.
    field = card.field("fail_max")
    field.clear()
    field.send_keys("seven")
    before = card.live()
    card.wait_for(lambda: card.live() != before)  # the countdown moves
    weather.fail_counter = 3
    card.wait_for(lambda: "3 of 5 failures" in card.live())
    assert card.field("fail_max").get_attribute("value") == "seven"
    assert field == card.field("fail_max")  # the very same: it was not loaded again

    card.press("Set")
    error = card.find("//strong")
    assert error.text == "fail_max must be a whole number, not 'seven'"
    assert error.value_of_css_property("color") == "rgba(255, 255, 255, 1)"  # styled
    assert card.field("fail_max").get_attribute("value") == "seven"
    assert card.field("fail_counter").get_attribute("value") == "3"
    assert weather.fail_max == 5
    other = Card(browser, "payments")
    other.wait_for(lambda: "<b>refused</b> by payments.example" in other.live())
    browser.save_screenshot(str(HERE / "ops_console.png"))

    card.field("fail_max").clear()
    card.field("fail_max").send_keys("7")
    card.press("Set")
    assert weather.fail_max == 7
    card.press("Close")
    assert weather.current_state == "closed"


def raiser(exc):
    """A function that raises `exc`."""

    def function():
        raise exc

    return function


EVIL = """<!doctype html><title>Kittens</title>
<form method=post action="{url}"><input name=breaker value=payments>
<button name=do value=open>Win a prize</button></form>"""


def test_page_of_another_site_cannot_press_a_button(browser, breakers, url, tmp_path):
    """Nor show the console in a frame, to have the operator press it."""
    page = tmp_path / "evil.html"
    page.write_text(EVIL.format(url=url) + f'<iframe src="{url}"></iframe>')
    browser.get(page.as_uri())
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    assert not browser.find_elements(By.TAG_NAME, "section")
    browser.switch_to.default_content()
    browser.find_element(By.TAG_NAME, "button").click()
    WebDriverWait(browser, PATIENCE).until(
        lambda _: "another site" in browser.find_element(By.TAG_NAME, "body").text
    )
    assert breakers[1].current_state == "closed"
