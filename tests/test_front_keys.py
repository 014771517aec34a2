"""Keys at the front: each is sent to its own vendor alone, and what is no key, or could be two, goes nowhere."""

import base64
import json
from collections.abc import Iterator

import pytest
from support.calls import CHAT
from support.fronts import NATIVE, Front, front
from support.gateway import PROVIDER_DATA
from support.haproxy import NEEDS_HAPROXY

pytestmark = NEEDS_HAPROXY

KEYS = {"openai": "sk-fake-O_1", "gemini": "AIza-fake.G", "anthropic": "sk-ant-fake-A"}
LIST = ";".join(f"{vendor}={key}" for vendor, key in KEYS.items())
AS_DATA = {f"{vendor}_authorization": f"Bearer {key}" for vendor, key in KEYS.items()} | {"gemini_api_key": KEYS["gemini"]}
# How each vendor's own API takes a key.
OWN = {
    "openai": {"authorization": f"Bearer {KEYS['openai']}"},
    "anthropic": {"x-api-key": KEYS["anthropic"]},
    "gemini": {"x-goog-api-key": KEYS["gemini"]},
}
VERSION = {"anthropic-version": "2023-06-01"}
TOKEN = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbGljZSJ9.fake-signature_1"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def data(**entries: object) -> dict[str, str]:
    return {PROVIDER_DATA: json.dumps(entries)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A front whose gateway demands no tokens."""
    with front(tmp_path_factory.mktemp("plain")) as plain:
        yield plain


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A front whose gateway demands tokens."""
    with front(tmp_path_factory.mktemp("guarded"), AUTH_JWKS_URI="https://id.example/jwks") as guarded:
        yield guarded


def at_gateway(front: Front) -> dict:
    """The provider data that the gateway got, after a look at what else came with it."""
    headers = front.gateway.headers()
    assert not {"authorization", "x-api-key", "x-goog-api-key", "cookie"} & set(headers)
    return json.loads(headers[PROVIDER_DATA])


@pytest.mark.parametrize(
    ("place", "scheme"), [("Authorization", "bearer "), ("Authorization", "BEARER "), ("x-api-key", ""), ("X-Goog-Api-Key", "")]
)
def test_a_list_becomes_provider_data(plain: Front, place: str, scheme: str) -> None:
    for value in (LIST, f"sk-{LIST}", LIST.replace(";", ","), f"sk-{LIST.replace(';', ',')}"):
        assert plain.call(headers={place: scheme + value, "Cookie": "a=b"}).status_code == 200
        assert at_gateway(plain) == AS_DATA


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("gemini=AIza", {"gemini_authorization": "Bearer AIza", "gemini_api_key": "AIza"}),
        ("mistral=m-1,openai=o", {"mistral_authorization": "Bearer m-1", "openai_authorization": "Bearer o"}),
        ("openai=a=b==", {"openai_authorization": "Bearer a=b=="}),
        ("openai=a'b<c>%0a{}[]&\\1"[:-2], {"openai_authorization": "Bearer a'b<c>%0a{}[]&"}),
        ("openai=o;token=t.t.t", {"openai_authorization": "Bearer o"}),
        ("token=t;openai=o", {"openai_authorization": "Bearer o"}),
        ("my-vendor_2=x", {"my-vendor_2_authorization": "Bearer x"}),
    ],
)
def test_any_name_may_be_in_a_list(plain: Front, given: str, expected: dict) -> None:
    """A fifth vendor needs nothing. A token is for a gateway that demands one, and no vendor's."""
    assert plain.call(headers=bearer(given)).status_code == 200
    assert at_gateway(plain) == expected


def test_long_keys_beside_a_long_body_fit(plain: Front) -> None:
    keys = {f"vendor{i}": "k" * 400 for i in range(20)}
    given = ",".join(f"{name}={key}" for name, key in keys.items())
    assert plain.call(headers={"x-api-key": given}, content=b"x" * 1_000_000).status_code == 200
    assert at_gateway(plain) == {f"{name}_authorization": f"Bearer {key}" for name, key in keys.items()}


