"""The mirror of a run in Weights & Biases. The local files are authoritative: a mirror that breaks is one warning."""

import os
import secrets

from engine import run_files
from engine.files import read_json

OF_THE_RUN = ("parameters", "data", "git_commit", "device", "dtype", "versions")  # what run.json adds to the config


class Mirror:
    """A W&B run that repeats a run's metrics; whatever fails in it is said once, and training goes on.

    folder: the run folder. config: the resolved configuration, a dict. run: the content of run.json, with wandb_id.
    The runs of an arm of a study are a group, study/arm; of any other run its segments are. Raises ValueError where the
    package wandb is missing.
    """

    def __init__(self, folder, config, run):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "wandb_log needs the package wandb: `pip install wandb`, or leave wandb_log out"
            ) from error
        self._wandb, self._folder, self._name = wandb, folder, f"run-{run['wandb_id']}"
        self._sends_weights, self._run = config["wandb_artifacts"], None
        self._run = self._try("start", lambda: _start(wandb, folder, config, run))

    def log(self, step, kind, values):
        """Repeat a record of metrics.jsonl."""
        self._try("log", lambda: self._run.log({"step": step, **_flat(kind, values)}))

    def summarise(self, values):
        """Repeat summary.json, with all evaluations as a table and a curve, and on request the checkpoints."""
        self._try("write its summary", lambda: self._run.summary.update(values))
        self._try("write its table", self._write_table)
        if self._sends_weights:
            self._try("take its checkpoints", self._send_weights)

    def _write_table(self):
        columns = ["step", "val_loss", "val_loss_se"]
        records = [record for record in run_files.read_metrics(self._folder) if record["kind"] == "eval"]
        rows = [[record.get(name) for name in columns] for record in records]
        table = self._wandb.Table(columns=columns, data=rows)
        curve = self._wandb.plot.line(table, "step", "val_loss", title="validation loss")
        self._run.log({"evaluations": table, "loss curve": curve})

    def _send_weights(self):
        artifact = self._wandb.Artifact(self._name, type="model")
        for name in (run_files.CHECKPOINT, run_files.BEST):
            if (self._folder / name).exists():
                artifact.add_file(str(self._folder / name))
        self._run.log_artifact(artifact)

    def finish(self):
        """Wait for what is not sent yet."""
        self._try("finish", lambda: self._run.finish())

    def _try(self, what, action):
        if self._run is None and what != "start":
            return None
        try:
            return action()
        except Exception as error:  # of the network, the disk, its settings, pydantic: in many forms
            self._run = None
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            print(f"warning: W&B cannot {what} ({reason}): the run goes on without it; its files hold all metrics")
            return None


def _start(wandb, folder, config, run):
    study = read_json(folder.parent.parent / "study.json")
    query = "W_Q = I" if config["wq_identity"] else "W_Q"
    size = f"{config['n_layer']} x {config['n_embd']}"
    # Offline runs cannot be resumed: each segment is a run of its own, in the same group.
    offline = os.environ.get("WANDB_MODE") == "offline"
    mirror = wandb.init(
        project=config["wandb_project"],
        name=config["wandb_run_name"] or folder.name,
        config={**config, **{name: run.get(name) for name in OF_THE_RUN}},
        dir=os.environ.get("WANDB_DIR") or folder.resolve(),
        group=f"{study['name']}/{folder.parent.name}" if study else run["wandb_id"],
        tags=[config["dataset"], query, size, *([study["name"]] if study else [])],
        job_type="train",
        id=secrets.token_hex(4) if offline else run["wandb_id"],
        resume=None if offline else "allow",
    )
    # W&B drops what is logged at a step below the last one; as a field, ours may go back after a resume.
    mirror.define_metric("step")
    mirror.define_metric("*", step_metric="step")
    return mirror


def _flat(kind, values):
    """'kind/name' -> number for W&B; a list with a number per layer becomes 'kind/name/0', 'kind/name/1', …"""
    flat = {}
    for name, value in values.items():
        numbers = {f"{name}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        flat |= {f"{kind}/{key}": number for key, number in numbers.items() if number is not None}
    return flat
