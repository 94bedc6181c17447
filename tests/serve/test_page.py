"""The chat page: what it is made of, and in a real browser (slow) what it does."""

import json
import re
import shutil
import subprocess

import pytest

from xushi.base.defaults import TEMPERATURE, TOP_P
from xushi.engine import LLM, SamplingParams
from xushi.serve.protocol import MOST_MESSAGES


@pytest.fixture(scope="module")
def page(http):
    return http.get("/")


def test_nothing_comes_from_elsewhere(page):
    assert page.status_code == 200
    # The icon's SVG has no namespace either, since that is a URL. The only scheme is data:.
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|<link(?![^>]*href=\"data:)|\bsrc=", page.text
    )
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_no_text_becomes_markup(page):
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|\son\w+=[\"']"
    )
    assert not re.search(ways, page.text)


def test_both_languages_have_the_same_words(page):
    words = re.search(r"const words = \{(.*?)\n\};", page.text, re.DOTALL).group(1)
    english, chinese = words.split("\n  zh:")
    names = [set(re.findall(r"[{,]\s*(\w+): \"", part)) for part in (english, chinese)]
    assert names[0] == names[1]
    assert len(names[0]) > 15


def test_the_page_samples_as_the_terminal_does(page):
    [temperature] = re.findall(r"temperature: ([\d.]+)", page.text)
    [top_p] = re.findall(r"top_p: ([\d.]+)", page.text)
    assert (float(temperature), float(top_p)) == (TEMPERATURE, TOP_P)


def test_the_script_is_valid(page, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    script = tmp_path / "page.mjs"
    script.write_text(re.search(r"<script>(.*?)</script>", page.text, re.DOTALL).group(1))
    subprocess.run([node, "--check", script], check=True)


# In a browser. The tests are left out where there is none: playwright is in the extra test-slow,
# and its own browsers are not used, so that nothing but the distribution's Chromium is installed.
IN_BROWSER = pytest.mark.slow
CHAT, COMPLETE = "**/v1/chat/completions", "**/v1/completions"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """A function that opens the page in a new profile; a JavaScript error fails the test."""
    contexts, errors = [], []

    def open_page(width=900, height=800, **options):
        options = {"locale": "en-US", "viewport": {"width": width, "height": height}, **options}
        contexts.append(browser.new_context(**options))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(20_000)
        tab.on("pageerror", lambda error: errors.append(error))
        tab.on(
            "console", lambda message: errors.append(message.text) if is_error(message) else None
        )
        tab.goto(address)
        tab.wait_for_selector("#models button")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def is_error(message):
    # The browser writes a line of its own for each response that is no success.
    return message.type == "error" and "Failed to load resource" not in message.text


@pytest.fixture
def check():
    """Playwright's `expect`, which waits."""
    sync = pytest.importorskip("playwright.sync_api")
    sync.expect.set_options(timeout=20_000)
    return sync.expect


def events(*parts, end="stop"):
    """A stream of the API: reasoning and content, each a pair of channel and text."""
    deltas = [{channel: text} for channel, text in parts]
    objects = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    objects.append({"choices": [{"delta": {}, "finish_reason": end}]})
    lines = [": keep-alive", *(f"data: {json.dumps(each)}" for each in objects), "data: [DONE]"]
    return {"content_type": "text/event-stream", "body": "".join(f"{line}\n\n" for line in lines)}


def refusal(code, message="The server's words."):
    body = json.dumps({"error": {"message": message, "code": code}})
    return {"status": 400, "content_type": "application/json", "body": body}


def replies(tab, *canned, path=CHAT):
    """Answer requests with canned responses; None lets one through and "cut" ends the connection.
    Returns the list of the requests' bodies, which grows.
    """
    bodies, left = [], list(canned)

    def handle(route):
        bodies.append(json.loads(route.request.post_data))
        reply = left.pop(0) if left else None
        if reply is None:
            route.continue_()
        elif reply == "cut":
            route.abort()
        else:
            route.fulfill(**reply)

    tab.route(path, handle)
    return bodies


def ask(tab, check, text):
    """Send a question with the Enter key and wait for the end of the answer."""
    tab.fill("#input", text)
    tab.keyboard.press("Enter")
    check(tab.locator("#send")).to_have_text(re.compile("^(Send|发送)$"))


def contents(body):
    return [message["content"] for message in body["messages"]]


NINE = events(("reasoning_content", "8 1 "), ("content", "<b>"), ("content", "9</b>"))


@IN_BROWSER
def test_a_conversation_has_its_history_and_survives_a_reload(visit, check):
    tab = visit()
    bodies = replies(tab, NINE, events(("content", "2")), events(("content", "3")), NINE)
    ask(tab, check, "83514927")
    check(tab.locator(".turn .here")).to_have_text("<b>9</b>")  # text, and never markup
    assert tab.locator(".turn b").count() == 0
    assert tab.locator("details .text").text_content() == "8 1 "
    check(tab.locator("details")).not_to_have_attribute("open", "")
    check(tab.locator("#said")).to_contain_text("Answer: <b>9</b>")
    tab.click("summary")
    tab.evaluate("document.querySelector('.turn').dataset.same = 'yes'")
    ask(tab, check, "11111111")
    check(tab.locator(".turn[data-same] details[open] .text")).to_be_visible()  # not drawn again
    assert contents(bodies[1]) == ["83514927", "<b>9</b>", "11111111"]
    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "assistant", "user"]
    tab.reload()
    check(tab.locator(".turn .here")).to_have_text(["<b>9</b>", "2"])
    replies_after = replies(tab, events(("content", "3")))
    ask(tab, check, "5")
    assert contents(replies_after[0]) == ["83514927", "<b>9</b>", "11111111", "2", "5"]
    tab.click("#clear")
    check(tab.locator(".turn")).to_have_count(0)
    tab.reload()
    check(tab.locator("#models button")).to_have_count(2)
    check(tab.locator(".turn")).to_have_count(0)