NO_LIST = {
    "an entry without a key": "openai=;gemini=g",
    "no entries": "openai=o;;gemini=g",
    "an end without an entry": f"{LIST};",
    "a space": "openai=o; gemini=g",
    "a quotation mark": 'openai=o","gemini_api_key":"x',
    "a backslash": "openai=o\\",
    "a capital": "OpenAI=o",
    "no name": "=o",
    "a character beyond ASCII": "openai=ö",
    "a colon for the sign": "openai:o;gemini:g",
    "a bare key": "sk-fake-bare",
    "two keys": "sk-fake-1,sk-fake-2",
    "a padded key": "abcd1234==",
    "only a token": "token=t.t.t",
    "too many": ",".join(f"v{i}=k" for i in range(40)),
}
# On a native path these pass as a vendor's own key.
LIKE_A_KEY = ("a bare key", "a padded key", "a capital", "a colon for the sign", "only a token", "no name")


@pytest.mark.parametrize("case", NO_LIST)
def test_what_is_no_list_goes_nowhere(plain: Front, case: str) -> None:
    """Nor on a native path, where a list with a mistake in it, taken for a key, would hand all keys to one vendor."""
    for place, scheme in {"Authorization": b"Bearer ", "x-api-key": b"", "x-goog-api-key": b""}.items():
        headers = {place: scheme + NO_LIST[case].encode()}
        told = plain.refused(401, CHAT, headers)
        for part in (f"{plain.haproxy.url}/openai/v1", "/anthropic", "/gemini", "openai=sk-...;gemini=...;anthropic=sk-ant-..."):
            assert part in told
        for path in NATIVE.values() if case not in LIKE_A_KEY else ():
            plain.refused(401, path, headers)


BASIC = {"Authorization": "Basic " + base64.b64encode(f"{LIST}:".encode()).decode()}


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "x"}, {"Authorization": ""}, {"Cookie": LIST}, {"api-key": LIST}, {"Authorization": LIST}, BASIC],
)
def test_a_call_without_a_key_does_not_reach_the_server(plain: Front, headers: dict) -> None:
    for path in (CHAT, "/v1/embeddings/", "/v1/responses?a=b", "/elsewhere"):
        plain.refused(401, path, headers)


@pytest.mark.parametrize(
    "headers",
    [{}, bearer("sk-fake-bare"), {"x-api-key": "sk-fake"}, bearer("openai=o; gemini=g"), data(a=1), {PROVIDER_DATA: "[]"}],
)
def test_models_are_listed_without_a_key(plain: Front, headers: dict) -> None:
    for method in ("GET", "HEAD"):
        assert plain.call("/v1/models", headers, method).status_code == 200
        assert not {"authorization", "x-api-key", PROVIDER_DATA.lower()} & set(plain.gateway.headers())


@pytest.mark.parametrize("headers", [bearer(LIST), data(**AS_DATA)], ids=["a list", "provider data"])
def test_keys_of_several_list_each_vendors_models(plain: Front, headers: dict) -> None:
    assert plain.call("/v1/models", headers, "GET").status_code == 200
    assert at_gateway(plain) == AS_DATA


ONE_KEY = data(passthrough_api_key="sk-fake")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1/models//", "/v1/models/openai%2Fgpt-4o", "/v1/models?a=b"])
def test_one_key_for_one_call_is_not_handed_to_every_vendor(plain: Front, path: str) -> None:
    assert plain.call(path, ONE_KEY, "GET").status_code == 200
    assert PROVIDER_DATA not in plain.gateway.headers()


@pytest.mark.parametrize("path", ["/v1/%6dodels", "/v1%2Fmodels", "/%761/models", "/%64ocs", "/v1/models%2F"])
def test_an_encoded_path_does_not_slip_by(plain: Front, path: str) -> None:
    """The server decodes it, so that it would be handled there as what it is not here."""
    plain.refused(404, path, ONE_KEY, "GET")


GOOD_DATA = [
    AS_DATA,
    {"openai_authorization": "Bearer x", "mcp_headers": {"https://a.example": {"b": "c"}}},
    {"passthrough_api_key": "k", "passthrough_url": "https://api.openai.com"},
    {"gemini_api_key": "k"},
    {"tenth_api_key": "k"},
]


