"""Who may ask, and what a browser is told. Browsers are imitated by the headers that they send."""

import json
import socket

import anyio
import httpx
import pytest
from starlette.testclient import TestClient

from xushi.base.errors import XushiError
from xushi.serve.access import Access, AccessMiddleware, clean_origins, read_keys

MODELS = "/v1/models"
JSON = "application/json"


async def answers(scope, receive, send):
    """An application that answers every request."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answer"})


def asked(access, method="GET", path=MODELS, host="localhost:8000", **headers):
    """The response to one request with these headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    transport = httpx.ASGITransport(AccessMiddleware(answers, access))

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as web:
            return await web.request(method, path, headers={"host": host, **named})

    return anyio.run(ask)


def code(response):
    return json.loads(response.content)["error"]["code"] if response.status_code >= 400 else None


LOCAL = Access()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LOCALHOST:8000", 200),
        ("localhost.:80", 200),
        ("127.0.0.1:8000", 200),
        ("127.9.9.9", 200),
        ("[::1]:8000", 200),
        ("xushi.localhost:1", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.1.5:8000", 403),
        ("notlocalhost", 403),
        ("", 403),
        ("[::1", 403),
        ("localhost@evil.example", 403),
    ],
)
def test_a_local_server_answers_to_its_own_names(host, status):
    response = asked(LOCAL, host=host)
    assert response.status_code == status
    assert code(response) == (None if status == 200 else "unknown_host")
    assert status == 200 or "use localhost" in response.text
    assert asked(Access(local=False), host=host).status_code == 200


