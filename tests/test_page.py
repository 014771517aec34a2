"""The page at the gateway's address, in a real browser: the machine's own Chromium, headless, driven by Playwright."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.calls import CHAT, MODELS, chat, message
from support.gateway import ALONE, PROVIDER_DATA, Gateway, clean_environ
from support.haproxy import BALANCER, NEEDS_HAPROXY, HAProxy
from support.network import NameServer
from support.services import ISSUER, Services
from support.vendors import KEYS, Vendors

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (uv sync --group browser)")
Browser, Page, expect = playwright.Browser, playwright.Page, playwright.expect

CHROMIUM = shutil.which("chromium")
pytestmark = [
    NEEDS_HAPROXY,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (apt-get install chromium)"),
]

SWITCHES = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # A name that is neither localhost nor an address: without HTTPS, browsers trust a page there with less.
    "--host-resolver-rules=MAP host.docker.internal 127.0.0.1",
]
# What Playwright switches off, and a browser does: to keep a page that was left, in memory and as it was.
KEPT = ["--disable-back-forward-cache"]
SCRIPT = """<img src=x onerror="document.title='run'"><script>document.title='run'</script><a href="javascript:0">& '"""
VENDOR_NAMES = {"openai": "OpenAI", "gemini": "Gemini", "anthropic": "Anthropic"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests. Each of them has a profile of its own in it."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES, ignore_default_args=KEPT)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def ways(gateway: Gateway, vendors: Vendors, services: Services) -> Iterator[dict[str, str]]:
    """The settings that lead a front to the gateway's server and to the stand-ins, and permit the pages of `services.url`."""
    with NameServer() as names:
        yield {
            "GATEWAY_A": f"127.0.0.1:{gateway.server_port}",
            "EGRESS_NAMESERVER": f"127.0.0.1:{names.port}",
            "EGRESS_VENDOR_PORT": str(vendors.tls_port),
            "EGRESS_CA": str(vendors.ca_file),
            "LLAMA_STACK_CORS_ORIGIN": services.url,
        }


@pytest.fixture(scope="module")
def front(ways: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[HAProxy]:
    """The front, which serves the page."""
    with HAProxy(tmp_path_factory.mktemp("front"), BALANCER, **ways) as front:
        yield front


@pytest.fixture
def tab(browser: Browser) -> Iterator[Page]:
    """A tab, in a profile of its own. `said` has what its console says."""
    with browser.new_context(permissions=["clipboard-read", "clipboard-write"]) as context:
        tab = context.new_page()
        tab.set_default_timeout(60_000)
        tab.said = []
        tab.on("console", lambda message: tab.said.append((message.type, message.text)))
        tab.on("pageerror", lambda error: tab.said.append(("error", str(error))))
        yield tab


@pytest.fixture
def page(tab: Page, front: HAProxy) -> Page:
    """The page, with the models that it has asked for."""
    return visit(tab, front.url)


expect.set_options(timeout=60_000)


def visit(tab: Page, url: str) -> Page:
    tab.goto(url)
    expect(tab.get_by_label("Models").get_by_role("listitem")).to_have_count(len(MODELS))
    return tab


def fill_in(page: Page, model: str, prompt: str = "Hello", key: str | None = None) -> None:
    """Fill in the form: a key for the model's vendor, and the model by its name."""
    vendor = model.split("/")[0]
    page.get_by_label(f"{VENDOR_NAMES[vendor]} key").fill(key or KEYS[vendor])
    page.get_by_label("Model", exact=True).select_option("")
    page.get_by_label("Its name").fill(model)
    page.get_by_label("Prompt").fill(prompt)


def ask(page: Page, *filled: str, **more: str) -> None:
    fill_in(page, *filled, **more)
    page.get_by_role("button", name="Ask").click()


def answer(page: Page) -> Any:
    return page.get_by_role("region", name="Answer")


def test_it_lists_the_models_and_keeps_to_its_policy(tab: Page, front: HAProxy) -> None:
    """What the policy says is in test_front_hosts_and_limits.py."""
    tab.goto(front.url)
    expect(tab.get_by_label("Models").locator("code")).to_have_text(MODELS)
    expect(tab.get_by_text("It answers")).to_be_visible()
    assert [text for kind, text in tab.said if kind in ("error", "warning")] == []


def test_an_answer_arrives_piece_by_piece(page: Page) -> None:
    page.set_viewport_size({"width": 375, "height": 700})  # So that it has several lines.
    page.evaluate("""() => {
        const box = document.querySelector('#answer');
        window.seen = [];
        new MutationObserver(() => seen.push([box.textContent.length, scrollY, box.getBoundingClientRect().height]))
            .observe(box, { childList: true });
    }""")
    ask(page, "openai/every-0.1", "one two three four five")
    expect(page.get_by_text("Complete after")).to_be_visible()
    expect(answer(page)).to_have_text("This is a stand-in for OpenAI, not every-0.1 itself. You said: one two three four five")
    lengths, scrolled, heights = zip(*page.evaluate("seen"), strict=True)
    assert len(set(lengths)) > 5
    assert len(set(scrolled)) == len(set(heights)) == 1  # Nothing moves.


def test_stop_ends_an_answer(page: Page) -> None:
    ask(page, "openai/every-0.1", "word " * 500)
    expect(answer(page)).to_contain_text("You said")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped after")).to_be_visible()
    assert answer(page).text_content().count("word") < 499
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()


def test_how_an_answer_ended_is_told(page: Page) -> None:
    """A vendor's error in its words."""
    for model, key, told in [
        ("openai/gpt-4o", "wrong", "OpenAI answered 401: Incorrect API key provided. You can find your API key at "),
        ("gemini/gemini-2.5-flash-lite", "wrong", "Gemini answered 400: API key not valid. Please pass a valid API key."),
        ("anthropic/claude-haiku-4-5-20251001", "wrong", "Anthropic answered 401: invalid x-api-key"),
        ("openai/status-429", None, "OpenAI answered 429: OpenAI says 429."),
        ("openai/error-event", None, "The answer failed:"),
        ("openai/no-finish", None, "The answer is cut off"),
        ("openai/length", None, "The model ended it"),
    ]:
        ask(page, model, key=key)
        expect(page.get_by_text(told)).to_be_visible()
        assert "{" not in page.locator("#outcome").text_content()


def test_an_answer_full_of_markup_is_text(page: Page) -> None:
    title = page.title()
    ask(page, "openai/gpt-4o", SCRIPT)
    expect(page.get_by_text("Complete after")).to_be_visible()
    assert answer(page).text_content().endswith(f"You said: {SCRIPT}")
    assert answer(page).locator("*").count() == 0
    assert page.title() == title


def test_a_key_is_nowhere_but_in_the_header(page: Page, front: HAProxy, gateway: Gateway) -> None:
    requests: list[Any] = []
    before = len(gateway.log)  # Other tests call it too.
    page.on("request", lambda request: requests.append(request))
    for vendor, name in VENDOR_NAMES.items():
        page.get_by_label(f"{name} key").fill(KEYS[vendor])
    ask(page, "openai/gpt-4o")
    expect(page.get_by_text("Complete after")).to_be_visible()
    (call,) = requests
    assert call.url == f"{front.url}/v1/chat/completions"
    assert json.loads(call.headers.pop(PROVIDER_DATA.lower())) == {"openai_authorization": f"Bearer {KEYS['openai']}"}
    kept = page.evaluate("""async () => JSON.stringify([
        location.href, document.cookie, history.state, { ...localStorage }, { ...sessionStorage },
        await indexedDB.databases(), await caches.keys(), document.documentElement.outerHTML,
        [...document.querySelectorAll('*')].flatMap((each) => [...each.attributes].map(({ value }) => value)),
    ])""")
    sent = (call.url, call.post_data, {**call.headers, PROVIDER_DATA.lower(): ""})
    places = (kept, page.context.storage_state(), page.said, sent, front.log, gateway.log[before:])
    assert [place for place in places if any(key in str(place) for key in KEYS.values())] == []


def test_keys_are_gone_when_the_page_is(page: Page, front: HAProxy) -> None:
    """Reloaded, or left and come back to."""

    def leave() -> None:
        page.goto(f"http://localhost:{front.port}/")
        page.go_back(wait_until="commit")

    for left in (page.reload, leave):
        ask(page, "openai/gpt-4o")
        expect(page.get_by_text("Complete after")).to_be_visible()
        left()
        expect(page.get_by_text("It answers")).to_be_visible()
        assert page.get_by_label("OpenAI key").input_value() == ""


def test_a_gateway_that_has_gone_is_a_sentence(tab: Page, ways: dict[str, str], tmp_path: Path) -> None:
    with HAProxy(tmp_path, BALANCER, **ways) as front:
        visit(tab, front.url)
        ask(tab, "openai/every-0.1", "word " * 500)
        expect(answer(tab)).to_contain_text("You said")
    expect(tab.get_by_text("The connection to the gateway broke: the answer is cut off.")).to_be_visible()
    tab.get_by_role("button", name="Ask").click()
    expect(tab.get_by_text(f"The gateway does not answer at {front.url}. Is it still running?")).to_be_visible()


def test_a_server_that_does_not_answer_is_a_sentence_of_the_front(tab: Page, tmp_path: Path) -> None:
    with HAProxy(tmp_path, BALANCER, START="1") as front:  # As a start has it, until the server answers.
        told = message(httpx.get(f"{front.url}/v1/models", trust_env=False))
        tab.goto(front.url)
        expect(tab.get_by_text(told)).to_be_visible()


@pytest.mark.parametrize(
    ("setting", "closed"),
    [({"EGRESS": "0"}, ["OpenAI", "Gemini", "Anthropic"]), ({"GEMINI_PASSTHROUGH_URL": "http://127.0.0.1:9"}, ["Gemini"])],
    ids=["EGRESS=0", "another URL"],
)
def test_what_is_closed_is_told_and_gone_around(
    tab: Page, ways: dict[str, str], tmp_path: Path, setting: dict[str, str], closed: list[str]
) -> None:
    with HAProxy(tmp_path, BALANCER, **ways, **setting) as front:
        visit(tab, front.url)
        for vendor, name in VENDOR_NAMES.items():
            tab.get_by_role("radio", name=name, exact=True).check()
            assert (tab.locator("#the-base").text_content() == f"{front.url}/v1") == (name in closed)
            assert tab.locator("#the-key").text_content().startswith(f"{vendor}=") == (name in closed)
            assert (tab.get_by_text("own API is closed here").count() == 1) == (name in closed)


def each_recipe(page: Page) -> Iterator[str]:
    """Choose each vendor and each program, one after the other. Gives the program's name."""
    for vendor in (*VENDOR_NAMES.values(), "Several"):
        page.get_by_role("radio", name=vendor, exact=True).check()
        programs = page.get_by_role("group", name="Which program?")
        for program in programs.locator("label").all_text_contents():
            programs.get_by_role("radio", name=program, exact=True).check()
            yield program


def test_a_phone_shows_it_without_scrolling_sideways_and_copies_what_it_shows(page: Page, front: HAProxy) -> None:
    page.set_viewport_size({"width": 375, "height": 700})
    ask(page, "openai/gpt-4o", "unbroken" * 100)
    expect(page.get_by_text("Complete after")).to_be_visible()
    seen = set()
    for program in each_recipe(page):
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        lines = page.locator("#recipe").text_content()
        assert f"{front.url}/" in lines
        assert "{" + "base" not in lines
        if program not in seen:
            page.get_by_role("button", name="Copy these lines").click()
            expect(page.get_by_role("button", name="Copy these lines")).to_have_text("Copied")
            assert page.evaluate("navigator.clipboard.readText()") == lines
        seen.add(program)
    assert len(seen) >= 12
    page.get_by_role("button", name="Copy the form of the API key").click()
    assert page.evaluate("navigator.clipboard.readText()") == "openai=sk-…;gemini=AI…;anthropic=sk-ant-…"


def test_copying_works_where_the_browser_has_no_clipboard_for_pages(tab: Page, front: HAProxy) -> None:
    visit(tab, f"http://host.docker.internal:{front.port}")
    assert tab.evaluate("navigator.clipboard === undefined")
    tab.get_by_role("button", name="Copy the base URL").click()
    tab.get_by_label("Prompt").fill("")
    tab.keyboard.press("Control+V")
    assert tab.get_by_label("Prompt").input_value() == f"http://host.docker.internal:{front.port}/openai/v1"


def test_the_lines_work(page: Page, tmp_path: Path) -> None:
    commands = {"curl": ["sh", "-c"], "Python": [sys.executable, "-c"]}
    for vendor, program in itertools.product((*VENDOR_NAMES.values(), "Several"), commands):
        page.get_by_role("radio", name=vendor, exact=True).check()
        page.get_by_role("radio", name=program, exact=True).check()
        lines = page.locator("#recipe").text_content()
        for form, name in {"sk-ant-…": "anthropic", "sk-…": "openai", "AI…": "gemini"}.items():
            lines = lines.replace(form, KEYS[name])
        command = [*commands[program], lines]
        run = subprocess.run(command, env=clean_environ(tmp_path), capture_output=True, text=True, timeout=120, check=False)
        assert "You said: Hello" in run.stdout, f"{vendor}, {program}: {run.stdout}{run.stderr}"


def test_the_keyboard_is_enough(page: Page) -> None:
    def go_to(label: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.labels?.[0]?.textContent ?? document.activeElement.textContent") == label:
                return
        pytest.fail(f"Tab does not lead to {label}.")

    go_to("OpenAI")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#the-base")).to_contain_text("/gemini/")
    assert page.evaluate("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle") == "solid"
    go_to("OpenAI key")
    page.keyboard.type(KEYS["openai"])
    go_to("Prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("by keyboard")
    page.keyboard.press("Control+Enter")
    expect(answer(page)).to_contain_text("You said: by keyboard")
    fill_in(page, "openai/every-0.1", "word " * 500)
    page.get_by_label("Prompt").focus()
    go_to("Ask")
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text("You said")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_text("Stopped after")).to_be_visible()
    expect(page.get_by_role("button", name="Ask")).to_be_focused()


def test_where_tokens_are_demanded_it_asks_for_one(
    tab: Page, vendors: Vendors, ways: dict[str, str], services: Services, tmp_path: Path
) -> None:
    tokens = {"AUTH_JWKS_URI": f"{services.url}/jwks", "AUTH_ISSUER": ISSUER}
    with (
        Gateway(tmp_path, **vendors.environ(), **tokens, **ALONE) as guarded,
        HAProxy(tmp_path, BALANCER, **ways | tokens | {"GATEWAY_A": f"127.0.0.1:{guarded.port}"}) as front,
    ):
        tab.goto(front.url)
        expect(tab.get_by_text("It answers, and asks for")).to_be_visible()
        expect(tab.locator("#the-key")).to_have_text("token=…;openai=sk-…")
        expect(tab.locator("#the-base")).to_have_text(f"{front.url}/v1")
        tab.get_by_label("Token").fill(services.token(exp=1))
        tab.keyboard.press("Tab")
        expect(tab.get_by_text("It refused this token")).to_be_visible()
        tab.get_by_label("Token").fill(services.token())
        tab.keyboard.press("Tab")
        expect(tab.get_by_label("Models").locator("code")).to_have_text(MODELS)
        ask(tab, "openai/gpt-4o")
        expect(answer(tab)).to_contain_text("You said: Hello")


# What a page of another origin can read of a call.
CALL = """async ([url, headers, body]) => {
    try {
        const response = await fetch(url, body ? { method: 'POST', headers, body: JSON.stringify(body) } : {});
        return [response.status, await response.text()];
    } catch (error) {
        return [error.name, ''];
    }
}"""


def test_a_permitted_origin_reads_answers_and_errors_and_no_other_does(tab: Page, front: HAProxy, services: Services) -> None:
    right, native = KEYS["openai"], "/openai/v1/chat/completions"
    calls, expected = [[f"{front.url}/v1/models", {}, None]], [(200, MODELS[0])]
    for path, model, key, status, words in [
        (CHAT, "openai/gpt-4o", right, 200, "You said: Hello"),
        (CHAT, "openai/gpt-4o", "wrong", 401, "Incorrect API key"),
        (CHAT, "openai/status-429", right, 429, "OpenAI says 429."),
        (native, "gpt-4o", right, 200, "You said: Hello"),
        (native, "gpt-4o", "wrong", 401, "Incorrect API key"),
        (native, "status-429", right, 429, "OpenAI says 429."),
    ]:
        credential = {"Authorization": f"Bearer {key}"}
        if path == CHAT:
            credential = {PROVIDER_DATA: json.dumps({"openai_authorization": f"Bearer {key}"})}
        headers = credential | {"Content-Type": "application/json"}
        calls.append([front.url + path, headers, chat(model)])
        expected.append((status, words))
    tab.goto(services.url)
    for call, (status, words) in zip(calls, expected, strict=True):
        read = tab.evaluate(CALL, call)
        assert read[0] == status, read
        assert words in read[1]
    tab.goto(services.url.replace("127.0.0.1", "localhost"))
    assert [tab.evaluate(CALL, call) for call in calls] == [["TypeError", ""]] * len(calls)
