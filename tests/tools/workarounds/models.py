"""What outlives a change of run.yaml."""

import re

from support.calls import MODELS

from . import Bench, Edit, Row, patient


def old_models(bench: Bench) -> Row:
    """A model that is removed and one that is renamed, each after a first start."""
    removed = MODELS[-1]
    renamed = ("display_name: GPT-4o\n", "display_name: Renamed\n")

    def measure(*edits: Edit) -> str:
        gateway = bench.gateway(*edits)
        run_yaml = gateway.cwd / "run.yaml"
        config = run_yaml.read_text()
        entry = re.search(rf"  - model_id: {removed}\n(    .*\n)+", config)
        if not entry or renamed[0] not in config:
            raise ValueError("run.yaml no longer registers the models that this changes")
        with gateway:
            pass
        run_yaml.write_text(config.replace(entry[0], ""))
        with gateway, patient(gateway) as client:
            listed = removed in [model["id"] for model in client.get("/v1/models").json()["data"]]
        run_yaml.write_text(config.replace(*renamed))
        try:
            with gateway:
                boots = "starts"
        except RuntimeError:
            boots = "does not start"
        return f"removed: {'still' if listed else 'not'} listed; renamed: {boots}"

    on_disk = 'db_path: "${env.SQLITE_STORE_DIR:=~/.llama}/kv.db"'
    return Row(
        "the kv store in memory",
        "registered models are remembered: a change in `run.yaml` is ignored, or stops the start",
        measure(Edit("run.yaml", 'db_path: ":memory:"', on_disk)),
        measure(),
    )