@IN_BROWSER
def test_seed_temperature_and_retry(visit, check, run_directory):
    """The real model's answer for a seed is shown; a retry replaces the last answer by another."""
    tab = visit()
    bodies = replies(tab)
    tab.click("#more")
    tab.fill("#seed", "7")
    tab.fill("#temperature", "0.9")
    tab.click("#more")
    ask(tab, check, "12")
    llm = LLM(run_directory / "export" / "reasoning")
    messages = [{"role": "user", "content": "12"}]
    for seed in (7, 8):
        body = bodies[-1]
        assert (body["seed"], body["temperature"], body["top_p"]) == (seed, 0.9, 0.95)
        assert contents(body) == ["12"]
        answer = llm.chat(messages, SamplingParams(128, temperature=0.9, top_p=0.95, seed=seed))
        assert tab.locator(".turn .here").text_content() == answer.content
        if seed == 7:
            tab.click(".retry")
            check(tab.locator("#send")).to_have_text("Send")
    check(tab.locator(".turn")).to_have_count(1)
    tab.reload()
    check(tab.locator("#seed")).to_have_value("7")
    tab.click("#more")
    tab.fill("#temperature", "-1")
    tab.press("#temperature", "Tab")
    check(tab.locator("#temperature")).to_have_value("0.9")
    tab.fill("#seed", "")
    tab.press("#seed", "Tab")
    tab.click("#clear")
    ask(tab, check, "12")
    assert "seed" not in bodies[-1]


def fix_seed(tab):
    """Without one a text may end at any token."""
    tab.click("#more")
    tab.fill("#seed", "1")
    tab.click("#more")