@pytest.mark.parametrize("entries", GOOD_DATA)
def test_provider_data_wins_and_passes_as_it_is(plain: Front, entries: dict) -> None:
    header = json.dumps(entries)
    headers = {PROVIDER_DATA.lower(): header, "x-api-key": "openai=other", **bearer("sk-fake-unused")}
    assert plain.call(headers=headers).status_code == 200
    assert plain.gateway.headers()[PROVIDER_DATA] == header
    assert at_gateway(plain) == entries


@pytest.mark.parametrize(
    "value",
    ["", "x", "[]", "{}", "null", '["openai_authorization"]', '"openai_authorization"', '{"a": 1}', '{"openai_authorization": ""}',
     '{"openai_authorization": null}', '{"openai_authorization": 1}', "openai_authorization: x", LIST, '{"x": "openai_authorization"}'],
)  # fmt: skip
def test_provider_data_without_a_key_is_refused(plain: Front, value: str) -> None:
    for beside in ({}, bearer(LIST)):
        assert PROVIDER_DATA in plain.refused(401, CHAT, {PROVIDER_DATA: value} | beside)


TWO = {
    "two keys": [("Authorization", "Bearer a"), ("Authorization", "Bearer b")],
    "the same key twice": [("x-api-key", "a"), ("X-Api-Key", "a")],
    "two lists in two headers": [("x-api-key", LIST), ("Authorization", f"Bearer {LIST}")],
    "two lists in two other headers": [("x-api-key", LIST), ("x-goog-api-key", "openai=o")],
    "a name twice in a list": [("x-api-key", "openai=a;gemini=g;openai=b")],
    "two tokens in a list": [("x-api-key", "token=a;token=b;openai=b")],
    "provider data twice": [(PROVIDER_DATA, json.dumps(AS_DATA)), (PROVIDER_DATA.lower(), json.dumps(AS_DATA))],
    "two keys beside provider data": [("x-api-key", "a"), ("x-api-key", "b"), (PROVIDER_DATA, json.dumps(AS_DATA))],
}


@pytest.mark.parametrize("case", TWO)
def test_two_credentials_are_refused(plain: Front, case: str) -> None:
    for path in (CHAT, *NATIVE.values()):
        plain.refused(400, path, TWO[case])


# Native paths.


@pytest.mark.parametrize(
    "given", [bearer(LIST), {"x-api-key": f"sk-{LIST}"}, {"x-goog-api-key": LIST.replace(";", ",")}, data(**AS_DATA)]
)
def test_a_native_path_gets_the_vendors_own_key_of_several(plain: Front, given: dict) -> None:
    unused = {"Cookie": "a=b", "OpenAI-Organization": "org-fake", "x-api-key": "unused", "x-goog-api-key": "unused"}
    others = unused | bearer("unused") if PROVIDER_DATA in given else {}
    for vendor, path in NATIVE.items():
        assert plain.call(path, VERSION | others | given).status_code == 200
        assert plain.vendors.last.vendor == vendor
        assert plain.vendors.last.keys == OWN[vendor]


def test_a_compatible_endpoint_gets_its_key_as_openai_does(plain: Front) -> None:
    paths = {"gemini": "/gemini/v1beta/openai/chat/completions", "anthropic": "/anthropic/v1/chat/completions"}
    for vendor, path in paths.items():
        for headers in (bearer(LIST), data(**AS_DATA)):
            assert plain.call(path, headers).status_code == 200
            assert plain.vendors.last.keys == {"authorization": f"Bearer {KEYS[vendor]}"}


