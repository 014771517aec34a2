"""The database that keeps nothing: the file that the server opens is the one that the start has prepared, whatever its folder is called.

And it is in a folder where nobody else can put another in its place.
"""

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.calls import ALL_KEYS, CHAT, MODELS, caller, chat, responses
from support.gateway import ALONE, NOWHERE, PROJECT, Gateway, refused
from support.vendors import Vendors

# All that a path may have in it which means something to a shell, a URL, YAML, Python or SQLite, but for what is refused below.
STRANGE = "ä b~c:d@e&f=g;h+i$j${env.HOME}k!l'm\"n\\o{p}q[r]s,t*u|v<w>x^y`z() --"

# As another program, or an older version of this one, may have left it: the server would use these tables, and show what is in them.
PREPARED = """
PRAGMA journal_mode=WAL;
CREATE TABLE inference_store (id VARCHAR PRIMARY KEY, created INTEGER, model VARCHAR, choices JSON, input_messages JSON,
  access_attributes JSON, owner_principal VARCHAR);
CREATE TABLE responses (id VARCHAR PRIMARY KEY, created_at INTEGER, response_object JSON, model VARCHAR,
  access_attributes JSON, owner_principal VARCHAR);
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
NOBODY = 65534


@pytest.fixture(scope="module")
def gateway(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose store has a strange name, and a database of somebody else's in its place."""
    home = tmp_path_factory.mktemp("store")
    store = home / STRANGE
    store.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(store / "keeps-nothing.db")) as database:
        database.executescript(PREPARED)
    with Gateway(home, SQLITE_STORE_DIR=str(store), **ALONE, **vendors.environ()) as gateway:
        yield gateway


def call_everything(gateway: Gateway) -> None:
    """Chats and responses, regular and streamed, and a file, each of which makes the server use a table."""
    file = [{"role": "user", "content": [{"type": "input_file", "file_id": "file-made-up"}]}]
    with caller(gateway.url, timeout=120) as client:
        for stream in (False, True):
            assert client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0], "keep this", stream=stream)).is_success
            body = responses(MODELS[0], "keep this", store=True, stream=stream)
            assert client.post("/v1/responses", headers=ALL_KEYS, json=body).is_success
        assert client.post("/v1/responses", headers=ALL_KEYS, json=responses(MODELS[0], file)).is_error


def names(database: sqlite3.Connection, kind: str) -> set[str]:
    """The tables of a database, or those with a trigger."""
    return {name for (name,) in database.execute("SELECT tbl_name FROM sqlite_schema WHERE type = ?", (kind,))}


def test_nothing_is_kept_and_no_other_file_is_used(gateway: Gateway) -> None:
    call_everything(gateway)
    with caller(gateway.url) as client:
        assert "keep this" not in client.get(CHAT).text
        assert client.get("/v1/responses").json()["data"] == []
    store = gateway.home / STRANGE
    opened = {Path(file.path) for file in psutil.Process(gateway.server).open_files()}
    assert store / "keeps-nothing.db" in opened
    written = [path for path in gateway.home.rglob("*") if path.is_file() and path != gateway.log_file]
    assert {path.parent for path in written} == {store}, written
    assert not [path for path in written if b"keep this" in path.read_bytes()]
    with contextlib.closing(sqlite3.connect(store / "keeps-nothing.db")) as theirs:
        rows = {table: theirs.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in names(theirs, "table")}
        assert {"responses", "conversation_messages"} <= rows.keys()
        assert set(rows.values()) == {0}, rows
        assert names(theirs, "table") == names(theirs, "trigger"), "a table that the server has made by itself"


def test_every_table_discards_what_is_inserted() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript((PROJECT / "deploy/keeps-nothing.sql").read_text())
        assert names(database, "table")
        for table in names(database, "table"):
            columns = [column[1] for column in database.execute(f"PRAGMA table_info({table})")]
            insert = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('1' for _ in columns)})"
            for statement in (insert, f"{insert} ON CONFLICT ({columns[0]}) DO UPDATE SET {columns[1]} = 2"):
                database.execute(statement)
            assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table


def test_what_is_in_its_place_is_replaced_whole(tmp_path: Path) -> None:
    """A view of that name, say, and the side files of another database, which SQLite would take for the new one's."""
    store = tmp_path / ".llama" / "distributions" / "lls-openai"
    store.mkdir(mode=0o700, parents=True)
    with contextlib.closing(sqlite3.connect(store / "keeps-nothing.db")) as database:
        database.execute("CREATE VIEW responses AS SELECT 1 AS id")
    for aside in ("-wal", "-shm", "-journal"):
        (store / f"keeps-nothing.db{aside}").write_text("of another")
    Gateway(tmp_path, **ALONE).environ_at_start()
    assert [path.name for path in store.iterdir()] == ["keeps-nothing.db"]
    with contextlib.closing(sqlite3.connect(store / "keeps-nothing.db")) as database:
        assert "responses" in names(database, "trigger")