@IN_BROWSER
@pytest.mark.parametrize("way", ["Escape", "button"])
def test_a_text_goes_on_after_a_stop(visit, check, steps, way):
    tab = visit()
    fix_seed(tab)
    bodies = replies(tab, path=COMPLETE)
    tab.click("#models button:nth-child(2)")
    tab.fill("#input", "import os")
    tab.keyboard.press("Control+Enter")
    check(tab.locator("#send")).to_have_text("Stop")
    steps.let(40)
    check(tab.locator(".turn .here")).not_to_be_empty()
    if way == "Escape":
        tab.keyboard.press("Escape")
    else:
        tab.click("#send")
    check(tab.locator(".note")).to_have_text("Stopped.")
    check(tab.locator("#send")).to_have_text("Continue")
    before = tab.locator(".turn .here").text_content()
    steps.let_all()
    assert tab.input_value("#input") == ""
    tab.click("#send")
    check(tab.locator("#send")).to_have_text("Continue")
    check(tab.locator(".note")).not_to_have_text("Stopped.")
    assert bodies[1]["prompt"] == "import os" + before
    check(tab.locator(".turn")).to_have_count(1)
    after = tab.locator(".turn .here").text_content()
    assert after.startswith(before) and len(after) > len(before)


@IN_BROWSER
def test_the_language_and_the_model_can_change_during_an_answer(visit, check, steps):
    tab = visit()
    fix_seed(tab)
    tab.click("#models button:nth-child(2)")
    tab.fill("#input", "import os")
    tab.keyboard.press("Control+Enter")
    steps.let(40)
    check(tab.locator(".turn .here")).not_to_be_empty()
    before = tab.locator(".turn .here").text_content()
    tab.click("#language")
    check(tab.locator("#send")).to_have_text("停止")
    steps.let(40)
    check(tab.locator(".turn .here")).not_to_have_text(before)
    tab.click("#models button:nth-child(1)")  # ends the answer
    check(tab.locator("#send")).to_have_text("发送")
    check(tab.locator(".turn")).to_have_count(0)
    tab.click("#models button:nth-child(2)")
    check(tab.locator(".note")).to_have_text("已停止。")
    assert tab.locator(".turn .here").text_content().startswith(before)


@IN_BROWSER
def test_a_reload_during_an_answer_stops_it(visit, check, steps):
    """What has come of the answer stays."""
    tab = visit()
    fix_seed(tab)
    tab.click("#models button:nth-child(2)")
    tab.fill("#input", "import os")
    tab.keyboard.press("Control+Enter")
    check(tab.locator("#send")).to_have_text("Stop")
    steps.let(40)
    check(tab.locator(".turn .here")).not_to_be_empty()
    before = tab.locator(".turn .here").text_content()
    tab.reload()
    tab.click("#models button:nth-child(2)")
    check(tab.locator(".note")).to_have_text("Stopped.")
    assert tab.locator(".turn .prompt").text_content() == "import os"
    assert tab.locator(".turn .here").text_content().startswith(before)


@IN_BROWSER
def test_an_error_keeps_what_was_written(visit, check):
    tab = visit()
    bodies = replies(tab, NINE, "cut", refusal("queue_full"), NINE)
    ask(tab, check, "1")
    for fault in ("The server did not answer. Is it running?", "The server's words."):
        ask(tab, check, "22")
        check(tab.locator("#fault")).to_have_text(fault)
        assert tab.input_value("#input") == "22"
        check(tab.locator(".turn")).to_have_count(1)
    ask(tab, check, "22")
    check(tab.locator("#fault")).to_be_hidden()
    assert contents(bodies[-1]) == ["1", "<b>9</b>", "22"]
    tab.route(CHAT, lambda route: route.fulfill(**refusal("queue_full")))
    tab.click(".turn:last-child .retry")
    check(tab.locator("#fault")).to_be_visible()
    check(tab.locator(".turn .here")).to_have_text(
        ["<b>9</b>", "<b>9</b>"]
    )  # the old answer is back
    assert tab.input_value("#input") == ""


