"""What `make bench` has measured is what the README says, and the bench itself measures what it says it does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench import report
from bench.load import Call, result, stream, wrk
from bench.upstream import GOOD_KEY, ROUND_TRIP, WRONG_KEY, Upstream
from world.gateway import PROJECT

FOLDER = PROJECT / "tests" / "bench"
PATH = "/usr/sbin"
MISSING = [tool for tool in ("wrk", "nginx", "openssl") if not (shutil.which(tool) or shutil.which(tool, path=PATH))]
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def results() -> dict:
    """The last whole run."""
    file = FOLDER / "results.json"
    if not file.exists():
        pytest.skip("there is no whole run yet: make bench")
    return json.loads(file.read_text())


def test_the_readme_has_the_table_of_the_last_run(results):
    text = report.README.read_text()
    assert f"{report.BEGIN}\n{report.readme(results)}\n{report.END}" in text


def test_the_table_and_the_picture_are_of_the_last_run(results):
    for name, text in report.files(results).items():
        assert (FOLDER / name).read_text() == text


def made_up(**metrics: dict[str, float]) -> report.Results:
    """Results in which each contender has these medians."""
    contenders = {
        name.replace("_", "-"): {"title": name, "version": "1", "metrics": {m: [v, v, v] for m, v in values.items()}}
        for name, values in metrics.items()
    }
    return report.Results({"contenders": contenders, "skipped": {}})


def test_a_claim_is_met_only_by_what_was_measured():
    ours = {"rps@8": 200, "error_cost": 2.5, "storm_worst": 0.4, "chunk@50": 2.2}
    claims = {text: holds for text, _, holds in report.claims(made_up(direct={"chunk@50": 0.4}, ours_1=ours, bare={"rps@8": 50}))}
    assert claims == {
        "at least 5x the requests/s of the same run.yaml started bare (8 callers)": False,
        "an error costs at most 2 successes": False,
        "no good call waits over 2 s while wrong keys pour in": True,
        "at most 2 ms added to a chunk (50 streams)": True,
    }


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory):
    """The vendor of the bench."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", PATH, prepend=":")
        with Upstream(tmp_path_factory.mktemp("upstream")) as upstream:
            yield upstream


def calls(base: str, key: str = GOOD_KEY) -> Call:
    """Calls to the vendor itself."""
    return Call(f"{base}/v1/chat/completions", {"Authorization": f"Bearer {key}"}, "gpt-4o")


@needs_tools
def test_regular_calls_and_refusals_are_counted(upstream, tmp_path: Path):
    good = result(wrk(calls(upstream.near), 2, 1, tmp_path))
    assert good["requests"] > 100
    assert good["errors"] == good["broken"] == 0
    bad = result(wrk(calls(upstream.near, WRONG_KEY), 2, 1, tmp_path))
    assert bad["errors"] == bad["requests"] > 100


@needs_tools
def test_streams_are_paced_and_timed(upstream):
    seen = stream(calls(upstream.paced), 3, 5, 50, calls=2)
    assert (seen.started, seen.complete, seen.chunks) == (6, 6, 30)
    assert seen.seconds > 2 * 3 * 0.050
    assert 0 < max(seen.delays) < 1


@needs_tools
def test_the_distant_vendor_is_a_round_trip_away_and_counts_connections(upstream):
    before = upstream.opened.value
    seen = stream(calls(upstream.far), 2, 2, 5, calls=3)
    assert seen.complete == 6
    assert upstream.opened.value - before == 2
    assert min(seen.first) > ROUND_TRIP


def test_what_is_missing_is_one_sentence():
    command = (sys.executable, "-m", "bench")
    done = subprocess.run(command, cwd=PROJECT / "tests", env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode
    assert done.stderr.startswith("make bench needs wrk")
    assert "Traceback" not in done.stderr