@pytest.mark.parametrize(
    ("named", "store"), [("", ".llama/distributions/lls-openai"), ("~/of mine", "of mine")], ids=["not set", "in the home"]
)
def test_its_folder_is_made_for_its_user_alone(tmp_path: Path, named: str, store: str) -> None:
    home = tmp_path / "a home"
    home.mkdir()
    assert Gateway(home, SQLITE_STORE_DIR=named, **NOWHERE).environ_at_start()["SQLITE_STORE_DIR"] == str(home / store)
    assert [path.name for path in (home / store).iterdir()] == ["keeps-nothing.db"]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (home / store, home / store / "keeps-nothing.db")}
    assert list(modes.values()) == [0o700, 0o600], modes


@pytest.mark.parametrize("character", ["#", "?", "%", "\u2028"])
def test_a_name_that_the_server_would_read_as_another_is_refused(tmp_path: Path, character: str) -> None:
    """In run.yaml it is a part of a URL, in which these end the path or stand for another character. In the home's as well."""
    folder = tmp_path / f"a{character}b"
    why = f": the server cannot open a path with {character!r} in it. Name another folder.\n"
    assert refused(tmp_path, SQLITE_STORE_DIR=str(folder)) == f"SQLITE_STORE_DIR is {folder}{why}"
    assert refused(folder) == f"SQLITE_STORE_DIR is {folder}/.llama/distributions/lls-openai{why}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"SQLITE_STORE_DIR": "here"}, "SQLITE_STORE_DIR is here: it has to be a whole path, which starts with a slash."),
        (
            {"SQLITE_STORE_DIR": "~nobody-of-that-name/x"},
            "SQLITE_STORE_DIR is ~nobody-of-that-name/x, and nobody knows where that is",
        ),
        ({"HOME": ""}, "and nobody knows where that is: set HOME, or name a folder."),
        ({"HOME": "here"}, "it has to be a whole path, which starts with a slash."),
        ({"SQLITE_STORE_DIR": "/proc/self/x"}, "SQLITE_STORE_DIR is /proc/self/x, which cannot be used: "),
        ({"SQLITE_STORE_DIR": "/dev/null"}, "SQLITE_STORE_DIR is /dev/null: it has to be a folder that is yours"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_folder_that_cannot_be_is_a_sentence(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    assert words in refused(tmp_path, **settings)


THEIRS = "has to be a folder that is yours, and that nobody else may write to.\n"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777], ids=oct)
@pytest.mark.parametrize("above", [False, True], ids=["itself", "one above it"])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int, above: bool) -> None:
    """Also one above it, in which they could put another in its place, unless only owners may rename there, as in /tmp."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    store = shared / "store" if above else shared
    if above and mode == 0o1777:
        assert Gateway(tmp_path, SQLITE_STORE_DIR=str(store), **ALONE).environ_at_start()["SQLITE_STORE_DIR"] == str(store)
        return
    whose = f"{shared}, above it," if above else "it"
    # A group that Linux has made for the user alone has nobody else in it.
    os.chown(shared, -1, NOBODY) if os.geteuid() == 0 else None
    assert refused(tmp_path, SQLITE_STORE_DIR=str(store)) == f"SQLITE_STORE_DIR is {shared}: {whose} {THEIRS}"
    assert list(shared.iterdir()) == []


@needs_root
def test_what_somebody_else_owns_is_refused(tmp_path: Path) -> None:
    """Their folder, a folder in theirs, and the target of a link, which is what counts: whoever owns the link could turn it."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder in (theirs, ours):
        folder.mkdir(mode=0o755)
    os.chown(theirs, NOBODY, NOBODY)
    link = tmp_path / "link"
    link.symlink_to(theirs)
    assert refused(tmp_path, SQLITE_STORE_DIR=str(theirs)) == f"SQLITE_STORE_DIR is {theirs}: it {THEIRS}"
    assert (
        refused(tmp_path, SQLITE_STORE_DIR=str(theirs / "new")) == f"SQLITE_STORE_DIR is {theirs}: {theirs}, above it, {THEIRS}"
    )
    assert refused(tmp_path, SQLITE_STORE_DIR=str(link)) == f"SQLITE_STORE_DIR is {theirs}: it {THEIRS}"
    # The server is given the folder that was found, not the link: turned later, it leads nobody anywhere.
    link.unlink()
    link.symlink_to(ours)
    os.lchown(link, NOBODY, NOBODY)
    assert Gateway(tmp_path, SQLITE_STORE_DIR=str(link), **ALONE).environ_at_start()["SQLITE_STORE_DIR"] == str(ours)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit of 0 on the size of files stands in for a full disk: creating works, writing does not."""
    said = refused(tmp_path, shell="trap '' XFSZ; ulimit -f 0;", SQLITE_STORE_DIR=str(tmp_path / "store"))
    assert said.startswith(f"SQLITE_STORE_DIR is {tmp_path / 'store'}, which cannot be used: ")
    assert "disk" in said
    assert list((tmp_path / "store").iterdir()) == []
