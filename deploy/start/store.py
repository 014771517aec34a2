"""The database that keeps nothing, in a folder where nobody else can have prepared another one, or can exchange it later."""

import contextlib
import grp
import os
import pwd
import sqlite3
import stat
from pathlib import Path

from settings import PROJECT, Refused, Settings

STATEMENTS = PROJECT / "deploy" / "keeps-nothing.sql"
NAME = "keeps-nothing.db"

# run.yaml has the folder inside of a `file:` URL: SQLite ends the path at # and ?, and decodes %. SQLAlchemy takes the whole for
# a URL of its own. The server would open another file than the one that is prepared here.
NOT_IN_A_FILE_URL = "?#%"


def prepare(settings: Settings) -> Path:
    """Make the folder and, anew at each start, the database in it. Returns the folder, as the server is to be told.

    Raises Refused where another file than this one could be opened, or the folder cannot be used.
    """
    folder = folder_of(settings)
    database = folder / NAME
    new = folder / f"{NAME}.{os.getpid()}"
    try:
        new.unlink(missing_ok=True)
        with sqlite3.connect(new) as connection:
            connection.executescript(STATEMENTS.read_text())
        connection.close()
        # Of an older database these would be taken for the new one's.
        for aside in ("-wal", "-shm", "-journal"):
            database.with_name(NAME + aside).unlink(missing_ok=True)
        new.replace(database)
    except (OSError, sqlite3.Error) as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise Refused(f"SQLITE_STORE_DIR is {folder}, which cannot be used: {error}.") from error
    return folder


def folder_of(settings: Settings) -> Path:
    """The folder, made if it is missing, without a link in its path. Raises Refused where others could exchange it."""
    named = settings.get("SQLITE_STORE_DIR")
    # Where HOME is not set, Python asks who we are. Set to nothing, it would be the root of all folders.
    path = named if settings.environ.get("HOME") == "" else os.path.expanduser(named)
    if path.startswith("~"):
        raise Refused(f"SQLITE_STORE_DIR is {path}, and nobody knows where that is: set HOME, or name a folder.")
    if not os.path.isabs(path):
        raise Refused(f"SQLITE_STORE_DIR is {path}: it has to be a whole path, which starts with a slash.")
    try:
        folder = Path(os.path.realpath(path))
        if wrong := {*NOT_IN_A_FILE_URL} & {*str(folder)} or {each for each in str(folder) if not each.isprintable()}:
            which = " ".join(map(repr, sorted(wrong)))
            raise Refused(f"SQLITE_STORE_DIR is {folder}: the server cannot open a path with {which} in it. Name another folder.")
        for parent in reversed([folder, *folder.parents]):
            if not parent.exists():
                parent.mkdir(0o700)
            refuse_if_others_can_exchange(parent, within=parent != folder)
    except (OSError, ValueError) as error:
        raise Refused(f"SQLITE_STORE_DIR is {path}, which cannot be used: {error}.") from error
    return folder


def refuse_if_others_can_exchange(folder: Path, within: bool) -> None:
    """Raise Refused where another user could put a file or folder in the place of ours.

    `within` is for the folders above ours: root may own them, and all may write to them where only owners can rename (`/tmp`).
    """
    found = folder.lstat()  # A link that has just been put there is not followed.
    ours = found.st_uid in ((os.getuid(), 0) if within else (os.getuid(),))
    writers = stat.S_IWOTH if is_private(found.st_gid) else stat.S_IWOTH | stat.S_IWGRP
    others_write = found.st_mode & writers and not (within and found.st_mode & stat.S_ISVTX)
    if not stat.S_ISDIR(found.st_mode) or not ours or others_write:
        whose = "it" if not within else f"{folder}, above it,"
        raise Refused(
            f"SQLITE_STORE_DIR is {folder}: {whose} has to be a folder that is yours, and that nobody else may write to."
        )


def is_private(group: int) -> bool:
    """Whether a group is the one that Linux makes for this user alone, with which `umask 002` is usual."""
    try:
        found = grp.getgrgid(group)
        return found.gr_name == pwd.getpwuid(os.getuid()).pw_name and not found.gr_mem
    except KeyError:
        return False