@IN_BROWSER
def test_an_answer_that_broke_off_stays_and_is_no_part_of_the_conversation(visit, check):
    tab = visit()
    broken = {**NINE, "body": NINE["body"].replace("data: [DONE]", "")}
    told = {**NINE, "body": NINE["body"].replace("[DONE]", '{"error": {"message": "It failed."}}')}
    bodies = replies(tab, broken, told, events(), NINE)
    ask(tab, check, "1")
    check(tab.locator(".note")).to_have_text("The answer broke off: The connection was lost.")
    ask(tab, check, "2")
    check(tab.locator(".note").nth(1)).to_have_text("The answer broke off: It failed.")
    ask(tab, check, "3")
    check(tab.locator(".note").nth(2)).to_have_text("The model ended without an answer.")
    ask(tab, check, "4")
    assert contents(bodies[-1]) == ["4"]
    check(tab.locator(".turn")).to_have_count(4)


@IN_BROWSER
def test_a_conversation_that_is_too_long_loses_its_beginning(visit, check):
    tab = visit()
    full = refusal("context_length_exceeded")
    large = refusal("body_too_large")
    bodies = replies(tab, NINE, NINE, full, NINE, NINE, full, large, NINE, NINE, full)
    for question in ("1", "2", "3", "4"):
        ask(tab, check, question)
    assert contents(bodies[2]) == ["1", "<b>9</b>", "2", "<b>9</b>", "3"]
    assert contents(bodies[3]) == ["2", "<b>9</b>", "3"]
    assert contents(bodies[4]) == ["2", "<b>9</b>", "3", "<b>9</b>", "4"]  # what was left stays out
    for number, is_short in enumerate((False, False, True, True)):
        note = tab.locator(".note").nth(number).text_content()
        assert ("no longer sees the beginning" in note) == is_short
    ask(tab, check, "5")
    assert contents(bodies[7]) == ["4", "<b>9</b>", "5"]
    tab.reload()
    check(tab.locator(".turn")).to_have_count(5)
    ask(tab, check, "6")
    assert contents(bodies[8]) == ["4", "<b>9</b>", "5", "<b>9</b>", "6"]
    tab.click("#clear")
    ask(tab, check, "long")  # nothing is left to leave out
    check(tab.locator("#fault")).to_have_text("The server's words.")
    assert len(bodies) == 10


@IN_BROWSER
def test_a_conversation_of_more_messages_than_the_server_takes_goes_on(visit, check):
    tab = visit()
    bodies = replies(tab, NINE, NINE)
    ask(tab, check, "1")
    tab.evaluate("""() => {
        const name = Object.keys(localStorage).find((each) => each.startsWith("xushi.talk "));
        const [turn] = JSON.parse(localStorage.getItem(name));
        const turns = Array.from({ length: 600 }, (_, i) => ({ ...turn, ask: String(i) }));
        localStorage.setItem(name, JSON.stringify(turns));
    }""")
    tab.reload()
    check(tab.locator(".turn")).to_have_count(600)
    ask(tab, check, "12")
    assert contents(bodies[1])[::2] == [*map(str, range(100, 600)), "12"]
    assert len(bodies[1]["messages"]) <= MOST_MESSAGES
    check(tab.locator(".note").last).to_contain_text("no longer sees the beginning")


@IN_BROWSER
def test_all_of_it_is_chinese_in_a_chinese_browser(visit, check):
    tab = visit(locale="zh-CN")
    replies(tab, events(end="length"), refusal("queue_full"), refusal("unheard_of", "What?"))
    tab.click("#more")
    check(tab.locator("html")).to_have_attribute("lang", "zh-CN")
    check(tab.locator("#card .can")).to_have_text("它求数位和。")
    check(tab.locator("#card .cannot")).to_have_text("<b>它不会别的。</b>")
    ask(tab, check, "1")
    check(tab.locator(".note")).to_contain_text("已达长度上限。")
    ask(tab, check, "2")
    check(tab.locator("#fault")).to_have_text("服务器正忙，请稍后再试。")
    shown = tab.locator("body").inner_text()
    latin = set(re.findall(r"[A-Za-z]{2,}", shown))
    assert latin <= {"xushi", "Enter", "Shift", "Esc", "English"}
    ask(tab, check, "2")
    check(tab.locator("#fault")).to_have_text("服务器拒绝了请求：What?")
    tab.click("#models button:nth-child(2)")
    check(tab.locator("#card .can")).to_have_text("它续写与训练文本相似的文字。")
    tab.click("#language")
    check(tab.locator("#card .can")).to_have_text(
        "It continues text of the kind it was trained on."
    )
    tab.reload()
    check(tab.locator("#send")).to_have_text("Send")
    check(tab.locator("#language")).to_have_text("中文")
    check(tab.locator(".note")).to_contain_text("Ended at the token limit.")


