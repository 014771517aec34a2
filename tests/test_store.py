"""The database that keeps nothing: whatever is found in its place, and whatever is sent."""

import os
import sqlite3
import stat
import subprocess
from pathlib import Path

import pytest
from support.calls import ALL_KEYS, MODELS, caller, chat
from support.gateway import START, Gateway, clean_environ, free_port
from support.vendors import Vendors

PREPARED = """
CREATE TABLE inference_store (id VARCHAR PRIMARY KEY, created INTEGER, model VARCHAR, choices JSON, input_messages JSON,
  access_attributes JSON, owner_principal VARCHAR);
CREATE TABLE responses (id VARCHAR PRIMARY KEY, created_at INTEGER, response_object JSON, model VARCHAR,
  access_attributes JSON, owner_principal VARCHAR);
"""


def kept(folder: Path) -> dict[str, int]:
    """The tables of every database in a folder, and how many rows each has."""
    found = {}
    for file in folder.rglob("*.db"):
        with sqlite3.connect(file) as database:
            for (table,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
                found[table] = database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    return found


def call_everything(gateway: Gateway) -> None:
    """Chats and responses, regular and streamed."""
    with caller(gateway.url, timeout=120) as client:
        for stream in (False, True):
            chats = client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(MODELS[0], "keep this", stream=stream))
            body = {"model": MODELS[0], "input": "keep this", "store": True, "stream": stream}
            assert chats.is_success
            assert client.post("/v1/responses", headers=ALL_KEYS, json=body).is_success


@pytest.mark.parametrize(
    "prepared", [PREPARED, "CREATE VIEW inference_store AS SELECT 1 AS id"], ids=["by another", "by an older version"]
)
def test_what_is_in_its_place_is_replaced(vendors: Vendors, tmp_path: Path, prepared: str) -> None:
    """A real table would keep every chat, and the server would show it to anyone."""
    store = tmp_path / "store"
    store.mkdir(mode=0o700)
    with sqlite3.connect(store / "keeps-nothing.db") as database:
        database.executescript(f"PRAGMA journal_mode=WAL; {prepared}")
    with Gateway(tmp_path, START, SQLITE_STORE_DIR=str(store), **vendors.environ()) as gateway:
        call_everything(gateway)
        with caller(gateway.url) as client:
            assert "keep this" not in client.get("/v1/chat/completions").text
            assert client.get("/v1/responses").json()["data"] == []
    found = kept(store)
    assert {"responses", "conversation_messages"} <= set(found)
    assert set(found.values()) == {0}


def test_no_table_is_without_its_trigger(vendors: Vendors, tmp_path: Path) -> None:
    """A table that the server makes by itself, because the file lacks it, would keep what it is sent."""
    with Gateway(tmp_path, START, **vendors.environ()) as gateway:
        call_everything(gateway)
        (file,) = tmp_path.rglob("keeps-nothing.db")
        with sqlite3.connect(file) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
            guarded = {name for (name,) in database.execute("SELECT tbl_name FROM sqlite_schema WHERE type = 'trigger'")}
        assert tables == guarded
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 or stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    store = tmp_path / "shared"
    store.mkdir()
    store.chmod(mode)
    refused(store, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder away takes root")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "theirs"
    store.mkdir(mode=0o755)
    os.chown(store, 65534, 65534)
    refused(store, tmp_path)


def refused(store: Path, home: Path) -> None:
    """See that the start ends with a sentence, and leaves the folder as it was."""
    environ = clean_environ(home, LLAMA_STACK_PORT=str(free_port()), SQLITE_STORE_DIR=str(store), EGRESS="0")
    done = subprocess.run(
        START, env=environ, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr == f"SQLITE_STORE_DIR is {store}: it has to be a folder that is yours, and that nobody else may write to.\n"
    )
    assert list(store.iterdir()) == []
