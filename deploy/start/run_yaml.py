"""What the start takes from run.yaml: the defaults of settings, and the vendors. Nothing else needs to be told about a vendor."""

import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml
from settings import PROJECT, Refused

RUN_YAML = PROJECT / "run.yaml"

# In run.yaml, ${env.NAME:=default}.
WITH_DEFAULT = re.compile(r"\$\{env\.(\w+):=([^}]*)}")

# Where a provider that has no base_url in run.yaml connects to. Source: its class in llama-stack.
FIXED_URLS = {"remote::gemini": "https://generativelanguage.googleapis.com"}


class Vendor(NamedTuple):
    """Where one vendor is: its URL as shipped, and the setting that replaces it, if there is one."""

    url: str
    setting: str

    @property
    def name(self) -> str:
        """What HAProxy calls it: openai for OPENAI_PASSTHROUGH_URL."""
        return self.setting.removesuffix("_PASSTHROUGH_URL").lower()


class RunYaml(NamedTuple):
    """The default of each setting, the vendors, each once, and the providers of which nobody says where they connect to."""

    defaults: dict[str, str]
    vendors: list[Vendor]
    nowhere: list[str]


def read(file: Path = RUN_YAML) -> RunYaml:
    """Read run.yaml. Raises Refused where it cannot be read, or is not one of this project's."""
    try:
        text = file.read_text()
        config = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Refused(f"run.yaml cannot be read: {error}") from error
    defaults = dict(WITH_DEFAULT.findall(text))
    for name in ("LLAMA_STACK_HOST", "LLAMA_STACK_PORT", "LLAMA_STACK_WORKERS", "SQLITE_STORE_DIR"):
        if not defaults.get(name):
            raise Refused(f"run.yaml is not the one that ships: it has no default for {name}.")
    try:
        vendors = {each["provider_id"]: vendor_of(each) for each in config["providers"]["inference"]}
    except (AttributeError, LookupError, TypeError) as error:
        raise Refused("run.yaml is not the one that ships: it has no providers of inference.") from error
    nowhere = [name for name, vendor in vendors.items() if not vendor]
    return RunYaml(defaults, list(dict.fromkeys(filter(None, vendors.values()))), nowhere)


def vendor_of(provider: dict[str, Any]) -> Vendor | None:
    """Where a provider connects to, if that can be seen."""
    url = str((provider.get("config") or {}).get("base_url") or FIXED_URLS.get(provider["provider_type"], ""))
    if setting := WITH_DEFAULT.fullmatch(url):
        return Vendor(setting[2], setting[1])
    return Vendor(url, "") if re.match(r"https?://[^$]*$", url) else None


def address(url: str) -> str:
    """Scheme and host of a URL, and the port where it names one, as NO_PROXY and a log may have it: https://api.openai.com"""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "")