@pytest.mark.parametrize(
    ("entries", "key"),
    [
        ({"openai_authorization": "sk-1"}, "sk-1"),
        ({"openai_authorization": "bearer  sk-1", "passthrough_api_key": "no"}, "sk-1"),
        ({"openai_api_key": "sk-1"}, "sk-1"),
        ({"passthrough_api_key": "sk-1", "passthrough_url": "https://other.example"}, "sk-1"),
        ({"a": {"b": [1, "}"]}, "openai_authorization": "Bearer sk-1", "z": '", "openai_authorization": "no'}, "sk-1"),
    ],
)
def test_a_key_is_found_in_provider_data(plain: Front, entries: dict, key: str) -> None:
    assert plain.call(NATIVE["openai"], data(**entries)).status_code == 200
    assert plain.vendors.last.keys == {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "given",
    [bearer("gemini=g"), bearer("xopenai=o;openai-mini=o"), data(gemini_authorization="Bearer g"), {PROVIDER_DATA: "x"},
     data(openai_authorization="Bearer a\r\nX-Evil: 1"), data(openai_authorization=""), data(openai_authorization='a"b'),
     {PROVIDER_DATA: '{"openai_authorization": "a\\u000d\\u000aX-Evil: 1"}'}, {PROVIDER_DATA: '[{"openai_authorization": "a"}]'},
     data(xopenai_authorization="a"), bearer("sk-fake") | {PROVIDER_DATA: "{}"}, bearer("token=t.t.t")],
)  # fmt: skip
def test_no_key_of_this_vendor_is_told_here(plain: Front, given: dict) -> None:
    assert "no key of this vendor" in plain.refused(401, NATIVE["openai"], given)


BARE = [
    ("openai", bearer("sk-fake"), {"authorization": "Bearer sk-fake"}),
    ("openai", bearer(TOKEN), {"authorization": f"Bearer {TOKEN}"}),
    ("anthropic", {"x-api-key": "sk-ant-fake"}, {"x-api-key": "sk-ant-fake"}),
    ("anthropic", bearer("sk-ant-oat-fake"), {"authorization": "Bearer sk-ant-oat-fake"}),
    ("gemini", {"x-goog-api-key": "AIza-fake"}, {"x-goog-api-key": "AIza-fake"}),
    ("gemini", bearer("ya29.fake"), {"authorization": "Bearer ya29.fake"}),
    ("gemini", {"Authorization": "Token auth_tokens/fake"}, {"authorization": "Token auth_tokens/fake"}),
    ("openai", BASIC, {"authorization": BASIC["Authorization"]}),
    ("openai", {}, {}),
]


@pytest.mark.parametrize(("vendor", "given", "expected"), BARE)
def test_a_bare_key_stays_as_it_is_and_others_stay_behind(plain: Front, vendor: str, given: dict, expected: dict) -> None:
    own = {"openai": ["openai-project", "openai-beta"], "anthropic": ["anthropic-beta"], "gemini": ["x-goog-user-project"]}
    others = dict.fromkeys([name for names in own.values() for name in names], "fake")
    others |= {"x-api-key": "of-another", "x-goog-api-key": "of-another", "cookie": "a=b"}
    others.pop({"openai": "", "anthropic": "x-api-key", "gemini": "x-goog-api-key"}[vendor], None)
    assert plain.call(NATIVE[vendor], others | {name.lower(): value for name, value in given.items()}).status_code == 200
    assert plain.vendors.last.keys == expected
    arrived = plain.vendors.last.headers
    assert [name for names in own.values() for name in names if name in arrived] == own[vendor]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (NATIVE["anthropic"], {"x-api-key": "a"} | bearer("b")),
        (NATIVE["gemini"], {"x-goog-api-key": "a"} | bearer("b")),
        (f"{NATIVE['gemini']}?key=a", {"x-goog-api-key": "b"}),
        (f"{NATIVE['gemini']}?alt=sse&key=a", bearer("b")),
        (f"{NATIVE['gemini']}?access_token=a", bearer("b")),
        ("/openai/v1/realtime", {"sec-websocket-protocol": "realtime, openai-insecure-api-key.a"} | bearer("b")),
    ],
)
def test_two_bare_keys_of_one_vendor_are_refused(plain: Front, path: str, headers: dict) -> None:
    plain.refused(400, path, headers)