def test_a_request_may_name_no_host():
    """One of HTTP/1.0, which no browser sends."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": MODELS, "headers": []}
    anyio.run(AccessMiddleware(answers, LOCAL), scope, None, send)
    assert sent[0]["status"] == 200


def test_the_name_of_this_machine_may_have_capitals(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Workstation")
    for host in ("Workstation:8000", "workstation", "WORKSTATION.:80"):
        assert LOCAL.is_named(host)
    assert not LOCAL.is_named("workstation.evil.example")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("192.168.1.5:8000", 200),
        ("[fd00::5]:8000", 200),
        (socket.gethostname(), 200),
        ("chat.example", 200),
        ("evil.example:8000", 403),
        ("192.168.1.5.evil.example", 403),
        ("[::1", 403),
    ],
)
def test_in_a_network_no_page_asks_under_a_name_that_was_made_to_lead_here(host, status):
    """Without a key. Programs ask under any name, and a key is nothing that such a page has."""
    access = Access(local=False, origins=("http://chat.example",))
    response = asked(access, "POST", host=host, origin=f"http://{host}", content_type=JSON)
    assert response.status_code == status
    if status == 403:
        assert code(response) == "unknown_host" and "use its IP address" in response.text
    assert asked(access, "POST", host=host, content_type=JSON).status_code == 200
    with_keys = Access(local=False, keys=("k",))
    headers = {"origin": f"http://{host}", "authorization": "Bearer k"}
    assert asked(with_keys, host=host, **headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://localhost:8000"}, 200),
        ({"origin": "http://localhost:8000", "sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"origin": "http://localhost:3000", "sec_fetch_site": "same-site"}, 403),
        ({"origin": "http://localhost"}, 403),
        ({"origin": "http://localhost:80001"}, 403),
        ({"origin": "http://localhost:3000", "host": "localhost"}, 403),
        ({"origin": "http://localhost", "host": "localhost"}, 200),
        ({"origin": "https://evil.example", "sec_fetch_site": "cross-site"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 403),
    ],
)
@pytest.mark.parametrize("access", [LOCAL, Access(local=False, keys=("k",))])
def test_pages_of_other_origins_are_refused(access, headers, status):
    response = asked(access, authorization="Bearer k", **headers)
    assert response.status_code == status
    assert code(response) == (None if status == 200 else "cross_origin")


def test_a_link_may_open_the_page():
    told = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert asked(LOCAL, path="/", **told).status_code == 200
    assert asked(LOCAL, "POST", path="/", **told).status_code == 403


def test_an_allowed_origin_may_ask_and_read():
    access = Access(origins=clean_origins(["https://Chat.example/", "app://obsidian.md"]))
    for origin in ("https://chat.example", "app://obsidian.md"):
        response = asked(access, origin=origin, sec_fetch_site="cross-site")
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == origin
        assert response.headers["vary"] == "Origin"
    assert asked(access, host="chat.example").status_code == 200, "behind a proxy of that name"
    for other in ("https://chat.example:444", "http://chat.example", "https://chat.example.evil"):
        response = asked(access, origin=other)
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers


def test_a_browser_may_ask_permission_before_it_has_a_key():
    access = Access(origins=("https://chat.example",), keys=("k",))
    told = {
        "access_control_request_method": "POST",
        "access_control_request_headers": "authorization,content-type",
        "access_control_request_private_network": "true",
    }
    response = asked(access, "OPTIONS", origin="https://chat.example", **told)
    assert response.status_code == 204
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-headers"] == "authorization,content-type"
    assert response.headers["access-control-allow-private-network"] == "true"
    assert asked(access, "OPTIONS", origin="https://evil.example", **told).status_code == 403
    assert asked(access, origin="https://chat.example").status_code == 401
    assert asked(LOCAL, origin="http://localhost:8000").headers.get("vary") is None


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("Bearer one", 200),
        ("bearer two", 200),
        ("Bearer  two ", 200),
        ("Bearer three", 401),
        ("Bearer on", 401),
        ("Bearer one two", 401),
        ("Bearer ", 401),
        ("Basic one", 401),
        ("one", 401),
        (None, 401),
    ],
)
def test_keys(given, status):
    access = Access(keys=("one", "two"))
    headers = {} if given is None else {"authorization": given}
    response = asked(access, **headers)
    assert response.status_code == status
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert code(response) == "invalid_api_key"
    assert asked(access, path="/", **headers).status_code == 200
    assert asked(access, path="/health", **headers).status_code == 200
    assert asked(LOCAL, **headers).status_code == 200, "a key that nobody asks for"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain", 415),
        ("text/plain;application/json", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data", 415),
        (None, 415),
    ],
)
def test_a_body_must_be_json_by_its_header(kind, status):
    headers = {} if kind is None else {"content_type": kind}
    assert asked(LOCAL, "POST", "/v1/completions", **headers).status_code == status
    assert asked(LOCAL, "GET", **headers).status_code == 200


def test_every_response_has_a_request_id():
    for status, host in ((200, "localhost"), (403, "evil.example")):
        response = asked(LOCAL, host=host, x_request_id="mine-1")
        assert (response.status_code, response.headers["x-request-id"]) == (status, "mine-1")
        made = [asked(LOCAL, host=host).headers["x-request-id"] for _ in range(2)]
        assert len(set(made)) == 2 and all(each.startswith("req_") for each in made)
    for wrong in ("", "a b", "a" * 201):
        assert asked(LOCAL, x_request_id=wrong).headers["x-request-id"].startswith("req_")


def test_origins_that_are_none_are_named():
    for wrong in ("localhost:3000", "https://a.example/path", "*", "https://"):
        with pytest.raises(XushiError, match="is not an origin"):
            Access(origins=clean_origins([wrong]))


def test_keys_are_read_from_a_file_and_the_environment(tmp_path):
    path = tmp_path / "keys"
    path.write_text("one\n\n  two\r\n")
    assert read_keys(path, {}) == ("one", "two")
    assert read_keys(None, {"XUSHI_API_KEYS": "three four"}) == ("three", "four")
    assert read_keys(path, {"XUSHI_API_KEYS": "three"}) == ("one", "two", "three")
    assert read_keys(None, {}) == ()
    with pytest.raises(XushiError, match="XUSHI_API_KEYS holds no key"):
        read_keys(path, {"XUSHI_API_KEYS": " "})
    for wrong in ("", "\n", "schlüssel"):
        path.write_text(wrong)
        with pytest.raises(XushiError, match="keys holds no key, or one with characters"):
            read_keys(path, {})
    with pytest.raises(XushiError, match="cannot be read"):
        read_keys(tmp_path / "gone", {})


def test_a_failed_request_has_its_id_and_the_headers_of_its_origin():
    """Starlette answers an unexpected error outside of all middleware."""

    async def fails(scope, receive, send):
        raise RuntimeError("a fault of ours")

    access = Access(origins=("https://a.example",))
    client = TestClient(
        AccessMiddleware(fails, access), "http://localhost", raise_server_exceptions=False
    )
    headers = {"origin": "https://a.example", "x-request-id": "mine-1"}
    response = client.get("/v1/models", headers=headers)
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["access-control-allow-origin"] == "https://a.example"


def test_an_origin_with_its_schemes_own_port_is_the_browsers():
    given = ["http://localhost:80", "https://A.example:443/", "http://a.example:443"]
    assert clean_origins(given) == ("http://localhost", "https://a.example", "http://a.example:443")
