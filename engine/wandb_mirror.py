"""The mirror of a run in Weights & Biases. The local files are authoritative: a mirror that breaks is one warning."""

import os
import secrets


class Mirror:
    """A W&B run that repeats a run's metrics; whatever fails in it is said once, and training goes on.

    folder: the run folder. config: the resolved configuration, a dict. group: what all segments of the run share.
    Raises ValueError where the package wandb is missing.
    """

    def __init__(self, folder, config, group):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "wandb_log needs the package wandb: `pip install wandb`, or leave wandb_log out"
            ) from error
        self._run = None
        self._run = self._try("start", lambda: _start(wandb, folder, config, group))

    def log(self, step, kind, values):
        """Repeat a record of metrics.jsonl."""
        self._try("log", lambda: self._run.log({"step": step, **_flat(kind, values)}))

    def summarise(self, values):
        """Repeat summary.json."""
        self._try("write its summary", lambda: self._run.summary.update(values))

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


def _start(wandb, folder, config, group):
    # Offline runs cannot be resumed: each segment is a run of its own, in the same group.
    offline = os.environ.get("WANDB_MODE") == "offline"
    run = wandb.init(
        project=config["wandb_project"],
        name=config["wandb_run_name"] or folder.name,
        config=config,
        dir=folder,
        group=group,
        id=secrets.token_hex(4) if offline else group,
        resume=None if offline else "allow",
    )
    # W&B drops what is logged at a step below the last one; as a field, ours may go back after a resume.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _flat(kind, values):
    """'kind/name' -> number for W&B; a list with a number per layer becomes 'kind/name/0', 'kind/name/1', …"""
    flat = {}
    for name, value in values.items():
        numbers = {f"{name}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        flat |= {f"{kind}/{key}": number for key, number in numbers.items() if number is not None}
    return flat