def test_a_key_in_the_url_is_google_s_own_and_gives_way_to_a_list(plain: Front) -> None:
    path = NATIVE["gemini"]
    for query in ("?key=AIza-fake", "?alt=sse&key=AIza-fake&a=%20b"):
        assert plain.call(path + query).status_code == 200
        assert plain.vendors.last.target == path.removeprefix("/gemini") + query
        assert plain.vendors.last.keys == {}
    lefts = {"?key=AIza-fake": "", "?alt=sse&key=AIza-fake&a=%20b": "?alt=sse&a=%20b", "?key=a&monkey=b": "?monkey=b"}
    for query, left in lefts.items():
        for headers in (bearer(LIST), data(**AS_DATA)):
            assert plain.call(path + query, headers).status_code == 200
            assert plain.vendors.last.target.removesuffix("?") == path.removeprefix("/gemini") + left
            assert plain.vendors.last.keys == OWN["gemini"]


@pytest.mark.parametrize(
    "query", [f"?key={LIST}", "?key=openai%3Do%3Bgemini%3Dg", "?a=b&api_key=sk-openai=o", "?access_token=openai%3do"]
)
def test_a_list_in_the_url_goes_nowhere(plain: Front, query: str) -> None:
    plain.refused(401, NATIVE["gemini"] + query)


# Where tokens are demanded.

WITH_TOKEN = {
    "a token beside provider data": bearer(TOKEN) | data(**AS_DATA),
    "a token in a list": bearer(f"token={TOKEN};{LIST}"),
    "a token at the end of a list": {"x-api-key": f"sk-{LIST};token={TOKEN}"},
    "a token beside a list": bearer(TOKEN) | {"x-api-key": LIST},
    "a token in a list beside provider data": bearer(f"token={TOKEN}") | data(**AS_DATA),
    "a token and a key beside provider data": bearer(f"token={TOKEN},openai=other") | data(**AS_DATA),
}


@pytest.mark.parametrize("case", WITH_TOKEN)
def test_a_token_reaches_the_gateway_and_keys_beside_it(guarded: Front, case: str) -> None:
    assert guarded.call(headers=WITH_TOKEN[case]).status_code == 200
    headers = guarded.gateway.headers()
    assert headers["authorization"] == f"Bearer {TOKEN}"
    assert json.loads(headers[PROVIDER_DATA]) == AS_DATA
    assert "x-api-key" not in headers


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        (bearer("sk-fake") | data(**AS_DATA), "demands a token"),
        (bearer("a.b.c") | data(**AS_DATA), "demands a token"),
        (bearer(LIST), "demands a token"),
        (data(**AS_DATA), "demands a token"),
        ({"x-api-key": TOKEN} | data(**AS_DATA), "demands a token"),
        (bearer(TOKEN), "the API key is a list"),
        (bearer(f"token={TOKEN}"), "the API key is a list"),
        ({}, "the API key is a list"),
    ],
)
def test_no_key_is_taken_for_a_token_nor_a_token_for_a_key(guarded: Front, headers: dict, told: str) -> None:
    assert told in guarded.refused(401, CHAT, headers)


def test_two_tokens_are_two_credentials(guarded: Front) -> None:
    guarded.refused(400, CHAT, bearer(TOKEN) | {"x-api-key": f"token={TOKEN};openai=o"})


def test_a_key_is_not_shown_to_whoever_checks_tokens(guarded: Front) -> None:
    assert guarded.call("/v1/models", bearer("sk-fake"), "GET").status_code == 200
    assert "authorization" not in guarded.gateway.headers()
    assert guarded.call("/v1/models", bearer(TOKEN), "GET").status_code == 200
    assert guarded.gateway.headers()["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("path", NATIVE.values())
def test_native_paths_are_closed_where_tokens_are_demanded(guarded: Front, path: str) -> None:
    assert "demands tokens" in guarded.refused(403, path, bearer(f"token={TOKEN};{LIST}"))


def test_no_token_goes_where_none_is_demanded(plain: Front) -> None:
    for headers in (bearer(TOKEN) | data(**AS_DATA), bearer(f"token={TOKEN};{LIST}")):
        assert plain.call(headers=headers).status_code == 200
        assert at_gateway(plain) == AS_DATA