@IN_BROWSER
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_nothing_is_wider_than_a_phone(visit, check, locale):
    tab = visit(360, 740, locale=locale)
    replies(
        tab,
        events(("reasoning_content", "1" * 300), ("content", "x" * 300)),
        refusal("a", "y" * 300),
    )
    tab.click("#more")
    ask(tab, check, "9" * 300)
    ask(tab, check, "8" * 300)
    tab.evaluate("document.getElementById('keyLabel').hidden = false")
    for number in (1, 2):
        tab.click(f"#models button:nth-child({number})")
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
    right = "[...document.querySelectorAll('body *')].map((e) => e.getBoundingClientRect().right)"
    assert tab.evaluate(f"Math.max(...{right})") <= 360


@IN_BROWSER
def test_everything_has_a_name_and_can_be_reached_by_keys(visit, check):
    tab = visit()
    replies(tab, NINE)
    ask(tab, check, "1")
    tab.click("#more")
    names = "label, button, textarea, input, summary"
    unnamed = f"""[...document.querySelectorAll('{names}')].filter((e) =>
        !(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels[0].textContent.trim())))"""
    assert tab.evaluate(f"{unnamed}.map((e) => e.outerHTML)") == []
    check(tab.get_by_role("textbox", name="Ask something")).to_be_visible()
    check(tab.get_by_role("spinbutton", name="Temperature")).to_be_visible()
    tab.focus("#input")
    reached = []
    for _ in range(8):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.id"))
    assert reached[:6] == ["send", "more", "clear", "temperature", "seed", "forget"]
    tab.keyboard.press("Escape")
    check(tab.locator("#settings")).to_be_hidden()
    check(tab.locator("#more")).to_have_attribute("aria-expanded", "false")


@IN_BROWSER
def test_copy_and_delete(visit, check):
    tab = visit(permissions=["clipboard-read", "clipboard-write"])
    replies(tab, NINE)
    ask(tab, check, "1")
    tab.click(".copy")
    check(tab.locator(".copy")).to_have_text("Copied")
    assert tab.evaluate("navigator.clipboard.readText()") == "<b>9</b>"
    tab.click("#more")
    tab.click("#forget")
    check(tab.locator(".turn")).to_have_count(0)
    assert tab.evaluate("Object.keys(localStorage).filter((k) => k.includes('talk'))") == []


@IN_BROWSER
def test_a_server_with_a_key(visit, check):
    tab = visit()
    seen = []

    def handle(route):
        seen.append(route.request.headers.get("authorization"))
        if seen[-1] == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(**{**refusal("invalid_api_key", "A key."), "status": 401})

    tab.route("**/v1/models", handle)
    tab.reload()
    check(tab.locator("#fault")).to_have_text("A key.")
    tab.fill("#key", "secret")
    tab.press("#key", "Tab")
    check(tab.locator("#models button")).to_have_count(2)
    check(tab.locator("#fault")).to_be_hidden()
    bodies = replies(tab, NINE)
    with tab.expect_request(CHAT) as request:
        ask(tab, check, "1")
    assert request.value.headers["authorization"] == "Bearer secret" and bodies
    tab.click("#models button:nth-child(2)")
    tab.evaluate("start()")  # as another key does
    pressed = [each.get_attribute("aria-pressed") for each in tab.locator("#models button").all()]
    assert pressed == ["false", "true"], "the model that was chosen stays"
