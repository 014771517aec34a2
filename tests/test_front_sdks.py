"""The vendors' own SDKs, with nothing but a base URL and an API key: a vendor's own on its native path, or a list.

Anthropic's and Google's are imported where they are used: that takes 2 s, and each process of the suite collects every file.
"""

from collections.abc import Iterator

import httpx
import openai
import pytest
from support.calls import EMBEDDINGS, HELLO, MODELS, vendor_of
from support.fronts import Front, front
from support.gateway import Gateway
from support.haproxy import NEEDS_HAPROXY
from support.vendors import KEYS, Vendors

pytestmark = NEEDS_HAPROXY

LIST = ";".join(f"{vendor}={key}" for vendor, key in KEYS.items())


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A front whose native paths lead to stand-ins for the vendors' own APIs."""
    with front(tmp_path_factory.mktemp("native")) as native:
        yield native


@pytest.fixture(autouse=True)
def _without_the_machines_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDKs read keys, URLs and proxies from the environment."""
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(params=["its own key", "a list"])
def key_of(request: pytest.FixtureRequest) -> Iterator:
    """The API key that a program is given for a vendor."""
    return lambda vendor: KEYS[vendor] if request.param == "its own key" else LIST


def test_openais_sdk(native: Front, key_of) -> None:
    sdk = openai.OpenAI(base_url=f"{native.haproxy.url}/openai/v1", api_key=key_of("openai"), max_retries=0)
    include = ["reasoning.encrypted_content"]
    answer = sdk.responses.create(model="gpt", input="Hello", store=False, include=include)
    assert answer.output_text == "Hello from OpenAI"
    assert answer.output[0].encrypted_content == "sealed"
    with sdk.responses.create(model="gpt", input="Hello", stream=True, include=include) as events:
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello from OpenAI"
    assert native.vendors.last.keys == {"authorization": f"Bearer {KEYS['openai']}"}
    assert sdk.files.create(file=("a.jsonl", b"{}\n"), purpose="batch")
    assert native.vendors.last.target == "/v1/files"


def test_anthropics_sdk(native: Front, key_of) -> None:
    asked = {"model": "claude", "max_tokens": 9, "messages": HELLO}
    import anthropic

    sdk = anthropic.Anthropic(base_url=f"{native.haproxy.url}/anthropic", api_key=key_of("anthropic"), max_retries=0)
    assert sdk.messages.create(**asked).content[0].text == "Hello from Anthropic"
    with sdk.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == "Hello from Anthropic"
    assert set(native.vendors.last.keys.values()) <= {KEYS["anthropic"], f"Bearer {KEYS['anthropic']}"}
    assert len(native.vendors.last.keys) == 1
    assert native.vendors.last.target == "/v1/messages"
    # As Claude Code has it, in ANTHROPIC_AUTH_TOKEN.
    import anthropic

    sdk = anthropic.Anthropic(base_url=f"{native.haproxy.url}/anthropic", auth_token=LIST, max_retries=0)
    sdk.messages.create(**asked)
    assert native.vendors.last.keys == {"x-api-key": KEYS["anthropic"]}


def test_googles_sdk(native: Front, key_of) -> None:
    from google import genai
    from google.genai import types

    options = types.HttpOptions(base_url=f"{native.haproxy.url}/gemini")
    sdk = genai.Client(api_key=key_of("gemini"), http_options=options)
    assert sdk.models.generate_content(model="gemini", contents="Hello").text == "Hello from Google"
    chunks = sdk.models.generate_content_stream(model="gemini", contents="Hello")
    assert "".join(chunk.text for chunk in chunks) == "Hello from Google"
    assert native.vendors.last.keys == {"x-goog-api-key": KEYS["gemini"]}
    assert native.vendors.last.target.endswith("/models/gemini:streamGenerateContent?alt=sse")


def test_openais_sdk_at_another_vendor(native: Front, key_of) -> None:
    for vendor, base in {"gemini": "gemini/v1beta/openai", "anthropic": "anthropic/v1"}.items():
        sdk = openai.OpenAI(base_url=f"{native.haproxy.url}/{base}", api_key=key_of(vendor), max_retries=0)
        answer = sdk.chat.completions.create(model="m", messages=HELLO)
        assert answer.choices[0].message.content == f"Hello from {vendor}"
        assert native.vendors.last.keys == {"authorization": f"Bearer {KEYS[vendor]}"}


def test_a_vendors_error_has_the_sdks_own_type_and_retries(native: Front) -> None:
    def fail(path: str) -> tuple[type, int]:
        before = len(native.vendors.arrived)
        sdk = openai.OpenAI(base_url=f"{native.haproxy.url}{path}", api_key="sk-fake", max_retries=1)
        with pytest.raises(openai.APIStatusError) as caught:
            sdk.with_options(timeout=60).get("", cast_to=httpx.Response)
        return type(caught.value), len(native.vendors.arrived) - before

    assert fail("/openai/v1/status/401") == (openai.AuthenticationError, 1)
    assert fail("/openai/v1/status/500") == (openai.InternalServerError, 2)


def at_v1(gateway: Gateway, key: str) -> openai.OpenAI:
    """OpenAI's SDK with this key at the path for all vendors."""
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


@pytest.mark.parametrize("model", MODELS)
def test_a_list_is_all_that_openais_sdk_needs(gateway: Gateway, vendors: Vendors, model: str) -> None:
    sdk = at_v1(gateway, f"sk-{LIST}")
    prompt = f"with a list {model}"
    messages = [{"role": "user", "content": prompt}]
    assert prompt in sdk.chat.completions.create(model=model, messages=messages).choices[0].message.content
    stream = sdk.chat.completions.create(model=model, messages=messages, stream=True)
    assert prompt in "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert prompt in sdk.responses.create(model=model, input=prompt).output_text
    assert {arrived.key for arrived in vendors.seen_with(prompt)} == {f"Bearer {KEYS[vendor_of(model)]}"}


def test_a_list_embeds_and_lists_what_can_be_called(gateway: Gateway) -> None:
    sdk = at_v1(gateway, LIST)
    for model in EMBEDDINGS:
        assert sdk.embeddings.create(model=model, input="a text").data[0].embedding
    assert {*MODELS, "anthropic/anthropic-other"} <= {model.id for model in sdk.models.list()}


def test_a_bare_key_is_told_what_to_do(gateway: Gateway) -> None:
    sdk = at_v1(gateway, "sk-fake")
    with pytest.raises(openai.AuthenticationError, match="Which vendor is this key for"):
        sdk.chat.completions.create(model=MODELS[0], messages=[])
    assert sdk.models.list().data
